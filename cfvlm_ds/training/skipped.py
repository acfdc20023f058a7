"""Handling of unreadable groups and non-finite steps, which a run can skip. Everything that is skipped is counted and recorded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cfvlm_ds.batching.batch import MicroBatch
from cfvlm_ds.core.config import TrainConfig
from cfvlm_ds.core.data_config import DataConfig
from cfvlm_ds.core.distributed import World, gather_objects
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.files import write_if_possible
from cfvlm_ds.core.journal import append

_MOST_IN_A_ROW = 10


@dataclass(frozen=True)
class SkippedGroups:
    """Records unreadable groups, with the reasons, in the run's state and in skipped.json.

    Args:
        skipped: group id -> reason. The mapping belongs to the run's state, and ``note`` adds to it.
    """

    data: DataConfig
    run_dir: Path
    skipped: dict[str, str]
    world: World

    def note(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Record the groups that were dropped from these micro-batches. All ranks must call this if any rank has dropped groups.

        Raises DataError on all ranks if data.on_error is ``error``, or if more than data.max_skipped groups have been dropped.
        """
        mine = [entry for micro_batch in micro_batches for entry in micro_batch.dropped]
        dropped = dict(entry for entries in gather_objects(mine, self.world) for entry in entries)
        if self.data.on_error == "error":
            first, *more = dropped.values()
            raise DataError(first + (f" ({len(more)} more groups of this step cannot be read)" if more else ""))
        self.skipped.update(dropped)
        if len(self.skipped) > self.data.max_skipped:
            raise DataError(
                f"{len(self.skipped)} groups cannot be read, more than data.max_skipped ({self.data.max_skipped}); for example, "
                f"{next(iter(dropped.values()))}"
            )
        for name, why in dropped.items():
            self.world.say(f"warning: group {name!r} is left out: {why}")
        if self.world.is_main:
            write_if_possible(self.run_dir / "skipped.json", json.dumps(self.skipped, indent=1), self.world.say)


@dataclass
class NonfiniteSteps:
    """Records steps with a non-finite loss or gradient in nonfinite.jsonl."""

    train: TrainConfig
    run_dir: Path
    world: World
    in_a_row: int = 0

    def finite(self) -> None:
        """Reset the count of consecutive non-finite steps."""
        self.in_a_row = 0

    def note(self, step: int, losses: Sequence[tuple[MicroBatch, Tensor]], what: str, applied: bool) -> None:
        """Record a non-finite step with its groups. Every rank must call this. ``what`` is "loss" or "gradient".

        For a loss, only the groups in micro-batches with a non-finite loss are listed. A gradient is known only as the sum over all ranks,
        so all groups of the step are listed. Raises FloatingPointError if train.on_nonfinite is ``stop``, if the weights have already been
        updated (``applied``), or if too many steps in a row are not finite.
        """
        file = self.run_dir / "nonfinite.jsonl"
        mine = [name for each, loss in losses if what == "gradient" or not torch.isfinite(loss) for name in each.layout.ids]
        by_rank = {rank: names for rank, names in enumerate(gather_objects(mine, self.world)) if names}
        self.in_a_row += 1
        if self.world.is_main:
            append(file, json.dumps({"step": step, "what": what, "groups": by_rank}), self.world.say)
        shown = "; ".join(f"rank {rank}: {', '.join(names[:8])}{', ...' * (len(names) > 8)}" for rank, names in by_rank.items())
        message = f"the {what} is not finite at step {step}; its groups: {shown}; the full list is in {file}"
        if self.train.on_nonfinite == "stop" or applied:
            raise FloatingPointError(message)
        if self.in_a_row > _MOST_IN_A_ROW:
            raise FloatingPointError(f"{message}; this is the {self.in_a_row}th such step in a row, and a lower learning rate may help")
        self.world.say(f"warning: {message}; the step is skipped on all ranks")
