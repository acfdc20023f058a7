"""In-batch negatives: texts of other groups of an optimizer step, drawn before anything is packed, and their scores on all ranks.

Which texts a group gets depends on the groups of the step alone, by their ids: not on how they are spread over ranks and micro-batches.
Every rank therefore reads the rows of the whole step from the store; pictures of other ranks' groups are not opened.

A loss that compares a text on images of several groups couples micro-batches and ranks. Every group has the gradient of its own scores if
it knows the others as constants, so scores are exchanged and gradients are not. Shapes: G groups, I images, C texts, R scores of a text on
images of other groups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cfvlm_ds.batching.batch import MicroBatch
from cfvlm_ds.core.distributed import World, gather_objects, random_state, set_random_state
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup, InBatchNegative, Pictures, Prompt, normalised
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.data import GroupSampler
from cfvlm_ds.data.store import Unraised

Entry = CounterfactualGroup | DataError


class StepPart(NamedTuple):
    """A micro-batch as places in its step, and the step's groups by their index in the data."""

    step: tuple[int, ...]
    places: range


class WholeSteps:
    """The micro-batches of a rank with their steps: a DataLoader's ``batch_sampler`` for ``WithNegatives``."""

    def __init__(self, sampler: GroupSampler) -> None:
        self._sampler = sampler

    def __iter__(self) -> Iterator[StepPart]:
        rank, world_size = self._sampler.rank, self._sampler.world_size
        for parts in self._sampler.steps():
            step, first = tuple(index for part in parts for index in part), 0
            for number, part in enumerate(parts):
                if number % world_size == rank:
                    yield StepPart(step, range(first, first + len(part)))
                first += len(part)


class WithNegatives(Sequence[Entry]):
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

    def __getitems__(self, batch: StepPart) -> list[Entry]:
        """A micro-batch, with what is wrong in place of a group whose row cannot be read."""
        if self._last is None or self._last[0] != batch.step:  # a worker that has several micro-batches of a step reads it once
            self._last = batch.step, _Step([self._groups[index] for index in batch.step], self._terms, self._seed)
        return [self._last[1].group_at(place) for place in batch.places]


class _Offer(NamedTuple):
    """A text that other groups of the step may score: it is true of images of its own group, which are ``shown``."""

    negative: InBatchNegative
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
                negative = InBatchNegative(group.candidates[c].text, group.id, c, place, group.weight / len(offered))
                self._offers.setdefault(_question(group), []).append(_Offer(negative, said, key, true_of[c]))

    def group_at(self, place: int) -> Entry:
        """The group at a place of the step, with its in-batch negatives."""
        group = self._entries[place]
        return group if isinstance(group, DataError) else group.in_the_step(place, tuple(self._drawn(group)))

    def _wanted(self, group: CounterfactualGroup) -> int:
        """Texts of others that terms want on the group's images; none without a picture."""
        counts = group.objectives is None
        wanted = (number for name, number in self._terms.items() if counts or name in (group.objectives or ()))
        return max(wanted, default=0) if group.num_pictures else 0

    def _drawn(self, group: CounterfactualGroup) -> Iterator[InBatchNegative]:
        left, own = self._wanted(group), list(_answers(group))
        excluded = {*group.exclude, *map(_said, group.exclude), *(key for *_, key in own)}
        taken = {said for _, said, _ in own}
        offers = [
            offer
            for offer in (self._offers.get(_question(group), ()) if left else ())
            if offer.negative.group != group.id and offer.shown.isdisjoint(group.images)
        ]
        # Of a group that the step has twice, at the border of two epochs, the first one's texts come first, and are taken then.
        for offer in sorted(offers, key=lambda offer: self._draw(group, offer.negative)):
            if left and offer.said not in taken and excluded.isdisjoint((offer.said, offer.key)):
                taken.add(offer.said)
                left -= 1
                yield offer.negative

    def _draw(self, group: CounterfactualGroup, negative: InBatchNegative) -> bytes:
        drawn = "\0".join((str(self._seed), group.id, negative.group, str(negative.number)))
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


