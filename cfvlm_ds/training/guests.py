"""Texts of other groups for each group of an optimizer step, chosen before anything is packed.

Which texts a group gets depends on the groups of the step alone, by their ids: not on how they are spread over ranks and micro-batches.
Every rank therefore reads the rows of the whole step from the store; pictures of other ranks' groups are not opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup, Guest, Prompt, normalised
from cfvlm_ds.data import GroupSampler
from cfvlm_ds.data.store import Unraised

Entry = CounterfactualGroup | DataError


class MicroBatch(NamedTuple):
    """A micro-batch as places in its step, and the step's groups by their index in the data."""

    step: tuple[int, ...]
    places: range


class WholeSteps:
    """The micro-batches of a rank with their steps: a DataLoader's ``batch_sampler`` for ``WithGuests``."""

    def __init__(self, sampler: GroupSampler) -> None:
        self._sampler = sampler

    def __iter__(self) -> Iterator[MicroBatch]:
        rank, world_size = self._sampler.rank, self._sampler.world_size
        for parts in self._sampler.steps():
            step, first = tuple(index for part in parts for index in part), 0
            for number, part in enumerate(parts):
                if number % world_size == rank:
                    yield MicroBatch(step, range(first, first + len(part)))
                first += len(part)


class WithGuests(Sequence[Entry]):
    """The groups of a run, each at its place in the step and with texts of other groups of that step.

    Args:
        groups: the training groups.
        terms: the terms of the objective that compare with other groups, with the texts that each wants on an image.
        seed: of the choice.
    """

    def __init__(self, groups: Sequence[CounterfactualGroup], terms: dict[str, int], seed: int) -> None:
        self._groups, self._terms, self._seed = Unraised(groups), terms, seed
        self._last: tuple[tuple[int, ...], _Step] | None = None

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: Any) -> Any:
        return self._groups[index]

    def __getitems__(self, batch: MicroBatch) -> list[Entry]:
        """A micro-batch, with what is wrong in place of a group whose row cannot be read."""
        if self._last is None or self._last[0] != batch.step:  # a worker that has several micro-batches of a step reads it once
            self._last = batch.step, _Step(self._groups.__getitems__(batch.step), self._terms, self._seed)
        return [self._last[1].hosting(place) for place in batch.places]


class _Offer(NamedTuple):
    """A text that may be scored with other groups of the step: it is true of an image of its own group."""

    guest: Guest
    said: str
    key: str


class _Step:
    """The groups of a step, and the texts that they have for each other."""

    def __init__(self, entries: Sequence[Entry], terms: dict[str, int], seed: int) -> None:
        self._entries, self._terms, self._seed = entries, terms, seed
        self._offers: dict[Prompt, list[_Offer]] = {}
        for place, group in enumerate(entries):
            if isinstance(group, DataError) or not self._wanted(group):
                continue
            prompt = group.candidates[0].prompt
            numbers = [c for c, (asked, _) in enumerate(_texts(group)) if asked == prompt and any(row[c] == 1 for row in group.match)]
            for c in numbers:
                text = group.candidates[c].text
                guest = Guest(text, group.id, c, place, group.weight / len(numbers))
                key = group.keys[c] if group.keys else ""
                self._offers.setdefault(prompt, []).append(_Offer(guest, _said(text), key or _said(text)))

    def hosting(self, place: int) -> Entry:
        """The group at a place of the step, with its guests."""
        group = self._entries[place]
        return group if isinstance(group, DataError) else group.in_the_step(place, tuple(self._drawn(group)))

    def _wanted(self, group: CounterfactualGroup) -> int:
        """Texts of others that terms want on the group's images; none without a picture."""
        counts = group.objectives is None
        wanted = (number for name, number in self._terms.items() if counts or name in (group.objectives or ()))
        return max(wanted, default=0) if group.num_pictures else 0

    def _drawn(self, group: CounterfactualGroup) -> Iterator[Guest]:
        left, prompt = self._wanted(group), group.candidates[0].prompt
        excluded = {*group.exclude, *map(_said, group.exclude)}
        taken = {_said(text) for asked, text in _texts(group) if asked == prompt}
        offers = [offer for offer in self._offers.get(prompt, ()) if offer.guest.group != group.id] if left else []
        # Of a group that the step has twice, at the border of two epochs, the first one's texts come first, and are taken then.
        for offer in sorted(offers, key=lambda offer: self._draw(group, offer.guest)):
            if left and offer.said not in taken and excluded.isdisjoint((offer.said, offer.key)):
                taken.add(offer.said)
                left -= 1
                yield offer.guest

    def _draw(self, group: CounterfactualGroup, guest: Guest) -> bytes:
        drawn = "\0".join((str(self._seed), group.id, guest.group, str(guest.number)))
        return hashlib.blake2b(drawn.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _texts(group: CounterfactualGroup) -> Iterator[tuple[Prompt, str]]:
    return ((candidate.prompt, candidate.text) for candidate in group.candidates)


def _said(text: str) -> str:
    """Two texts that are equal in this form say the same."""
    return normalised(text).casefold()
