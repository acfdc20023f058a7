"""Checkpoint schedule of a run: due times, saving and its cost."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfvlm_ds import checkpoint
from cfvlm_ds.checkpoint import TrainState
from cfvlm_ds.core.config import TrainConfig
from cfvlm_ds.core.distributed import World


@dataclass
class Checkpoints:
    """Writer of a run's checkpoints. Its clock starts at construction."""

    engine: Any
    state: TrainState
    run_dir: Path
    world: World
    train: TrainConfig
    saved_at: float = field(default_factory=time.monotonic)

    def due(self) -> bool:
        """Return True when train.save_minutes have passed since the last checkpoint."""
        return 0 < self.train.save_minutes * 60 <= time.monotonic() - self.saved_at

    def save(self, needed: bool) -> dict[str, float]:
        """Save a checkpoint and return its cost as metrics: seconds, and their share of the time since the last checkpoint.

        A failure raises SaveError if the checkpoint is ``needed``; otherwise it prints a warning.
        """
        started, train = time.monotonic(), self.train
        failed = False
        try:
            checkpoint.save(self.engine, self.state, self.run_dir, self.world, train.save_total_limit, train.save_keep_every)
        except checkpoint.SaveError as error:
            if needed:
                raise
            failed = True
            self.world.say(f"warning: {error}; training goes on and the next checkpoint is tried in its turn")
        ended = time.monotonic()
        share = (ended - started) / (ended - self.saved_at)
        self.saved_at = ended
        return {"checkpoint/seconds": ended - started, "checkpoint/share": share, "checkpoint/failed": float(failed)}
