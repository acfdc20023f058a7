"""Texts of other groups for each group of an optimizer step, chosen before anything is packed.

Which texts a group gets depends on the groups of the step alone, by their ids: not on how they are spread over ranks and micro-batches.
Every rank therefore reads the rows of the whole step from the store; pictures of other ranks' groups are not opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup, Guest, Pictures, Prompt, normalised
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
    """A text that may be scored with other groups of the step: it is true of images of its own group, which are ``shown``."""

    guest: Guest
    said: str
    key: str
    shown: frozenset[Pictures]


_Question = tuple[Prompt, int]
"""A prompt, and the pictures that it is asked of: a string asks the same of one picture and of two, and is answered otherwise."""


class _Step:
    """The groups of a step, and the texts that they have for each other."""

    def __init__(self, entries: Sequence[Entry], terms: dict[str, int], seed: int) -> None:
        self._entries, self._terms, self._seed = entries, terms, seed
        self._offers: dict[_Question, list[_Offer]] = {}
        for place, group in enumerate(entries):
            if isinstance(group, DataError) or not self._wanted(group):
                continue
            texts = list(_answers(group))
            true_of = {c: frozenset(image for image, row in zip(group.images, group.match, strict=True) if row[c] == 1) for c, *_ in texts}
            offered = [(c, said, key) for c, said, key in texts if true_of[c]]
            for c, said, key in offered:
                guest = Guest(group.candidates[c].text, group.id, c, place, group.weight / len(offered))
                self._offers.setdefault(_question(group), []).append(_Offer(guest, said, key, true_of[c]))

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
        left, own = self._wanted(group), list(_answers(group))
        excluded = {*group.exclude, *map(_said, group.exclude), *(key for *_, key in own)}
        taken = {said for _, said, _ in own}
        offers = [
            offer
            for offer in (self._offers.get(_question(group), ()) if left else ())
            if offer.guest.group != group.id and offer.shown.isdisjoint(group.images)
        ]
        # Of a group that the step has twice, at the border of two epochs, the first one's texts come first, and are taken then.
        for offer in sorted(offers, key=lambda offer: self._draw(group, offer.guest)):
            if left and offer.said not in taken and excluded.isdisjoint((offer.said, offer.key)):
                taken.add(offer.said)
                left -= 1
                yield offer.guest

    def _draw(self, group: CounterfactualGroup, guest: Guest) -> bytes:
        drawn = "\0".join((str(self._seed), group.id, guest.group, str(guest.number)))
        return hashlib.blake2b(drawn.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _question(group: CounterfactualGroup) -> _Question:
    return group.candidates[0].prompt, group.num_pictures


def _answers(group: CounterfactualGroup) -> Iterator[tuple[int, str, str]]:
    """Number, normalised text and key of each text that answers the factual text's prompt; a text without a key is its own."""
    for c, candidate in enumerate(group.candidates):
        if candidate.prompt == group.candidates[0].prompt:
            said = _said(candidate.text)
            yield c, said, (group.keys[c] if group.keys else "") or said


def _said(text: str) -> str:
    """Two texts that are equal in this form say the same."""
    return normalised(text).casefold()
