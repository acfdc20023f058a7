"""The record of what defines a run, written for people and for MLflow."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cfvlm_ds import checkpoint
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.data_config import DataSet, is_hub
from cfvlm_ds.core.distributed import World, broadcast_object
from cfvlm_ds.core.errors import StorageError, unwritten
from cfvlm_ds.core.files import update
from cfvlm_ds.core.reading import yaml_of
from cfvlm_ds.core.secrets import masked, without_secrets
from cfvlm_ds.core.versions import git_revision, version
from cfvlm_ds.data import GroupStore
from cfvlm_ds.data.identity import Identity, digest
from cfvlm_ds.models import Scorer, load_config, parameter_counts
from cfvlm_ds.tracking import open_tracker
from cfvlm_ds.tracking.delivery_record import INPUT
from cfvlm_ds.training.read_data import RunData


def write_record(config: RunConfig, scorer: Scorer, ds_config: Mapping[str, Any], world: World, data: RunData) -> list[Path]:
    """config.yaml, ds_config.json, environment.json and data.json in the run folder (rank 0). Raises StorageError on all ranks when it
    cannot."""
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
        run_dir / "config.yaml": yaml_of(masked(config.resolved)),
        run_dir / "ds_config.json": json.dumps(masked(ds_config), indent=2),
        run_dir / "environment.json": json.dumps(environment, indent=2),
        run_dir / "data.json": json.dumps(described(config, data), indent=2),
    }
    problem = None
    for path, text in contents.items() if world.is_main else ():
        try:
            update(path, text.encode())
        except OSError as error:
            problem = problem or unwritten(path, error)
    if problem := broadcast_object(problem):
        raise StorageError(f"{problem}; make room, and start again")
    for warning in config.model.unused:
        world.say(warning)
    world.say(f"objective: {config.loss}")
    world.say("parameters: " + ", ".join(f"{name} {total:,} ({trains:,} trainable)" for name, (total, trains) in counts.items()))
    return list(contents)


def described(config: RunConfig, data: RunData) -> list[dict[str, Any]]:
    """The data sets of a run, by which a person and MLflow recognise them: what is known of them anyway, without looking again."""
    sets: list[tuple[str, str, DataSet, Sequence[Any], Identity]] = [
        (name, "training", each, *data.sources[name]) for name, each in config.data.train_sets.items()
    ]
    for name, each in config.data.evaluation_sets.items():
        sets.append((name, "evaluation", each, data.splits[name], data.identities[name]))
    return [
        {
            "name": name,
            "context": context,
            "source": without_secrets(each.path if is_hub(each.path) else os.path.abspath(each.path)),
            "format": groups.format if isinstance(groups, GroupStore) else each.format,
            "groups": len(groups),
            "digest": digest(identity),
        }
        for name, context, each, groups, identity in sets
    ]


def tracker_of(config: RunConfig, world: World, found: Path | None, data: RunData) -> Any:
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
            **_source(),
        },
        inputs=[{name: each[name] for name in INPUT} for each in described(config, data)],
        run_id=written.get("run_id"),
        resume_step=written["step"],
        mlflow=config.tracking.enabled,
    )


def _source() -> dict[str, str]:
    """What was started, and of which revision, under the names by which MLflow shows them."""
    program = os.path.basename(sys.argv[0])
    name = "cfvlm-ds train" if program in ("__main__.py", "cfvlm-ds") else os.path.abspath(sys.argv[0])
    commit = {} if (revision := git_revision()) == "unknown" else {"mlflow.source.git.commit": revision}
    return {"mlflow.source.name": name, "mlflow.source.type": "LOCAL", **commit}
