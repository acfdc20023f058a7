"""The largest evaluation batch runs once before training: what does not fit or cannot be read is known then and not hours later."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from cfvlm_ds.batching.batch import BLANK
from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.core.distributed import Patience, World, broadcast_object, cores_per_rank
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.data.picture_index import sizes_of
from cfvlm_ds.evaluation.scoring import Forward, batch_indices, guarded, other_images, score_batches, seen_as

Splits = Mapping[str, Sequence[CounterfactualGroup]]


class _Tried(NamedTuple):
    """An evaluation batch: its split, its groups as they are shown, its tokens, and the tokens of its largest indivisible part."""

    split: str
    groups: Sequence[CounterfactualGroup]
    tokens: int
    least: int


def rehearse(
    forward: Forward,
    collator: Collator,
    splits: Splits,
    world: World,
    batch_size: int,
    max_tokens: int | None,
    remedy: str,
    *,
    shuffled: bool = False,
) -> None:
    """Score, on every rank, the batch with the most tokens and, where ``max_tokens`` divides batches, the one with the largest part that is
    still over it. All batches that ``score_groups`` will run are considered; ``shuffled`` as there.

    Raises what ``score_groups`` raises, on all ranks.
    """
    found: list[_Tried] | str = []
    patience = Patience(world)  # rank 0 may have headers of very many pictures to read
    if world.is_main:
        try:
            options = world.size, batch_size, shuffled, patience.alive
            largest = _largest(_batches(collator.scoring_everything(), splits, *options), max_tokens)
            found = [batch._replace(groups=list(batch.groups)) for batch in largest]
        except DataError as error:
            found = str(error)
    patience.meet()
    found = broadcast_object(found) if world.size > 1 else found
    if isinstance(found, str):
        raise DataError(found)
    collate = guarded(collator.scoring_everything(), max_tokens)
    for split, groups, tokens, _ in found:
        parts = collate(groups)
        score_batches(forward, [parts], world, f"trying the largest evaluation batch, of {split},", remedy)
        forwards = 0 if isinstance(parts, DataError) else len(parts)
        world.say(f"the largest evaluation batch, of {split}, fits: {len(groups)} groups, {tokens} tokens in {forwards} forwards")


def _batches(
    collator: Collator, splits: Splits, world_size: int, batch_size: int, shuffled: bool, alive: Callable[[], object]
) -> Iterator[_Tried]:
    """Every batch of the evaluation of all splits."""
    with ThreadPoolExecutor(cores_per_rank()) as pool:
        for split, groups in splits.items():
            for view in seen_as(groups, other_images(groups) if shuffled else None):
                for start in range(0, len(groups), batch_size):
                    number, rank = divmod(start // batch_size, world_size)
                    indices = batch_indices(len(groups), batch_size, rank, world_size, number)
                    shown = view[indices[0] : indices[-1] + 1]
                    pictures = [each for group in shown for image in group.images for each in image if each.parent != BLANK.parent]
                    sizes = sizes_of(pictures, collator.files.checked, collator.files.max_pixels, pool)
                    of_batch = []
                    for group in shown:
                        alive()
                        of_batch += collator.tree_tokens(group, sizes)
                    tokens, least = sum(tree.whole for tree in of_batch), max(tree.least for tree in of_batch)
                    yield _Tried(split, shown, tokens, least)


def _largest(batches: Iterator[_Tried], max_tokens: int | None) -> list[_Tried]:
    most: _Tried | None = None
    over: _Tried | None = None
    for batch in batches:
        most = batch if most is None or batch.tokens > most.tokens else most
        over = batch if over is None or batch.least > over.least else over
    if most is None or over is None:
        return []
    return [most, *[over] * (max_tokens is not None and over is not most and over.least > max_tokens)]
