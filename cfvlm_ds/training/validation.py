"""Validation of a run's options, its DeepSpeed JSON, the model's configuration and the installed libraries.

Every rank validates them before it opens pictures, loads weights, or creates folders or an MLflow run.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from cfvlm_ds import engine
from cfvlm_ds.core.config import BuildConfig, RunConfig
from cfvlm_ds.core.data_config import is_hub
from cfvlm_ds.core.distributed import World
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.reading import counted_from, is_there
from cfvlm_ds.data import open_groups
from cfvlm_ds.data.manifest import known_format
from cfvlm_ds.models import check_balanced, check_model, load_config, only_adapters_train
from cfvlm_ds.objectives import batch_terms, required_cells
from cfvlm_ds.tracking.hooks import hook_class
from cfvlm_ds.training.benchmarks import chosen_of

_UNKNOWN_WIDTH = 64


def validate(config: RunConfig, world: World | None) -> None:
    """Raise ConfigError or DataError for settings that would make the run fail later.

    ``world`` is None in a dry run, which needs no data and can run on another machine. Files that the ``build`` section will write need not
    exist yet.
    """
    raw, model = engine.read_json(config.deepspeed), config.model
    if not model.name_or_path:
        raise ConfigError("model.name_or_path is not set; give a model folder or a hub name such as org/name")
    _refuse_beside_yaml(config, with_data=world is not None)
    model_exists = os.path.exists(model.name_or_path) or not (config.build.base and _is_below(model.name_or_path, config.build.base))
    check_model(model, raw.get("zero_optimization", {}).get("stage") == 3, model_exists, weights=world is not None)
    if config.train.router_balance and model_exists:
        check_balanced(load_config(model.name_or_path).model_type)
    device = torch.device("cpu") if world is None else world.device
    size, width = 1 if world is None else world.size, engine.hidden_size(config) if model_exists else _UNKNOWN_WIDTH
    resolved = engine.resolve(raw, config, size, device, width, max(1, config.train.max_steps))
    engine.validate(config, resolved, size, None if world is None else device)
    if world is not None:
        if (resume := config.train.resume) not in ("auto", "never", "restart") and not os.path.isdir(resume):
            raise ConfigError(f"train.resume {resume!r} is not a folder; give auto, never, restart or the path of a checkpoint")
        for name in config.tracking.also or ():
            hook_class(name)
        _check_data(config)
        _check_step(config, size)


def _refuse_beside_yaml(config: RunConfig, with_data: bool) -> None:
    """Raise ConfigError if a path does not exist relative to the working directory but exists relative to the YAML file's folder."""
    data, paths, rounds = config.data, [config.model.name_or_path], config.train.rounds
    sets = [
        *data.train_sets.values(),
        *data.evaluation_sets.values(),
        *data.benchmark_sets.values(),
        *([rounds.pictures] if rounds else []),
    ]
    for data_set in sets if with_data else ():
        roots = [data_set.root] if isinstance(data_set.root, str) else data_set.root or []
        paths += [data_set.path, *roots, getattr(data_set, "scores", None) or ""]
    for path in paths if config.build == BuildConfig() else ():  # ``build`` may still write the path
        if path and not is_there(Path(path)) and is_there(beside := Path(config.yaml_folder, path)):
            raise ConfigError(f"{path} does not exist{counted_from(path)}; use {beside}, which exists next to the YAML file")


def _check_step(config: RunConfig, ranks: int) -> None:
    train, terms = config.train, batch_terms(config.objective)
    if terms and train.hard_negatives is not None:
        raise ConfigError(
            f"{next(iter(terms))} draws texts of other groups before anything is scored, but train.hard_negatives leaves texts out after "
            "scoring; use only one of them"
        )
    if train.hard_negatives is not None and required_cells(config.objective) in ("anchor", "matched"):
        raise ConfigError(
            f"train.hard_negatives keeps the false cells with the highest scores, but {', '.join(config.objective)} scores no text on an "
            "image that it is false of; add a term that does, such as csd with mode cross, or leave the option unset"
        )
    compared = [name for name, term in config.objective.items() if term.divergence is not None]
    if compared and config.data.max_tokens_per_forward is not None:
        raise ConfigError(
            f"{compared[0]} compares the distributions of a text on two images, but data.max_tokens_per_forward may divide these between "
            "forwards; set data.max_tokens_per_micro_batch instead"
        )
    if terms and config.data.max_tokens_per_micro_batch is None:
        groups = train.micro_batch_size * train.gradient_accumulation_steps * ranks
        if groups < 2:
            raise ConfigError(
                f"{next(iter(terms))} compares images with texts of other groups, but an optimizer step has only one group; raise "
                "train.per_device_train_batch_size or train.gradient_accumulation_steps"
            )


def _check_data(config: RunConfig) -> None:
    data, built = config.data, [] if config.build.habits is None else [config.build.habits.out_dir]
    if not data.train:
        raise ConfigError("data.train is not set; give the manifest of your training groups")
    for name, source in data.train_sets.items():
        if unknown := [term for term in source.objectives or () if term not in config.objective]:
            known = ", ".join(config.objective)
            raise ConfigError(f"data.train: source {name!r} lists the objective {unknown[0]!r}, but this run has only {known}")
    if data.is_mixture and data.scores is not None:
        raise ConfigError("data.scores belongs to one manifest, but data.train is a list; set scores in the sources of that list instead")
    for each in (*data.train_sets.values(), *data.evaluation_sets.values()):
        exists = is_hub(each.path) or is_there(Path(each.path)) or any(_is_below(each.path, folder) for folder in built)
        known_format(each.path, each.format or data.format)  # raises, and suggests similar names
        if not exists:
            open_groups(each.path, each.root, each.format or data.format)  # raises, and suggests similar names
    for name, each in data.benchmark_sets.items():
        if not (root := chosen_of(name, each).root).is_dir() and not any(_is_below(str(root), folder) for folder in built):
            raise ConfigError(
                f"data.evaluation.{name}: {root}: no such folder; put the benchmark's files there, as described in docs/benchmarks"
            )
    for source in data.train_sets.values() if scores_needed(config) else ():
        if source.scores is not None and not os.path.exists(source.scores):
            raise ConfigError(f"{source.scores}: no such scores file; write it with `cfvlm-ds score`, or correct the option scores")


def _is_below(path: str, folder: str) -> bool:
    return Path(path).absolute().is_relative_to(Path(folder).absolute())


def scores_needed(config: RunConfig) -> bool:
    """Return True if an objective needs stored scores for the training groups.

    A run that trains only adapters computes reference scores itself, but not prior scores. Raises ConfigError if scores are needed but no
    file is set.
    """
    without = [name for name, source in config.data.train_sets.items() if source.scores is None]
    needed = False
    for name, source in config.data.train_sets.items():
        terms = {key: term for key, term in config.objective.items() if source.objectives is None or key in source.objectives}
        prior, reference = any(term.needs_prior for term in terms.values()), any(term.needs_reference for term in terms.values())
        if not (prior or reference) or (len(without) == len(config.data.train_sets) and not prior and only_adapters_train(config.model)):
            continue
        needed = True
        if source.scores is None:
            names = ", ".join(key for key, term in terms.items() if term.needs_prior or term.needs_reference)
            raise ConfigError(
                f"{names}: an objective needs stored scores; write them with `cfvlm-ds score` and set data.scores, or in a list of sources "
                f"the option scores of {name!r}"
            )
    return needed
