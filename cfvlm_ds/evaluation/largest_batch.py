"""Rehearsal of the largest evaluation batch before training, to detect insufficient memory or invalid data early."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from cfvlm_ds.batching.batch import BLANK
from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.core.distributed import ProgressBarrier, World, run_on_rank0
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.ranks import cores_per_rank
from cfvlm_ds.data.picture_index import sizes_of
from cfvlm_ds.evaluation.scoring import Batching, Forward, guarded, score_batches, seen_as

Splits = Mapping[str, Sequence[CounterfactualGroup]]


class _Tried(NamedTuple):
    """An evaluation batch: token count of its largest forward pass, total token count, split name, and groups (with their own images or
    a blank image).
    """

    largest: int
    tokens: int
    split: str
    groups: Sequence[CounterfactualGroup]


def rehearse(forward: Forward, collator: Collator, splits: Splits, world: World, batching: Batching) -> None:
    """On every rank, score the evaluation batch with the largest forward pass (in case of a tie, the batch with the most tokens in total).

    A forward pass exceeds the limit on tokens only if a single text with its prompt and image is longer than that. All batches that
    ``score_groups`` will run are considered. Raises the same errors as ``score_groups``, on all ranks.
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
