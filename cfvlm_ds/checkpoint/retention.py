"""Which checkpoints stay after a newer one is written."""

from __future__ import annotations

import shutil
from pathlib import Path

from cfvlm_ds.checkpoint.finding import by_step, step_of
from cfvlm_ds.checkpoint.state import TrainState


def delete_older(output_dir: Path, state: TrainState, keep: int, keep_every: int) -> None:
    """Delete checkpoints of ``output_dir`` up to the step of ``state``. The newest ``keep`` stay (0 keeps all), the best one, and those
    whose step is a multiple of ``keep_every`` (0 for none)."""
    older = [path for path in by_step(output_dir) if step_of(path) <= state.step]
    for path in older[keep:] if keep else ():
        if not (keep_every and step_of(path) % keep_every == 0) and not (state.best and step_of(path) == state.best["step"]):
            shutil.rmtree(path, ignore_errors=True)