class CrossRankScores:
    """Scores of the texts of a step on images of every group that scored them.

    Args:
        table: [M, 4], the rows of ``_entries`` of all ranks.
    """

    def __init__(self, table: npt.NDArray[np.float64]) -> None:
        self._of: dict[tuple[int, int], list[tuple[int, float]]] = {}
        for source_group, text, place, score in table.tolist():
            self._of.setdefault((int(source_group), int(text)), []).append((int(place), score))

    @classmethod
    def gathered(cls, found: Sequence[Scores], world: World) -> CrossRankScores:
        """Gather the scores ``found`` of all micro-batches of the step from all ranks; collective."""
        mine = np.concatenate([_entries(scores) for scores in found])
        return cls(np.concatenate(gather_objects(mine, world)))

    def added_to(self, scores: Scores) -> Scores:
        """Add to the scores of a micro-batch what its texts score on images of other groups.

        A text whose own group was left out of the step has no such scores: it is compared with nothing.
        """
        layout = scores.layout
        if layout.in_batch is None:
            return scores
        places, names = layout.in_batch.place.tolist(), _names(scores)
        found = [[list(self._others(place, *name)) for name in line] for place, line in zip(places, names, strict=True)]
        most = max(len(each) for line in found for each in line)
        filled = [[[*each, *[float("-inf")] * (most - len(each))] for each in line] for line in found]
        cross_group = torch.tensor(filled, dtype=scores.logp.dtype).view(len(found), len(names[0]), most)
        return replace(scores, cross_group=cross_group.to(scores.logp.device))

    def _others(self, place: int, source_group: int, text: int) -> Iterator[float]:
        """Scores of a text on images of all groups but the one at ``place``."""
        entries = self._of.get((source_group, text), [])
        if any(scored_by == source_group for scored_by, _ in entries):
            yield from (score for scored_by, score in entries if scored_by != place)


def _entries(scores: Scores) -> npt.NDArray[np.float64]:
    """[M, 4], a row for each score that other groups compare with: its text's source group and number, the group that scored it, nats."""
    layout = scores.layout
    if layout.in_batch is None:
        return np.zeros((0, 4))
    true = layout.positive & layout.same_prompt[:, :1]
    own = true & (true.cumsum(1) == 1)
    compared = own | (layout.negative & layout.same_prompt[:, :1] & own.any(1, keepdim=True))
    compared[:, :, layout.num_own :] = layout.valid[:, :, layout.num_own :]
    compared = compared.cpu()
    logp, names, place = scores.logp.detach().double().cpu()[compared], _names(scores), layout.in_batch.place.tolist()
    group, _, column = compared.nonzero().T.tolist()
    told = [(*names[g][c], place[g]) for g, c in zip(group, column, strict=True)]
    return np.column_stack([np.array(told, np.float64).reshape(-1, 3), logp.numpy()])


def _names(scores: Scores) -> list[list[tuple[int, int]]]:
    """[G][C] source group and number of each text."""
    layout = scores.layout
    assert layout.in_batch is not None
    own = range(layout.num_own)
    places, source_groups = layout.in_batch.place.tolist(), layout.in_batch.source_group.tolist()
    return [[*((place, c) for c in own), *map(tuple, others)] for place, others in zip(places, source_groups, strict=True)]


def look_ahead(engine: Any, micro_batches: Sequence[MicroBatch], forwards: Sequence[int], device: torch.device) -> list[Scores]:
    """Score all micro-batches of this rank before the gradients of the first are computed.

    The random numbers are those of the forwards that follow, so that dropout leaves out the same; every rank makes as many forwards.
    """
    state, found = random_state(device), []
    with torch.no_grad():
        for micro_batch, number in zip(micro_batches, forwards, strict=True):
            found.append(micro_batch.scores([engine(**batch.model_inputs) for batch in micro_batch.padded(number)]))
    set_random_state(state, device)
    return found
