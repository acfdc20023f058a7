"""Scoring groups with a model that may be spread over ranks: the same forward as in training, without gradients."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cfvlm_ds.batching.batch import Batch, blinded
from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.batching.out_of_memory import explain_out_of_memory
from cfvlm_ds.cluster.signals import shield_worker
from cfvlm_ds.core.distributed import World, apart, gather_objects
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup, Pictures
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.core.sequences import Lazy
from cfvlm_ds.data.store import unraised
from cfvlm_ds.data.stored_scores import StoredScores
from cfvlm_ds.evaluation.loss import EvaluationLoss

Forward = Callable[..., Tensor]


@dataclass(frozen=True)
class GroupScores:
    """One group's full score matrix: ``logp`` [I, C] and ``blank`` [C] (the texts on a blank image), in nats.

    ``shuffled`` [C] are the texts on another group's image: empty if there is none, None if that was not requested.
    """

    logp: Tensor
    blank: Tensor
    shuffled: Tensor | None = None

    @property
    def finite(self) -> bool:
        """Whether all scores are numbers."""
        return all(bool(part.isfinite().all()) for part in (self.logp, self.blank, self.shuffled) if part is not None)

    def stored(self) -> StoredScores:
        """The same as plain numbers, for a scores file."""
        return StoredScores(tuple(map(tuple, self.logp.tolist())), tuple(self.blank.tolist()))


class AllScores(Sequence[GroupScores]):
    """The scores of many groups as numbers one after the other: four bytes each, and 20 a group.

    Args:
        parts: what each of several processes has scored; of a group that two have, the later one counts.
    """

    def __init__(self, parts: Sequence[ScoresPart]) -> None:
        numbers, sizes = (np.concatenate([np.asarray(getattr(part, name)) for part in parts]) for name in ("numbers", "sizes"))
        sizes = sizes.reshape(-1, 3).astype(np.int32)
        lengths = sizes[:, 0].astype(np.int64) * sizes[:, 1] + sizes[:, 1] + sizes[:, 2].clip(min=0)
        count = int(numbers.max()) + 1 if len(numbers) else 0
        self._starts, self._sizes = np.full(count, -1, np.int64), np.zeros((count, 3), np.int32)
        self._starts[numbers], self._sizes[numbers] = np.cumsum(lengths) - lengths, sizes
        self._values = torch.cat([torch.empty(0), *(value for part in parts for value in part.values)])

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> GroupScores: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[GroupScores]: ...

    def __getitem__(self, index: int | slice) -> GroupScores | Sequence[GroupScores]:
        if isinstance(index, slice):
            return Lazy(self._scores, range(len(self))[index])
        return self._scores(range(len(self))[index])

    def _scores(self, index: int) -> GroupScores:
        start, (images, texts, others) = int(self._starts[index]), self._sizes[index].tolist()
        if start < 0:
            raise KeyError(index)
        cells = images * texts
        values = self._values[start : start + cells + texts + max(others, 0)]
        shuffled = values[cells + texts :] if others >= 0 else None
        return GroupScores(values[:cells].view(images, texts), values[cells : cells + texts], shuffled)


@dataclass
class ScoresPart:
    """Scores of some groups: their places, their numbers of images, texts and shuffled texts (-1 where none were asked for), all values."""

    numbers: array[int] = field(default_factory=lambda: array("q"))
    sizes: array[int] = field(default_factory=lambda: array("i"))
    values: list[Tensor] = field(default_factory=list)

    def add(self, number: int, scores: GroupScores) -> None:
        """Add a group's."""
        self.numbers.append(number)
        self.sizes.extend((*scores.logp.shape, -1 if scores.shuffled is None else len(scores.shuffled)))
        self.values.append(torch.cat([scores.logp.flatten(), scores.blank, *([] if scores.shuffled is None else [scores.shuffled])]))
        if len(self.values) >= _JOINED:
            self.values = [torch.cat(self.values)]

    def __getstate__(self) -> Any:
        """One array of values: tensors would be pickled one by one."""
        return self.numbers, self.sizes, torch.cat([torch.empty(0), *self.values]).numpy()

    def __setstate__(self, state: Any) -> None:
        self.numbers, self.sizes, values = state
        self.values = [torch.from_numpy(values)]


_JOINED = 1 << 12


