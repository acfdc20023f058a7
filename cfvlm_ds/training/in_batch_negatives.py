"""In-batch negatives: texts from the other groups in an optimizer step, drawn before packing, and the exchange of their scores.

The draw depends only on the ids of the step's groups, not on how the groups are distributed over ranks and micro-batches. Every rank
therefore reads the data of all groups in the step, but opens only the pictures of its own groups.

A loss that compares a text's scores on images of several groups couples micro-batches and ranks. The gradients of a group's own scores are
correct even if the other scores are treated as constants, so ranks exchange scores but not gradients. Shapes: G groups, I images, C texts,
R scores of a text on other groups' images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from cfvlm_ds.batching.batch import MicroBatch
from cfvlm_ds.core.distributed import World, gather_objects, preserve_rng
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup, Groups, InBatchNegative, Pictures, Prompt, normalised
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.data import GroupSampler
from cfvlm_ds.data.store import Unraised
from cfvlm_ds.objectives.batch_align import own_images

Entry = CounterfactualGroup | DataError


class StepPart(NamedTuple):
    """A micro-batch: the data indices of all groups in its step, and the positions of the micro-batch's own groups among them."""

    step: tuple[int, ...]
    places: range


@dataclass(frozen=True)
class WholeSteps:
    """The ``batch_sampler`` of a DataLoader over ``WithNegatives``. Yields a rank's micro-batches, each with the data indices of all groups
    in its step.
    """

    sampler: GroupSampler

    def __iter__(self) -> Iterator[StepPart]:
        rank, world_size = self.sampler.rank, self.sampler.world_size
        for parts in self.sampler.steps():
            step, first = tuple(index for part in parts for index in part), 0
            for number, part in enumerate(parts):
                if number % world_size == rank:
                    yield StepPart(step, range(first, first + len(part)))
                first += len(part)


class WithNegatives:
    """A run's training groups, each with its position in its step and with texts from the step's other groups.

    Args:
        terms: objective term -> number of texts from other groups that it needs per image.
        seed: seed for drawing the texts.
    """

    def __init__(self, groups: Groups, terms: dict[str, int], seed: int) -> None:
        self._groups, self._terms, self._seed = Unraised(groups), terms, seed
        self._last: tuple[tuple[int, ...], _Step] | None = None

    def __getitems__(self, batch: StepPart) -> list[Entry]:
        """Return the groups of a micro-batch. If a group's data cannot be read, a DataError takes its place."""
        if self._last is None or self._last[0] != batch.step:  # a worker with several micro-batches of a step reads the step once
            self._last = batch.step, _Step([self._groups[index] for index in batch.step], self._terms, self._seed)
        return [self._last[1].group_at(place) for place in batch.places]


class _Offer(NamedTuple):
    """A text that can be a negative for the step's other groups. ``shown`` holds the images in the text's own group that match the text."""

    negative: InBatchNegative
    text: str
    key: str
    shown: frozenset[Pictures]


_Question = tuple[Prompt, int]
"""A prompt and its number of pictures. Only groups that agree in both exchange texts."""


