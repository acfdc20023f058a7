"""Group scoring with the training forward pass, without gradients. The model can be partitioned over ranks.

``rehearse`` scores the largest batch before training, to detect insufficient memory or invalid data early.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cfvlm_ds.batching.batch import BLANK, Batch, blinded, explain_out_of_memory
from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.cluster.signals import shield_worker
from cfvlm_ds.core.distributed import ProgressBarrier, World, gather_objects, isolated_rng, run_on_rank0
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup, Groups
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.ranks import cores_per_rank
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.core.sequences import Lazy
from cfvlm_ds.core.text import few
from cfvlm_ds.data.picture_index import sizes_of
from cfvlm_ds.data.store import Unraised
from cfvlm_ds.data.stored_scores import StoredScores
from cfvlm_ds.evaluation.loss import EvaluationLoss

Forward = Callable[..., Tensor]


@dataclass(frozen=True)
class GroupScores:
    """Scores of one group in nats: the full score matrix ``logp`` [I, C], and ``blank`` [C], the scores of the texts on a blank image.

    A score that is not finite becomes NaN, which loses every comparison.
    """

    logp: Tensor
    blank: Tensor

    def __post_init__(self) -> None:
        for name, scores in vars(self).items():
            object.__setattr__(self, name, scores.where(scores.isfinite(), torch.nan))

    @property
    def finite(self) -> bool:
        """True if all scores are finite."""
        return bool(self.logp.isfinite().all() and self.blank.isfinite().all())

    def stored(self) -> StoredScores:
        """Return the scores as plain numbers for a scores file."""
        return StoredScores(tuple(map(tuple, self.logp.tolist())), tuple(self.blank.tolist()))


@dataclass(frozen=True)
class Batching:
    """Division of groups into batches and forward passes.

    Args:
        batch_size: number of groups in a batch of one rank.
        max_tokens: maximum number of tokens in a forward pass; a larger batch takes several passes. If None, each batch takes one pass.
        num_workers: number of processes per rank that prepare batches.
        remedy: advice for an out-of-memory error.
    """

    batch_size: int = 16
    max_tokens: int | None = None
    num_workers: int = 0
    remedy: str = "lower the batch size"


def guarded(
    collator: Collator, max_tokens: int | None = None
) -> Callable[[Sequence[CounterfactualGroup | DataError]], list[Batch] | DataError]:
    """Return a collate function for worker processes that calls ``Collator.parts``.

    It returns a DataError instead of raising it, because an error raised in a worker loses its message.
    """

    def collate(groups: Sequence[CounterfactualGroup | DataError]) -> list[Batch] | DataError:
        try:
            for group in groups:
                if isinstance(group, DataError):
                    raise group
            return collator.parts(groups, max_tokens)  # type: ignore[arg-type]
        except DataError as error:
            return error

    return collate


def score_groups(
    forward: Forward,
    collator: Collator,
    groups: Groups,
    world: World,
    batching: Batching = Batching(),
    label: str = "scoring",
    loss: EvaluationLoss | None = None,
) -> Sequence[GroupScores]:
    """Score every cell of every group, and every text on a blank image. Return the scores in the order of ``groups``, equal on all ranks.

    ``forward`` is an engine or a Scorer in evaluation mode. Every rank runs the same number of forward passes, as ZeRO-3 requires. The
    scores on the groups' own images are added to ``loss``.

    Raises the same DataErrors as the collator, on all ranks. If memory runs out, raises OutOfMemory with the remedy in its message.
    """
    batch_size = batching.batch_size
    batches = [range(start, min(start + batch_size, len(groups))) for start in range(0, len(groups), batch_size)]
    local: dict[int, list[Any]] = {}  # arrays are smaller than tensors
    progress = Progress(world.say, label, len(groups), "groups")
    views, reference = seen_as(groups), None if loss is None else loss.reference
    turns = scored_batches(forward, collator, groups, views, batches, world, batching, label, reference)
    for number, (indices, scored) in enumerate(turns):
        if loss is not None and indices:
            loss.add([groups[index] for index in indices], scored[0])
        for index, scores in matrices(groups, indices, scored).items():
            local[index] = [np.array(part.numpy(), np.float32) for part in vars(scores).values()]
        progress.advance(min(batch_size * world.size, len(groups) - number * batch_size * world.size))
    every = {index: arrays for part in gather_objects(local, world) for index, arrays in part.items()}
    results = Lazy(lambda index: GroupScores(*map(torch.from_numpy, every[index])), len(groups))
    if broken := [group.id for group, scores in zip(groups, results, strict=True) if not scores.finite]:
        world.say(f"warning: {label}: scores of {len(broken)} of {len(groups)} groups are not finite and count as wrong: {few(broken)}")
    return results


def scored_batches(
    forward: Forward,
    collator: Collator,
    groups: Groups,
    views: Sequence[Groups],
    batches: Sequence[Sequence[int]],
    world: World,
    batching: Batching,
    label: str,
    reference: Callable[[Batch], Tensor] | None = None,
) -> Iterator[tuple[Sequence[int], list[Scores]]]:
    """Score this rank's share of ``batches``. For each batch, yield the indices of its groups and its scores in each of ``views`` (see
    ``seen_as``).

    Batches are assigned to ranks in turn. All ranks yield the same number of times: a rank that has no batch left scores one group again
    and yields no indices. Raises the same errors as ``score_batches``.
    """
    places = range(world.rank, -(-len(batches) // world.size) * world.size, world.size)
    mine = [batches[place] if place < len(batches) else batches[-1][-1:] for place in places]
    loaders: list[Any] = [
        DataLoader(
            Unraised(view),  # type: ignore[arg-type]
            batch_sampler=mine,  # type: ignore[arg-type]
            collate_fn=guarded(collator.scoring_everything(), batching.max_tokens),
            num_workers=batching.num_workers,
            worker_init_fn=shield_worker,
            generator=isolated_rng(),
        )
        for view in views
    ]
    for place, indices, *parts in zip(places, mine, *loaders, strict=True):
        scored = score_batches(forward, parts, world, f"{label}, groups from {groups[indices[0]].id!r}", batching.remedy, reference)
        yield (indices if place < len(batches) else ()), scored


def matrices(groups: Groups, indices: Sequence[int], scored: Sequence[Scores]) -> dict[int, GroupScores]:
    """Return the scores of each group in a batch, keyed by group index. ``scored`` starts with the batch's scores on the groups' own
    images and ends with those on the blank image. If only the groups' own images were scored, ``GroupScores.blank`` holds the scores on the
    first of them.
    """
    seen, blind = scored[0].logp, scored[-1].logp
    by_index = {}
    for j, index in enumerate(indices):
        num_images, num_texts = len(groups[index].images), len(groups[index].candidates)
        by_index[index] = GroupScores(seen[j, :num_images, :num_texts], blind[j, 0, :num_texts])
    return by_index


def seen_as(groups: Groups) -> list[Groups]:
    """Return the two views of groups that are scored: one with their own images, and one with a blank image."""
    return [groups, Lazy(lambda index: blinded(groups[index]), len(groups))]


def score_batches(
    forward: Forward,
    batches: Sequence[Sequence[Batch] | DataError],
    world: World,
    where: str,
    remedy: str,
    reference: Callable[[Batch], Tensor] | None = None,
) -> list[Scores]:
    """Return the scores of each batch. A batch is a list of parts, each scored in one forward pass. All ranks must pass the same number of
    batches, but the number of parts can differ.

    ``reference`` computes reference scores. It is called only for the first batch (in ``scored_batches``, the groups on their own images).
    Raises DataError on all ranks if any rank has a DataError in place of a batch.
    """
    sizes = [0 if isinstance(parts, DataError) else len(parts) for parts in batches]
    problem = next((str(parts) for parts in batches if isinstance(parts, DataError)), None)
    gathered = gather_objects((sizes, problem), world)
    if problems := [message for _, message in gathered if message is not None]:
        raise DataError(problems[0])
    scored: list[Scores] = []
    ready = [parts for parts in batches if not isinstance(parts, DataError)]
    for parts, *counts in zip(ready, *(sizes_of_rank for sizes_of_rank, _ in gathered), strict=True):
        reference_of_batch = reference if not scored else None
        with torch.no_grad(), explain_out_of_memory(f"while {where} on rank {world.rank}", parts, remedy):
            scored_parts, references = [], list[Tensor]()
            for k in range(max(counts)):
                prepared = parts[min(k, len(parts) - 1)]
                part = prepared.to(world.device)
                scores = part.scores(forward(**part.model_inputs))
                part_references = [] if reference_of_batch is None else [reference_of_batch(part).cpu()]
                if k < len(parts):
                    tokens = None if scores.tokens is None else scores.tokens.cpu()
                    scored_parts.append(Scores(prepared.layout, scores.logp.cpu(), scores.end_logp.cpu(), tokens=tokens))
                    references += part_references
        joined = Scores.joined(scored_parts)
        scored.append(replace(joined, reference=torch.stack(references).sum(0)) if references else joined)
    return scored


class _Tried(NamedTuple):
    """An evaluation batch: the token count of its largest forward pass, its total token count, its split, and its groups (with their own
    images or a blank image).
    """

    largest: int
    tokens: int
    split: str
    groups: Groups


def rehearse(forward: Forward, collator: Collator, splits: Mapping[str, Groups], world: World, batching: Batching) -> None:
    """On every rank, score the batch that needs the largest forward pass in ``score_groups``, to run out of memory now rather than later.

    Ties go to the batch with the most tokens. A forward pass exceeds ``batching.max_tokens`` only if a single text with its prompt and
    image does. Raises the same errors as ``score_groups``, on all ranks.
    """
    barrier = ProgressBarrier(world)  # other ranks wait while rank 0 reads picture headers
    collator, batch_size, max_tokens = collator.scoring_everything(), batching.batch_size, batching.max_tokens

    def batches() -> Iterator[_Tried]:
        with ThreadPoolExecutor(cores_per_rank()) as pool:
            for split, groups in splits.items():
                for view in seen_as(groups):
                    for start in range(0, len(groups), batch_size):
                        shown = list(view[start : start + batch_size])
                        pictures = (picture for group in shown for image in group.images for picture in image)
                        opened = [picture for picture in pictures if picture.parent != BLANK.parent]
                        sizes = sizes_of(opened, collator.files.checked, collator.files.max_pixels, pool)
                        sizes_of_groups = []
                        for group in shown:
                            barrier.alive()
                            sizes_of_groups.append(collator.group_tokens(group, sizes))
                        tokens, least = sum(each.whole for each in sizes_of_groups), max(each.least for each in sizes_of_groups)
                        yield _Tried(max(least, min(tokens, max_tokens or tokens)), tokens, split, shown)

    def largest() -> _Tried | None:
        return max(batches(), key=lambda batch: batch[:2], default=None)

    if (batch := run_on_rank0(world, largest, barrier)) is not None:
        parts = guarded(collator, max_tokens)(batch.groups)
        score_batches(forward, [parts], world, f"trying the largest evaluation batch, of {batch.split},", batching.remedy)
        forwards = 0 if isinstance(parts, DataError) else len(parts)
        size = f"{len(batch.groups)} groups, {batch.tokens} tokens in {forwards} forward pass{'es' * (forwards != 1)}"
        world.say(f"the largest evaluation batch, of {batch.split}, fits: {size}")