def guarded(
    collator: Collator, max_tokens: int | None = None
) -> Callable[[Sequence[CounterfactualGroup | DataError]], list[Batch] | DataError]:
    """``Collator.parts`` for a worker process: a DataError, of a row that could not be read too, is returned as a value, because raised in
    a worker it would lose its message."""

    def collate(groups: Sequence[CounterfactualGroup | DataError]) -> list[Batch] | DataError:
        try:
            found = [group for group in groups if not isinstance(group, DataError)]
            return next((each for each in groups if isinstance(each, DataError)), None) or collator.parts(found, max_tokens)
        except DataError as error:
            return error

    return collate


def score_groups(
    forward: Forward,
    collator: Collator,
    groups: Sequence[CounterfactualGroup],
    world: World,
    batch_size: int = 16,
    num_workers: int = 0,
    label: str = "scoring",
    *,
    max_tokens: int | None = None,
    shuffled: bool = False,
    remedy: str = "lower the batch size",
    loss: EvaluationLoss | None = None,
) -> Sequence[GroupScores]:
    """Every cell of every group, and every text on a blank image, in the order of ``groups``; the same on every rank.

    ``forward`` is an engine or a Scorer in evaluation mode; ``batch_size`` counts groups per rank, which are scored in forwards of at most
    ``max_tokens`` tokens. Every rank runs the same number of forwards, as ZeRO-3 requires: the last ones may repeat a group, or a part of
    a batch, whose second result is dropped. ``shuffled`` scores every text on another group's image too, one more per group; ``loss`` is
    told the scores on the groups' own images.

    Raises DataError as the collator does, on all ranks, and OutOfMemory with the ``remedy`` where memory runs out.
    """
    rounds = -(-len(groups) // (batch_size * world.size))
    mine = [batch_indices(len(groups), batch_size, world.rank, world.size, r) for r in range(rounds)]
    donors = other_images(groups) if shuffled else None
    mine_scored = ScoresPart()
    progress = Progress(world.say, label, len(groups), "groups")
    reference = None if loss is None else loss.reference
    options: dict[str, Any] = {"max_tokens": max_tokens, "remedy": remedy, "reference": reference}
    batches = scored_batches(forward, collator, groups, seen_as(groups, donors), mine, world, num_workers, label, **options)
    for number, (indices, scored) in enumerate(batches):
        if loss is not None and not indices_repeat(len(groups), batch_size, world.rank, world.size, number):
            loss.add(indices, [groups[index] for index in indices], scored[0])
        for index, found_here in matrices(groups, indices, scored, donors).items():
            mine_scored.add(index, found_here)
        progress.advance(min(batch_size * world.size, len(groups) - number * batch_size * world.size))
    found: Sequence[GroupScores] = AllScores(gather_objects(mine_scored, world)) if len(groups) else []
    if broken := [groups[index].id for index, scores in enumerate(found) if not scores.finite]:
        named = f"{', '.join(map(repr, broken[:5]))}{', ...' * (len(broken) > 5)}"
        world.say(f"warning: {label}: scores of {len(broken)} of {len(groups)} groups are not finite, and count as wrong: {named}")
    return found


def scored_batches(
    forward: Forward,
    collator: Collator,
    groups: Sequence[CounterfactualGroup],
    views: Sequence[Sequence[CounterfactualGroup]],
    mine: Sequence[list[int]],
    world: World,
    num_workers: int,
    label: str,
    *,
    max_tokens: int | None,
    remedy: str,
    reference: Callable[[Batch], Tensor] | None = None,
) -> Iterator[tuple[list[int], list[Scores]]]:
    """The scores, in each of its ``views`` (see ``seen_as``), of each batch of this rank, which ``mine`` gives by the places of its groups.

    Every rank calls it with as many batches. Raises what ``score_batches`` raises.
    """
    loaders: list[Any] = [
        DataLoader(
            unraised(view),  # type: ignore[arg-type]
            batch_sampler=mine,
            collate_fn=guarded(collator.scoring_everything(), max_tokens),
            num_workers=num_workers,
            worker_init_fn=shield_worker,
            generator=apart(),
        )
        for view in views
    ]
    for indices, *batches in zip(mine, *loaders, strict=True):
        yield indices, score_batches(forward, batches, world, f"{label}, groups from {groups[indices[0]].id!r}", remedy, reference)


def matrices(
    groups: Sequence[CounterfactualGroup], indices: Sequence[int], scored: Sequence[Scores], donors: Sequence[Pictures | None] | None
) -> dict[int, GroupScores]:
    """The score matrix of each group of a batch that was scored in every view. Without a view of a blank image, a text alone is its own."""
    seen, *others = (each.logp for each in scored)
    found = {}
    for j, index in enumerate(indices):
        size = (len(groups[index].images), len(groups[index].candidates))
        blank = others[0][j, 0, : size[1]] if others else seen[j, 0, : size[1]]
        foreign = None
        if donors is not None:
            foreign = others[1][j, 0, : size[1]] if donors[index] is not None and others else torch.empty(0)
        found[index] = GroupScores(seen[j, : size[0], : size[1]], blank, foreign)
    return found


def seen_as(groups: Sequence[CounterfactualGroup], donors: Sequence[Pictures | None] | None) -> list[Sequence[CounterfactualGroup]]:
    """The groups in every way in which they are scored: on their own images, on a blank one and, if wanted, on another group's."""
    views: list[Sequence[CounterfactualGroup]] = [groups, Lazy(lambda index: blinded(groups[index]), len(groups))]
    if donors is not None:
        views.append(Lazy(lambda index: shown_instead(groups[index], donors[index]), len(groups)))
    return views


def batch_indices(num_groups: int, batch_size: int, rank: int, world_size: int, number: int) -> list[int]:
    """The groups of a rank's ``number``-th batch; past the end, the last group alone."""
    start = min((number * world_size + rank) * batch_size, num_groups - 1)
    return list(range(start, min(start + batch_size, num_groups)))


def indices_repeat(num_groups: int, batch_size: int, rank: int, world_size: int, number: int) -> bool:
    """Whether that batch is past the end, and its group belongs to another one."""
    return (number * world_size + rank) * batch_size >= num_groups


def score_batches(
    forward: Forward,
    batches: Sequence[Sequence[Batch] | DataError],
    world: World,
    where: str,
    remedy: str,
    reference: Callable[[Batch], Tensor] | None = None,
) -> list[Scores]:
    """The scores of each batch, which comes in parts. Every rank calls it with the same number of batches, each of any number of parts.
    ``reference`` gives those of the first one reference scores.

    Raises DataError on all ranks if one of them has one.
    """
    sizes = [0 if isinstance(parts, DataError) else len(parts) for parts in batches]
    problem = next((str(parts) for parts in batches if isinstance(parts, DataError)), None)
    gathered = gather_objects((sizes, problem), world)
    if found := [each for _, each in gathered if each is not None]:
        raise DataError(found[0])
    scored: list[Scores] = []
    ready = [parts for parts in batches if not isinstance(parts, DataError)]
    for parts, *counts in zip(ready, *(each for each, _ in gathered), strict=True):
        compared = reference if not scored else None
        with torch.no_grad(), explain_out_of_memory(f"while {where} on rank {world.rank}", parts, remedy):
            found_parts, references = [], list[Tensor]()
            for k in range(max(counts)):
                prepared = parts[min(k, len(parts) - 1)]
                part = prepared.to(world.device)
                scores = part.scores(forward(**part.model_inputs))
                told = [] if compared is None else [compared(part).cpu()]
                if k < len(parts):
                    found_parts.append(Scores(prepared.layout, scores.logp.cpu(), scores.end_logp.cpu()))
                    references += told
        joined = Scores.joined(found_parts)
        scored.append(replace(joined, reference=torch.stack(references).sum(0)) if references else joined)
    return scored


def other_images(groups: Sequence[CounterfactualGroup], seed: int = 0) -> list[Pictures | None]:
    """For each group the factual image of another one that shows none of its own pictures; None where there is none.

    In an order drawn by ``seed`` each group takes the image of the next one, so that each image serves once. Groups that share pictures
    take the nearest image that fits; at most ``_TRIES`` neighbours are looked at.
    """
    found: list[Pictures | None] = [None] * len(groups)
    alike: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        alike.setdefault(group.num_pictures, []).append(index)
    draw = random.Random(seed)
    for num_pictures, members in sorted(alike.items()):
        draw.shuffle(members)
        for place, index in enumerate(members if num_pictures else ()):
            own = {picture for pictures in groups[index].images for picture in pictures}
            for step in range(1, min(len(members), _TRIES + 1)):
                donor = groups[members[(place + step) % len(members)]].images[0]
                if own.isdisjoint(donor):
                    found[index] = donor
                    break
    return found


_TRIES = 1000


def shown_instead(group: CounterfactualGroup, image: Pictures | None) -> CounterfactualGroup:
    """The group with one image in place of its own (None: a blank one); the truth is unknown for every text but the first."""
    blind = blinded(group)
    return blind if image is None else replace(blind, images=(image,))
