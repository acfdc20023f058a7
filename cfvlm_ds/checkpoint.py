"""Checkpoints: DeepSpeed's shards plus the state of the loop, complete or invisible.

A checkpoint is written as ``checkpoint-STEP.partial``, its files are listed with their sizes in ``complete.json``, and one rename makes it
``checkpoint-STEP``. A folder without a matching list is never resumed from.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cfvlm_ds.config import ConfigError
from cfvlm_ds.distributed import World, broadcast_object

_COMPLETE = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass
class TrainState:
    """Where the loop is: what a checkpoint holds besides weights, optimizer and schedule.

    ``step`` counts finished optimizer steps; ``sampler`` is GroupSampler's state; ``data`` the content hash of the training groups;
    ``run_id`` the MLflow run; ``baseline_lp`` the factual log-likelihood per token at the start, against which displacement is measured.
    """

    step: int = 0
    sampler: dict[str, Any] | None = None
    data: str | None = None
    run_id: str | None = None
    baseline_lp: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in vars(self):
            setattr(self, name, state[name])


def save(engine: Any, state: TrainState, output_dir: Path, world: World, keep: int) -> Path:
    """Write ``output_dir/checkpoint-STEP`` and remove all but the newest ``keep``. Every rank calls it; OSError on a full disk."""
    final = output_dir / f"checkpoint-{state.step}"
    partial = final.with_name(final.name + ".partial")
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    rng = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    engine.save_checkpoint(str(output_dir), tag=partial.name, client_state={"loop": state.state_dict(), "rng": rng}, save_latest=False)
    dist.barrier()
    if world.is_main:
        sizes = {str(p.relative_to(partial)): p.stat().st_size for p in sorted(partial.rglob("*")) if p.is_file()}
        description = {"step": state.step, "world_size": world.size, "run_id": state.run_id, "files": sizes}
        (partial / _COMPLETE).write_text(json.dumps(description, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for old in _by_step(output_dir)[keep:] if keep > 0 else []:
            shutil.rmtree(old)
    dist.barrier()
    return final


def find(output_dir: Path, resume: str, world: World) -> Path | None:
    """The checkpoint to continue from, decided by rank 0: the newest complete one (``auto``), the named one, or None.

    Says which incomplete ones were passed over. Raises ConfigError when the named one is incomplete, when ``never`` meets a folder that has
    checkpoints, or when the checkpoint was written by another number of ranks.
    """
    found: Path | str | None = None
    if world.is_main:
        try:
            found = _find(output_dir, resume, world)
        except ConfigError as error:
            found = str(error)
    found = broadcast_object(found)
    if isinstance(found, str):
        raise ConfigError(found)
    return found


def newest(output_dir: Path) -> Path:
    """The newest complete checkpoint of a run folder. Raises ConfigError when there is none."""
    for path in _by_step(output_dir):
        if incomplete(path) is None:
            return path
    raise ConfigError(f"{output_dir} holds no complete checkpoint; train first, or name a checkpoint")


def _find(output_dir: Path, resume: str, world: World) -> Path | None:
    candidates = _by_step(output_dir)
    if resume == "never":
        if candidates:
            raise ConfigError(f"{output_dir} already holds {candidates[0].name}; use train.resume=auto or another output_dir")
        return None
    if resume != "auto":
        candidates = [Path(resume)]
    for path in candidates:
        defect = incomplete(path)
        if defect is None:
            ranks = description(path)["world_size"]
            if ranks != world.size:
                raise ConfigError(f"{path} was written by {ranks} ranks and this run has {world.size}; start {ranks} ranks")
            return path
        if resume != "auto":
            raise ConfigError(f"train.resume={path}: {defect}; name a complete checkpoint or use auto")
        world.say(f"passed over {path}: {defect}")
    return None


def description(path: Path) -> dict[str, Any]:
    """What a complete checkpoint says of itself: ``step``, ``world_size``, ``run_id`` and ``files`` with their sizes in bytes."""
    return json.loads((path / _COMPLETE).read_text())


def incomplete(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when every listed file is there in full."""
    try:
        listed = json.loads((path / _COMPLETE).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{_COMPLETE} is missing or broken, so the checkpoint was never finished"
    for name, size in listed.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def load(engine: Any, path: Path, state: TrainState) -> None:
    """Restore weights, optimizer, schedule, random state and ``state`` from a complete checkpoint of the same number of ranks."""
    _, client = engine.load_checkpoint(str(path.parent), tag=path.name)
    if client is None:
        raise ConfigError(f"{path}: DeepSpeed could not load it; name another checkpoint with train.resume")
    state.load_state_dict(client["loop"])
    torch.set_rng_state(client["rng"]["torch"])
    random.setstate(client["rng"]["python"])
    if torch.cuda.is_available() and "cuda" in client["rng"]:
        torch.cuda.set_rng_state(client["rng"]["cuda"])


def _by_step(output_dir: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]
