"""The record of what defines a run, written for people and for MLflow."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from cfvlm_ds import checkpoint
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.distributed import World, broadcast_object
from cfvlm_ds.core.errors import StorageError, unwritten
from cfvlm_ds.core.files import update
from cfvlm_ds.core.secrets import masked
from cfvlm_ds.core.versions import git_revision, version
from cfvlm_ds.models import Scorer, load_config, parameter_counts
from cfvlm_ds.tracking import open_tracker


def write_record(config: RunConfig, scorer: Scorer, ds_config: Mapping[str, Any], world: World) -> list[Path]:
    """config.yaml, ds_config.json and environment.json in the run folder (rank 0). Raises StorageError on all ranks when it cannot."""
    run_dir = Path(config.train.output_dir)
    counts = parameter_counts(scorer.model, scorer.family)
    environment = {
        "git_revision": git_revision(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("torch", "transformers", "deepspeed", "mlflow", "cfvlm-ds")},
        "world_size": world.size,
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else platform.processor() or platform.machine(),
        "parameters": {name: {"total": total, "trainable": trains} for name, (total, trains) in counts.items()},
    }
    contents = {
        run_dir / "config.yaml": yaml.safe_dump(masked(config.resolved), sort_keys=False),
        run_dir / "ds_config.json": json.dumps(masked(ds_config), indent=2),
        run_dir / "environment.json": json.dumps(environment, indent=2),
    }
    problem = None
    for path, text in contents.items() if world.is_main else ():
        try:
            update(path, text.encode())
        except OSError as error:
            problem = problem or unwritten(path, error)
    if problem := broadcast_object(problem):
        raise StorageError(f"{problem}; make room, and start again")
    world.say(f"objective: {config.loss}")
    world.say("parameters: " + ", ".join(f"{name} {total:,} ({trains:,} trainable)" for name, (total, trains) in counts.items()))
    return list(contents)


def tracker_of(config: RunConfig, world: World, found: Path | None) -> Any:
    """The run's tracker, continuing at the step of the checkpoint ``found``."""
    # Killed before its first checkpoint, a run starts over at step 0 and is still the same run.
    afresh = {"step": None if config.train.resume == "never" else 0}
    written: dict[str, Any] = afresh if found is None else checkpoint.description(found)
    run_dir = Path(config.train.output_dir)
    return open_tracker(
        enabled=world.is_main,
        run_dir=run_dir,
        experiment=config.tracking.experiment,
        run_name=config.tracking.run_name or run_dir.name,
        params=config.resolved,
        tags={
            "git_revision": git_revision(),
            "world_size": str(world.size),
            "model_type": load_config(config.model.name_or_path).model_type,
        },
        run_id=written.get("run_id"),
        resume_step=written["step"],
        mlflow=config.tracking.enabled,
    )