class _Step:
    """A step's groups, and the texts of each group that can be negatives for the other groups."""

    def __init__(self, entries: Sequence[Entry], terms: dict[str, int], seed: int) -> None:
        self._entries, self._terms, self._seed = entries, terms, seed
        self._offers: dict[_Question, list[_Offer]] = {}
        for place, group in enumerate(entries):
            if isinstance(group, DataError) or not self._wanted(group):
                continue
            texts = list(_answers(group))
            true_of = {c: frozenset(image for image, row in zip(group.images, group.match, strict=True) if row[c] == 1) for c, *_ in texts}
            offered = [(c, text, key) for c, text, key in texts if true_of[c]]
            for c, text, key in offered:
                negative = InBatchNegative(group.candidates[c].text, group.id, c, place, group.weight / len(offered))
                self._offers.setdefault(_question(group), []).append(_Offer(negative, text, key, true_of[c]))

    def group_at(self, place: int) -> Entry:
        """Return the group at a position in the step, with in-batch negatives added, or the DataError if its data cannot be read."""
        group = self._entries[place]
        return group if isinstance(group, DataError) else group.in_the_step(place, tuple(self._drawn(group)))

    def _wanted(self, group: CounterfactualGroup) -> int:
        """Return the number of texts from other groups that the group needs per image. It is 0 for a group without pictures."""
        counts = group.objectives is None
        wanted = (number for name, number in self._terms.items() if counts or name in (group.objectives or ()))
        return max(wanted, default=0) if group.num_pictures else 0

    def _drawn(self, group: CounterfactualGroup) -> Iterator[InBatchNegative]:
        missing, answers = self._wanted(group), list(_answers(group))
        excluded = {*group.exclude, *map(_comparable, group.exclude), *(key for *_, key in answers)}
        taken = {text for _, text, _ in answers}
        offers = [
            offer
            for offer in (self._offers.get(_question(group), ()) if missing else ())
            if offer.negative.group != group.id and offer.shown.isdisjoint(group.images)
        ]
        # A step that spans two epochs may contain a group twice. The texts of its first occurrence come first and are used.
        for offer in sorted(offers, key=lambda offer: self._draw(group, offer.negative)):
            if missing and offer.text not in taken and excluded.isdisjoint((offer.text, offer.key)):
                taken.add(offer.text)
                missing -= 1
                yield offer.negative

    def _draw(self, group: CounterfactualGroup, negative: InBatchNegative) -> bytes:
        drawn = "\0".join((str(self._seed), group.id, negative.group, str(negative.number)))
        return hashlib.blake2b(drawn.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _question(group: CounterfactualGroup) -> _Question:
    return group.candidates[0].prompt, group.num_pictures


def _answers(group: CounterfactualGroup) -> Iterator[tuple[int, str, str]]:
    """Yield the index, normalised text and key of each text that answers the factual text's prompt. Texts with equal keys are never
    negatives of each other. If a text has no key, the normalised text is used as its key.
    """
    for c, candidate in enumerate(group.candidates):
        if candidate.prompt == group.candidates[0].prompt:
            text = _comparable(candidate.text)
            yield c, text, (group.keys[c] if group.keys else "") or text


def _comparable(text: str) -> str:
    """Normalise a text and fold its case. Texts with equal results count as the same text."""
    return normalised(text).casefold()


class CrossRankScores:
    """A step's scores, keyed by text: each text's scores on its own group's images and on the images of groups that use it as a
    negative.
    """

    def __init__(self, local: Sequence[Scores], world: World) -> None:
        """Gather the scores of the step's micro-batches from all ranks. Every rank must call this."""
        self._of: dict[tuple[int, int], list[tuple[int, float]]] = {}
        for of_rank in gather_objects([entry for scores in local for entry in _entries(scores)], world):
            for name, place, score in of_rank:
                self._of.setdefault(name, []).append((place, score))

    def added_to(self, scores: Scores) -> Scores:
        """Extend a micro-batch's scores with the scores of its texts on other groups' images.

        A text gets no such scores, and is not compared, if its source group was left out of the step.
        """
        layout = scores.layout
        if layout.in_batch is None:
            return scores
        places, names = layout.in_batch.place.tolist(), _names(scores)
        others = [[list(self._others(place, *name)) for name in row] for place, row in zip(places, names, strict=True)]
        most = max(len(values) for row in others for values in row)
        filled = [[[*values, *[float("-inf")] * (most - len(values))] for values in row] for row in others]
        cross_group = torch.tensor(filled, dtype=scores.logp.dtype).view(len(others), len(names[0]), most)
        return replace(scores, cross_group=cross_group.to(scores.logp.device))

    def _others(self, place: int, source_group: int, text: int) -> Iterator[float]:
        """Yield the scores of a text on the images of all groups except the group at position ``place``."""
        entries = self._of.get((source_group, text), [])
        if any(scored_by == source_group for scored_by, _ in entries):
            yield from (score for scored_by, score in entries if scored_by != place)


def _entries(scores: Scores) -> list[tuple[tuple[int, int], int, float]]:
    """List the scores that other groups need: ((source group of the text, index there), group on whose image it was scored, nats)."""
    layout = scores.layout
    if layout.in_batch is None:
        return []
    own = own_images(layout)
    compared = own | (layout.negative & layout.same_prompt[:, :1] & own.any(1, keepdim=True))
    compared[:, :, layout.num_own :] = layout.valid[:, :, layout.num_own :]
    compared = compared.cpu()
    logp, names, place = scores.logp.detach().double().cpu()[compared].tolist(), _names(scores), layout.in_batch.place.tolist()
    group, _, column = compared.nonzero().T.tolist()
    return [(names[g][c], place[g], score) for g, c, score in zip(group, column, logp, strict=True)]


def _names(scores: Scores) -> list[list[tuple[int, int]]]:
    """Return (source group, index in that group) for each text, as nested lists [G][C]."""
    layout = scores.layout
    assert layout.in_batch is not None
    own = range(layout.num_own)
    places, source_groups = layout.in_batch.place.tolist(), layout.in_batch.source_group.tolist()
    return [[*((place, c) for c in own), *map(tuple, others)] for place, others in zip(places, source_groups, strict=True)]


def look_ahead(engine: Any, micro_batches: Sequence[MicroBatch], forwards: Sequence[int], device: torch.device) -> list[Scores]:
    """Score all micro-batches of this rank before any gradients are computed.

    These forward passes use the same random numbers, and therefore the same dropout masks, as the training passes that follow. Every rank
    runs the same number of passes.
    """
    with torch.no_grad(), preserve_rng(device):
        return [
            micro_batch.scores([engine(**batch.model_inputs) for batch in micro_batch.padded(number)])
            for micro_batch, number in zip(micro_batches, forwards, strict=True)
        ]
