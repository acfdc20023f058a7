"""What a run folder, or a folder of adapters, says of its model: so that a command that takes a model takes these too."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfvlm_ds.config import ConfigError, ModelConfig
from cfvlm_ds.untrusted import own_file

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_ALIASES = 20  # a list of nine aliases of a list of nine aliases, and so on, fills any memory


@dataclass(frozen=True)
class NamedModel:
    """A model folder or hub name, the folder of adapters that belong to it or None, and what the run that made it says of its model."""

    name_or_path: str
    adapter: Path | None = None
    recorded: ModelConfig = field(default_factory=ModelConfig)


def named_model(name: str) -> NamedModel:
    """What ``name`` means: a run folder its export, or else its adapters; adapters the model they were trained on; anything else itself.

    Raises ConfigError for a run folder that has neither, and for adapters that do not say what they belong to.
    """
    folder = Path(name)
    if not folder.is_dir() or (folder / "config.json").is_file():
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
    return NamedModel(name)


def recorded_model(run_dir: Path) -> ModelConfig:
    """The model of a run, from the configuration in its folder. Raises ConfigError where that is none."""
    import yaml
    from jsonargparse import ArgumentParser

    path = run_dir / "config.yaml"
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ModelConfig, "model")
    try:
        text = path.read_text(encoding="utf-8")
        if (aliases := sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text))) > _ALIASES:
            raise ValueError(f"{aliases} YAML aliases")
        model: ModelConfig = parser.instantiate(parser.parse_object({"model": yaml.safe_load(text)["model"]})).model
        if not model.name_or_path:
            raise ValueError("model.name_or_path is empty")
        return model
    except Exception as error:  # the parser and YAML raise nearly anything on what is no configuration
        raise ConfigError(f"{path} is not a run's configuration ({type(error).__name__}: {error}); restore it") from error


def base_of(folder: Path) -> str:
    """The model that adapters in peft's format were trained on. Raises ConfigError where the folder holds no such adapters."""
    remedy = "name a folder that `cfvlm-ds export --adapter` wrote"
    try:
        described: Any = json.loads(own_file(folder, ADAPTER, folder).read_text(encoding="utf-8"))
        kind, base = described["peft_type"], described["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{folder / ADAPTER} describes no adapters ({type(error).__name__}: {error}); {remedy}") from error
    if kind != "LORA" or not isinstance(base, str) or not base:
        raise ConfigError(f"{folder / ADAPTER}: adapters of kind {kind!r} on {base!r} are not known; {remedy}")
    if not own_file(folder, ADAPTER_WEIGHTS, folder).is_file():
        raise ConfigError(f"{folder} has no {ADAPTER_WEIGHTS}; {remedy}")
    return base
