"""Run folders: the names of their files, and the model and options that they record. Commands that take a model also take a run folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from cfvlm_ds.core.config import SECTIONS, ModelConfig
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.reading import MALFORMED, counted_from, read_json
from cfvlm_ds.core.strict import build, read_options
from cfvlm_ds.core.untrusted import refuse_link

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

FILES = (
    "config.yaml", "ds_config.json", "environment.json", "data.json",
    "metrics.jsonl", ".mlflow_delivery.json",
    "mlflow.db*", "finished.json", "resume_changes.jsonl", "skipped.json", "nonfinite.jsonl",
    "results.md", "results.html", "results.json", "before_after.json", "samples.jsonl",
    "learning_curves.png", "run.lock*", "zero_to_*.py",
    "*.tmp",
)  # fmt: skip
FOLDERS = (
    "mlartifacts", "scores", "baseline", "samples", "worst", "tensorboard", "benchmarks", "heartbeat", "prepared", "export", "adapter",
)  # fmt: skip
"""Folders that a run writes into its run folder, except checkpoints, whose names contain the step."""
BASELINE = "baseline"
"""Folder for the accuracies before the first step, with one file per evaluation set."""


@dataclass(frozen=True)
class NamedModel:
    """A model (folder or hub name), the folder of its adapters (or None), and the model options recorded by its run."""

    name_or_path: str
    adapter: Path | None = None
    recorded: ModelConfig = field(default_factory=ModelConfig)


def named_model(name: str) -> NamedModel:
    """Resolve a model name. A run folder resolves to its export, or else to its adapters. An adapter folder resolves to the adapters and
    their base model. Any other name is used as it is.

    Raises ConfigError for a run folder with neither an export nor adapters, for a folder of rounds, and for adapters that do not name their
    model.
    """
    folder = Path(name)
    if not os.path.isdir(folder) or (folder / "config.json").is_file():
        return NamedModel(name)
    if (folder / "config.yaml").is_file():
        recorded = recorded_model(folder)
        if (folder / "export" / "config.json").is_file():
            return NamedModel(str(folder / "export"), recorded=recorded)
        if (folder / "adapter" / ADAPTER).is_file():
            return NamedModel(base_of(folder / "adapter"), folder / "adapter", recorded)
        raise ConfigError(f"{folder} is a run folder without an export; write one with `cfvlm-ds export {folder}`")
    if (folder / ADAPTER).is_file():
        return NamedModel(base_of(folder), folder)
    if rounds := sorted(folder.glob("round-*/config.yaml"), key=lambda file: file.stat().st_mtime):
        raise ConfigError(f"{folder} contains a run for each round (train.rounds); name one of them, such as {rounds[-1].parent}")
    return NamedModel(name)


def refuse_absent(name_or_path: str, where: str = "") -> None:
    """Raise ConfigError for a name that is neither a folder nor a possible hub name."""
    if os.path.isfile(name_or_path):
        raise ConfigError(f"{where}model.name_or_path {name_or_path!r} is a file; give a model folder or a hub name such as org/name")
    if not os.path.exists(name_or_path) and (name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~"))):
        problem = f"{where}model.name_or_path {name_or_path!r} does not exist; give a model folder or a hub name such as org/name"
        raise ConfigError(f"{problem}{counted_from(name_or_path)}")


def refuse_foreign_entries(run_dir: Path, options: Any = None) -> None:
    """Raise ConfigError if a run folder has entries that the run would overwrite, or that would break the run.

    Refused entries are:

    - a link, a pipe or a folder where the run writes a file, or a link or a file where it writes a folder;
    - a config.yaml that was not written by a run, such as the user's own --config file;
    - in a folder without a run: anything except files of a run or its launcher, hidden files, and paths in the run's ``options``.
    """
    remedy = "remove it, or choose another train.output_dir"
    entries = sorted(run_dir.iterdir()) if os.path.isdir(run_dir) else []
    for path in entries:
        kinds = (("file", FILES, path.is_file), ("folder", FOLDERS, path.is_dir))
        for kind, names, right in kinds:
            if any(fnmatch(path.name, name) for name in names):
                refuse_link(path, remedy)
                if not right():
                    raise ConfigError(f"{path} is not a {kind}, but a run writes a {kind} of that name; {remedy}")
    if any(run_dir.glob("checkpoint-*")):
        return
    if (run_dir / "config.yaml").is_file():
        try:
            is_complete = {*SECTIONS, "objective", "deepspeed"} <= recorded_options(run_dir).keys()
        except ConfigError:
            is_complete = False
        if not is_complete:
            raise ConfigError(
                f"{run_dir / 'config.yaml'} was not written by a run (it lacks options) and would be overwritten; move it away, or "
                "choose another train.output_dir"
            )
        return
    named = {path.parts[len(run_dir.absolute().parts)] for path in _paths(options) if run_dir.absolute() in path.parents}
    own = (*FILES, *FOLDERS, "slurm", "*.log", ".*")
    if foreign := [path.name for path in entries if path.name not in named and not any(fnmatch(path.name, name) for name in own)]:
        more = f" and {len(foreign) - 1} more" * (len(foreign) > 1)
        raise ConfigError(f"{run_dir} contains {foreign[0]!r}{more}, not written by a run; choose a new folder as train.output_dir")


def _paths(options: Any) -> Iterator[Path]:
    if isinstance(options, str):
        yield Path(options).absolute()
    elif isinstance(options, (Mapping, list)):
        for value in options.values() if isinstance(options, Mapping) else options:
            yield from _paths(value)


def recorded_options(run_dir: Path) -> dict[str, Any]:
    """Read the config.yaml of a run folder. Raises ConfigError if it holds no configuration."""
    return read_options(run_dir / "config.yaml", "it should be the configuration of a run; restore it")


def recorded_model(run_dir: Path) -> ModelConfig:
    """Read the model options of a run. Raises ConfigError if its folder holds no valid configuration."""
    options = recorded_options(run_dir)
    try:
        model: ModelConfig = build(ModelConfig, options["model"], "model")
        if not model.name_or_path:
            raise ValueError("model.name_or_path is empty")
        return model
    except MALFORMED as error:
        problem = f"{run_dir / 'config.yaml'} is not a run's configuration ({type(error).__name__}: {error}); restore it"
        raise ConfigError(problem) from error


def base_of(folder: Path) -> str:
    """Return the name or path of the base model of the peft adapters in ``folder``. Raises ConfigError if there are none or they are not
    supported.
    """
    remedy = "name a folder that `cfvlm-ds export --adapter` wrote"
    try:
        settings: Any = read_json(folder / ADAPTER)
        kind, base = settings["peft_type"], settings["base_model_name_or_path"]
    except MALFORMED as error:
        raise ConfigError(f"{folder / ADAPTER} does not describe adapters ({type(error).__name__}: {error}); {remedy}") from error
    if kind != "LORA" or not isinstance(base, str) or not base:
        raise ConfigError(f"{folder / ADAPTER}: adapters of kind {kind!r} on {base!r} are not supported; {remedy}")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ConfigError(f"{folder} has no {ADAPTER_WEIGHTS}; {remedy}")
    return base
