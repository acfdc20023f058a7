"""The record of a run: configuration, environment and data sets, written to files in the run folder and to MLflow."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cfvlm_ds import checkpoint
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.data_config import DataSet, is_hub
from cfvlm_ds.core.distributed import World, run_on_rank0
from cfvlm_ds.core.errors import writing
from cfvlm_ds.core.files import replace
from cfvlm_ds.core.reading import yaml_of
from cfvlm_ds.core.secrets import masked, without_secrets
from cfvlm_ds.core.versions import git_revision, version
from cfvlm_ds.data import GroupStore
from cfvlm_ds.data.identity import Identity, digest
from cfvlm_ds.models import Scorer, adapted_modules, load_config, parameter_counts
from cfvlm_ds.tracking import open_tracker
from cfvlm_ds.tracking.mlflow_delivery import INPUT, TABLES
from cfvlm_ds.training.read_data import RunData
from cfvlm_ds.training.results import CHANGES


def write_record(config: RunConfig, scorer: Scorer, ds_config: Mapping[str, Any], world: World, data: RunData) -> list[Path]:
    """On rank 0, write config.yaml, ds_config.json, environment.json and data.json into the run folder. Return their paths.

    Raises StorageError on all ranks if a file cannot be written.
    """
    run_dir = Path(config.train.output_dir)
    counts = parameter_counts(scorer.model, scorer.family)
    environment = {
        "git_revision": git_revision(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("torch", "transformers", "deepspeed", "mlflow", "cfvlm-ds")},
        "world_size": world.size,
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else _processor(),
        "vocabulary": scorer.model.config.get_text_config().vocab_size,
        "parameters": {name: {"total": total, "trainable": trains} for name, (total, trains) in counts.items()},
    }
    contents = {
        run_dir / "config.yaml": yaml_of(masked(config.resolved)),
        run_dir / "ds_config.json": json.dumps(masked(ds_config), indent=2),
        run_dir / "environment.json": json.dumps(environment, indent=2),
        run_dir / "data.json": json.dumps(described(config, data), indent=2),
    }

    def write() -> None:
        for path, text in contents.items():
            with writing(path, "free some space, and start again"):
                replace(path, text.encode())

    run_on_rank0(world, write)
    for warning in config.model.unused:
        world.say(warning)
    parts = " (align: NLL of the factual texts + NLL of the other true texts, in nats per token)" * ("align" in config.objective)
    world.say(f"objective: {config.loss}{parts}")
    world.say("parameters: " + ", ".join(f"{name} {total:,} ({trains:,} trainable)" for name, (total, trains) in counts.items()))
    return list(contents)


def _processor() -> str:
    """Return the processor's model name (available only on Linux) or, failing that, its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", cpuinfo.read_text(errors="replace"), re.MULTILINE) if cpuinfo.is_file() else []
    return names[0] if names else platform.machine()


def described(config: RunConfig, data: RunData) -> list[dict[str, Any]]:
    """Describe each data set of a run by name, source, size and digest, without reading it again. The entry of an evaluation set also
    describes the rows and pictures that it shares with training sets.
    """
    sets: list[tuple[str, str, DataSet, GroupStore, Identity, Mapping[str, str]]] = [
        (name, "training", data_set, *data.sources[name], {}) for name, data_set in config.data.train_sets.items()
    ]
    for name, data_set in config.data.evaluation_sets.items():
        sets.append((name, "evaluation", data_set, data.splits[name], data.identities[name], data.overlaps.get(name, {})))
    return [
        {
            "name": name,
            "context": context,
            "source": without_secrets(data_set.path if is_hub(data_set.path) else os.path.abspath(data_set.path)),
            "format": groups.format,
            "groups": len(groups),
            "digest": digest(identity),
            "overlaps": overlaps,
        }
        for name, context, data_set, groups, identity, overlaps in sets
    ]


def tracker_of(config: RunConfig, world: World, checkpoint_dir: Path | None, data: RunData) -> Any:
    """Open the run's tracker. If the run continues from ``checkpoint_dir``, the tracker continues at the checkpoint's step."""
    # A run that was killed before its first checkpoint starts again at step 0 and remains the same MLflow run.
    at_step_0 = {"step": None if config.train.resume == "never" else 0}
    description: dict[str, Any] = at_step_0 if checkpoint_dir is None else checkpoint.description(checkpoint_dir)
    run_dir, revision = Path(config.train.output_dir), git_revision()
    train, model = dict(config.resolved["train"]), dict(config.resolved["model"])
    if config.train.max_steps > 0:
        del train["num_train_epochs"]  # not used
    if not adapted_modules(config.model):
        del model["lora"]
    return open_tracker(
        enabled=world.is_main,
        run_dir=run_dir,
        experiment=config.tracking.experiment,
        run_name=config.tracking.run_name or run_dir.name,
        params={**config.resolved, "train": train, "model": model},
        tags={
            "git_revision": revision,
            "world_size": str(world.size),
            "model_type": load_config(config.model.name_or_path).model_type,
            "mlflow.source.name": os.path.abspath(sys.argv[0]),
            "mlflow.source.type": "LOCAL",
            TABLES: json.dumps([{"path": CHANGES, "type": "table"}]),
            "mlflow.source.git.commit": revision,
        },
        inputs=[{name: data_set[name] for name in INPUT} for data_set in described(config, data)],
        run_id=description.get("run_id"),
        resume_step=description["step"],
        mlflow=config.tracking.enabled,
        also=config.tracking.also or (),
    )
