"""A scorer on one rank or many: the first says what is scored, the others follow, and batches are the same whatever their number."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.core.distributed import World, broadcast_object
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.evaluation.scoring import GroupScores, score_groups


class _Quiet(World):
    """The step says how far it is; its batches do not."""

    def say(self, message: str) -> None:
        if message.startswith("warning: "):
            super().say(message)


class RankedScorer:
    """Scores groups in batches of ``batch_size``. Rank 0 calls it, and ``end`` when there is nothing more; the others ``follow``."""

    def __init__(self, forward: Any, collator: Collator, world: World, batch_size: int) -> None:
        self._forward, self._collator, self._batch_size = forward, collator, batch_size
        self.world = _Quiet(world.rank, world.size, world.local_rank, world.device)

    def __call__(self, groups: Sequence[CounterfactualGroup]) -> Sequence[GroupScores]:
        if self.world.size > 1:
            broadcast_object(list(groups))
        return self._scored(groups)

    def follow(self) -> None:
        """Take part in what rank 0 scores, until it ends."""
        while (groups := broadcast_object(None)) is not None:
            with suppress(DataError):  # rank 0 has it too, and says what comes of it
                self._scored(groups)

    def end(self) -> None:
        """Let the others go."""
        if self.world.size > 1:
            broadcast_object(None)

    def _scored(self, groups: Sequence[CounterfactualGroup]) -> Sequence[GroupScores]:
        remedy = f"lower --batch_size ({self._batch_size})"
        return score_groups(self._forward, self._collator, groups, self.world, self._batch_size, remedy=remedy)
