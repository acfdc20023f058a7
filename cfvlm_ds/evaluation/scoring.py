"""Scoring groups with a model that may be spread over ranks: the same forward as in training, without gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cfvlm_ds.collate import Batch, Collator, blinded
from cfvlm_ds.data.scores import StoredScores
from cfvlm_ds.distributed import World, gather_objects
from cfvlm_ds.groups import CounterfactualGroup, DataError
from cfvlm_ds.stopping import shield_worker

Forward = Callable[..., Tensor]


@dataclass(frozen=True)
class GroupScores:
    """One group's full score matrix: ``logp`` [I, C] and ``blank`` [C] (the texts on a blank image), in nats."""

    logp: Tensor
    blank: Tensor

    def stored(self) -> StoredScores:
        """The same as plain numbers, for a scores file."""
        return StoredScores(tuple(map(tuple, self.logp.tolist())), tuple(self.blank.tolist()))


def guarded(collator: Collator) -> Callable[[Sequence[CounterfactualGroup]], Batch | DataError]:
    """The collator for a worker process: a DataError comes back as a value, because raised there it would lose its one clear sentence."""

    def collate(groups: Sequence[CounterfactualGroup]) -> Batch | DataError:
        try:
            return collator(groups)
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
) -> list[GroupScores]:
    """Every cell of every group, and every text on a blank image, in the order of ``groups``; the same list on every rank.

    ``forward`` is an engine or a Scorer in evaluation mode; ``batch_size`` counts groups per rank. Every rank runs the same number of
    forwards, as ZeRO-3 requires: the last ones may repeat a group, whose second result is dropped. Raises DataError as the collator does.
    """
    collator = collator.scoring_everything()
    rounds = -(-len(groups) // (batch_size * world.size))
    first = [(r * world.size + world.rank) * batch_size for r in range(rounds)]
    mine = [[min(start + j, len(groups) - 1) for j in range(batch_size)] for start in first]  # past the end the last group repeats
    results: dict[int, GroupScores] = {}
    started = spoken = time.monotonic()
    loaders: list[Any] = [
        DataLoader(
            list(view),  # type: ignore[arg-type]
            batch_sampler=mine,
            collate_fn=guarded(collator),
            num_workers=num_workers,
            worker_init_fn=shield_worker,
        )
        for view in (groups, [blinded(group) for group in groups])
    ]
    with torch.no_grad():
        for done, (indices, *batches) in enumerate(zip(mine, *loaders, strict=True), start=1):
            seen, blind = (_scored(forward, batch, world) for batch in batches)
            for j, index in enumerate(indices):
                size = (len(groups[index].images), len(groups[index].candidates))
                results[index] = GroupScores(seen[j, : size[0], : size[1]], blind[j, 0, : size[1]])
            if time.monotonic() - spoken > 10:
                spoken = time.monotonic()
                remaining = (spoken - started) / done * (rounds - done)
                world.say(f"{label}: {min(done * batch_size * world.size, len(groups))}/{len(groups)} groups, {remaining:.0f} s left")
    merged: dict[int, GroupScores] = {}
    for part in gather_objects(results, world):
        merged.update(part)
    return [merged[index] for index in range(len(groups))]


def _scored(forward: Forward, batch: Batch | DataError, world: World) -> Tensor:
    if isinstance(batch, DataError):
        raise batch
    batch = batch.to(world.device)
    return batch.scores(forward(**batch.model_inputs)).logp.cpu()
