"""Options that a run is given and that do nothing beside its others: known from the configuration alone, and said at its start."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

from cfvlm_ds import engine
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.models import MODULES

_IN_JSON = {"adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps"}


def unused(config: RunConfig) -> list[str]:
    """A warning of each: an option whose value is not its default, and which another option keeps from having an effect."""
    return [f"warning: {option} is not used: {why}" for option, why in _found(config)] + config.model.unused


def _found(config: RunConfig) -> Iterator[tuple[str, str]]:
    yield from _of_data(config)
    yield from _of_training(config)
    for name in MODULES:
        module = getattr(config.model, name)
        if module.tuning == "frozen" and module.learning_rate is not None:
            yield f"model.{name}.learning_rate", "the module is frozen; set its tuning to full or lora, or leave the rate out"
    if not config.tracking.enabled:
        for option in _given(config.tracking, "tracking", "experiment", "run_name"):
            yield option, "tracking.enabled is false; set it to true, or leave the option out"


def _of_data(config: RunConfig) -> Iterator[tuple[str, str]]:
    data, train = config.data, config.train
    for name, source in data.train_sets.items():
        terms = [term for key, term in config.objective.items() if source.objectives is None or key in source.objectives]
        if source.scores is not None and not any(term.needs_prior or term.needs_reference for term in terms):
            option = f"scores of the source {name!r} in data.train" if data.is_mixture else "data.scores"
            yield option, f"no term of the objective ({config.loss}) needs reference or prior scores; leave it out, or add such a term"
    if not data.is_mixture:
        for option in _given(data, "data", "stopping_strategy"):
            yield option, "data.train is no mixture of sources"
    if data.on_error == "error":
        for option in _given(data, "data", "max_skipped"):
            yield option, "data.on_error is error, and no group is skipped; set it to skip"
    if data.max_tokens_per_micro_batch is not None:
        for option in _given(train, "train", "per_device_train_batch_size"):
            yield option, "micro-batches are packed to data.max_tokens_per_micro_batch tokens, whatever number of groups that is"


def _of_training(config: RunConfig) -> Iterator[tuple[str, str]]:
    train, raw = config.train, engine.read_json(config.deepspeed)
    if train.max_steps > 0:
        for option in _given(train, "train", "num_train_epochs"):
            yield option, "train.max_steps says how long the run is; set that to -1"
    if not config.data.evaluation:
        for option in _given(train, "train", "eval_steps", "eval_on_start", "eval_shuffled", "per_device_eval_batch_size"):
            yield option, "data.evaluation names nothing to evaluate on"
    if not train.save_total_limit:
        for option in _given(train, "train", "save_keep_every"):
            yield option, "train.save_total_limit is 0, and all checkpoints are kept"
    if "scheduler" in raw:
        for option in _given(train, "train", "lr_scheduler_type"):
            yield option, f"{config.deepspeed} has a scheduler of its own; leave one of them out"
    elif train.lr_scheduler_type == "constant":
        for option in _given(train, "train", "warmup_ratio"):
            yield option, "train.lr_scheduler_type constant has no warm-up; constant_with_warmup has one"
    params = raw.get("optimizer", {}).get("params")
    for name, key in _IN_JSON.items() if "optimizer" in raw else ():
        if not isinstance(params, dict) or key not in params:
            for option in _given(train, "train", name):
                yield option, f'{config.deepspeed} has an optimizer of its own without optimizer.params.{key}; write "auto" there'


def _given(section: Any, prefix: str, *names: str) -> Iterator[str]:
    """Those of a section's options whose value is not the default, which nobody need have given."""
    defaults = {field.name: field.default for field in fields(section) if field.default is not MISSING}
    yield from (f"{prefix}.{name}" for name in names if getattr(section, name) != defaults[name])
