"""The largest evaluation batch runs once before training: what does not fit or cannot be read is known then, and not hours later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from cfvlm_ds.collate import Collator
from cfvlm_ds.config import cores_per_rank
from cfvlm_ds.data import image_size
from cfvlm_ds.distributed import World, broadcast_object
from cfvlm_ds.evaluation.scoring import Forward, batch_indices, guarded, score_batches
from cfvlm_ds.groups import CounterfactualGroup, DataError

Splits = Mapping[str, Sequence[CounterfactualGroup]]


def rehearse(
    forward: Forward, collator: Collator, splits: Splits, world: World, batch_size: int, max_tokens: int | None, remedy: str
) -> None:
    """Score the batch with the most tokens, and the one with the largest tree where ``max_tokens`` divides batches; on every rank.

    Raises what ``score_groups`` raises, on all ranks.
    """
    found: list[tuple[str, list[int], int]] | str = []
    if world.is_main:
        try:
            found = _largest(collator.scoring_everything(), splits, world.size, batch_size, max_tokens)
        except DataError as error:
            found = str(error)
    found = broadcast_object(found) if world.size > 1 else found
    if isinstance(found, str):
        raise DataError(found)
    collate = guarded(collator.scoring_everything(), max_tokens)
    for split, indices, tokens in found:
        parts = collate([splits[split][index] for index in indices])
        score_batches(forward, [parts], world, f"trying the largest evaluation batch, of {split},", remedy)
        forwards = 0 if isinstance(parts, DataError) else len(parts)
        world.say(f"the largest evaluation batch, of {split}, fits: {len(indices)} groups, {tokens} tokens in {forwards} forwards")


def _largest(
    collator: Collator, splits: Splits, world_size: int, batch_size: int, max_tokens: int | None
) -> list[tuple[str, list[int], int]]:
    """(split, groups of the batch, tokens) of at most two batches."""
    shown = {picture: None for groups in splits.values() for group in groups for pictures in group.images for picture in pictures}
    with ThreadPoolExecutor(cores_per_rank()) as pool:
        sizes = dict(zip(shown, pool.map(image_size, shown), strict=True))
    batches = []
    for split, groups in splits.items():
        trees = [collator.tree_tokens(group, sizes) for group in groups]
        for start in range(0, len(groups), batch_size):
            number, rank = divmod(start // batch_size, world_size)
            indices = batch_indices(len(groups), batch_size, rank, world_size, number)
            batches.append((sum(sum(trees[i]) for i in indices), max(max(trees[i]) for i in indices), split, indices))
    if not batches:
        return []
    chosen = [max(batches, key=lambda batch: batch[0])]
    if max_tokens is not None and (tree := max(batches, key=lambda batch: batch[1])) is not chosen[0] and tree[1] > max_tokens:
        chosen.append(tree)
    return [(split, indices, tokens) for tokens, _, split, indices in chosen]
