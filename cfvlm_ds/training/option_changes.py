"""Option changes: the differences between a run and the run that it resumes, and their effect on resuming.

Every option declares how a change affects resuming (``on_resume`` in core/config.py). The effects of changed DeepSpeed settings are listed
below. All fields of an objective affect the training. A checkpoint contains the record of its run. A run that resumes from the checkpoint
compares this record with its own before it writes anything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cfvlm_ds.core.config import MICRO_BATCH_SIZE, SECTIONS, ModelConfig, RunConfig
from cfvlm_ds.core.options import OnResume, declared, flat
from cfvlm_ds.core.progress import Alive, Say, no_op
from cfvlm_ds.core.secrets import masked
from cfvlm_ds.models import fingerprint

ON_RESUME: dict[str, OnResume] = {
    name: kind for section, options in SECTIONS.items() for name, kind in declared(options, f"{section}.").items()
}
"""Option -> how a change of its value affects resuming."""
_KINDS: dict[OnResume, tuple[str, ...]] = {
    "free": (
        # compared as values that _effective derives, or as train.* options, which the JSON may not contradict
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "optimizer.params.lr",
        "optimizer.params.betas", "optimizer.params.eps", "optimizer.params.weight_decay", "optimizer.params.torch_adam", "optimizer.type",
        "bf16.enabled", "fp16.enabled", "scheduler.params.total_num_steps",
        # without effect on the training
        "zero_optimization", "activation_checkpointing", "aio", "compile", "disable_allgather", "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer", "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "flops_profiler",
        "comms_logger", "tensorboard", "wandb", "csv_monitor", "comet", "checkpoint",
    ),
    "confirm": (
        "bf16", "fp16", "communication_data_type", "data_types", "optimizer.params", "scheduler.params",
        "zero_optimization.zero_quantized_weights", "zero_optimization.zero_quantized_gradients",
        "zero_optimization.zero_quantized_nontrainable_weights",
    ),
    "refuse": ("scheduler.type", "zero_optimization.stage"),
}  # fmt: skip
DEEPSPEED = {name: kind for kind, names in _KINDS.items() for name in names}
"""DeepSpeed setting -> the effect of changing it or any setting below it. To be safe, an unlisted setting counts as ``confirm``."""

_UNSET = {
    "optimizer.params.adam_w_mode": True,
    "zero_optimization.stage": 0,
    **{name: False for name in DEEPSPEED if "zero_quantized" in name},
}
_Effects = dict[str, tuple[Any, OnResume]]
"""Option or setting -> (its value, how a change of it affects resuming)."""
_STEPS, _TOTAL = ("train.max_steps", "train.num_train_epochs"), "total steps (train.max_steps, train.num_train_epochs)"
_WEIGHTS, _INPUTS = "weights of model.name_or_path", "tokenizer, processor or chat template of model.name_or_path"


@dataclass(frozen=True)
class Change:
    """A changed option: its name, its earlier value and its value in this run. If ``fixed`` is True, the run cannot resume with this
    change.
    """

    option: str
    before: Any
    now: Any
    fixed: bool

    def __str__(self) -> str:
        return f"{self.option} was {_quoted(self.before)} and is {_quoted(self.now)}"


def record(
    config: RunConfig,
    deepspeed: Mapping[str, Any],
    ranks: int,
    steps: int,
    alive: Alive = no_op,
    say: Say = no_op,
) -> dict[str, Any]:
    """Return the record of a run as plain JSON with secrets removed: options, resolved DeepSpeed settings, number of ranks, total steps and
    the model's hashes.

    ``alive`` is called repeatedly while the model's files are read. Progress messages are passed to ``say``.
    """
    record = {"options": masked(config.resolved), "deepspeed": masked(deepspeed), "ranks": ranks, "steps": steps}
    return json.loads(json.dumps({**record, "model": model_hashes(config.model.name_or_path, alive, say)}, default=str))


def model_hashes(name_or_path: str, alive: Alive = no_op, say: Say = no_op) -> dict[str, str] | None:
    """Return the fingerprint (hashes) of the model's files, or None if a hub model has not been downloaded yet."""
    folder = name_or_path
    if not os.path.isdir(folder):
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(name_or_path, local_files_only=True)
        except (OSError, ValueError):
            return None
    return fingerprint(ModelConfig(folder), alive, say)  # limits on visual tokens are compared as options


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Compare two records, and return the differences that affect the training."""
    old, new = _effective(before), _effective(now)
    for one, other in ((old, new), (new, old)):  # an absent term has a weight of 0
        missing = [name for name in other.keys() - one.keys() if name.startswith("objective.") and name.endswith(".weight")]
        one.update(dict.fromkeys(missing, (0.0, "confirm")))
    changes = []
    for name in sorted(old.keys() & new.keys()):
        (was, kind), (value, _) = old[name], new[name]
        if was != value:
            packing = name == "data.max_tokens_per_micro_batch" and None in (was, value)
            if name in (_WEIGHTS, _INPUTS):
                was, value = (f"{each['options']['model']['name_or_path']} ({what[:8]})" for each, what in ((before, was), (now, value)))
            changes.append(Change(name, was, value, kind == "refuse" or packing))
    return changes


def refused(changes: Sequence[Change], what: str, step: int | None, allowed: bool) -> str | None:
    """Return an error message if a run cannot continue from ``what`` (a run folder or checkpoint) with these changes, otherwise None.

    ``step`` is the checkpoint's step, or None if the run has finished and cannot continue.
    """
    if fixed := "; ".join(str(change) for change in changes if change.fixed):
        return f"{what} cannot be continued with these changes: {fixed}; restore them, or choose another train.output_dir"
    if changes and not allowed:
        trained = f"{what} was trained with other options: {'; '.join(map(str, changes))}; restore them"
        if step is None:
            return f"{trained}, or choose another train.output_dir"
        return (
            f"{trained}, choose another train.output_dir, or add --train.resume_changes allow to continue with the new options after "
            f"step {step}"
        )
    return None


def _effective(record: Mapping[str, Any]) -> _Effects:
    """Return the options and settings that affect the training. Options that act together are replaced by a joint value."""
    options = flat(record["options"])
    terms = {name.split(".")[1] for name in options if name.startswith("objective.")}
    absent = {term for term in terms if not options.get(f"objective.{term}.weight")}
    modules = [name.split(".")[1] for name in ON_RESUME if name.endswith(".tuning")]
    adapted = any(options[f"model.{module}.tuning"] == "lora" for module in modules)
    values: _Effects = {}
    for name, value in options.items():
        section, part, *_ = [*name.split("."), ""]
        if section == "objective":
            if part not in absent or name.endswith(".weight"):
                values[name] = (value, "confirm")
        elif (kind := ON_RESUME.get(name)) in ("confirm", "refuse") and not (
            name in ("train.bf16", *_STEPS)
            or (section == "model" and part == "lora" and not adapted)
            or (name.endswith(".learning_rate") and part in modules and options[f"model.{part}.tuning"] == "frozen")
        ):
            values[name] = (value, kind)
    micro_batches = options["train.gradient_accumulation_steps"] * record["ranks"]
    if options["data.max_tokens_per_micro_batch"] is None:
        groups = (options["train.per_device_train_batch_size"] or MICRO_BATCH_SIZE) * micro_batches
        values["groups per step (train.per_device_train_batch_size x train.gradient_accumulation_steps x ranks)"] = (groups, "confirm")
    else:
        values["micro-batches per step (train.gradient_accumulation_steps x ranks)"] = (micro_batches, "confirm")
    values[_TOTAL] = (record["steps"], "confirm")
    if record["model"]:  # a hub model may not be on disk yet
        values |= {_WEIGHTS: (record["model"]["weights"], "refuse"), _INPUTS: (record["model"]["inputs"], "confirm")}
    return values | _settings(record["deepspeed"])


def _settings(deepspeed: Mapping[str, Any]) -> _Effects:
    """Return the DeepSpeed settings that affect the training."""
    settings = {**_UNSET, **flat(deepspeed)}
    settings.setdefault("scheduler.type", "train.lr_scheduler_type")
    all_kinds = ((name, value, on_resume_of(name)) for name, value in settings.items())
    compared: _Effects = {f"--deepspeed {n}": (value, kind) for n, value, kind in all_kinds if kind in ("confirm", "refuse")}
    half = [name for name in ("bf16", "fp16") if settings.get(f"{name}.enabled")]
    optimizer = f"{settings.get('optimizer.type', 'AdamW')}"  # three implementations share this name but store different states
    if "optimizer.type" not in settings or settings.get("optimizer.params.torch_adam"):
        optimizer += " of torch"
    elif settings.get("zero_optimization.offload_optimizer.device", "none") != "none":
        optimizer += " of DeepSpeed on the CPU"
    joint = {"precision (train.bf16, bf16 and fp16 of the DeepSpeed JSON)": " ".join(half) or "fp32", "--deepspeed optimizer": optimizer}
    return compared | {name: (value, "refuse") for name, value in joint.items()}


def on_resume_of(setting: str) -> OnResume:
    """Return the effect of changing a DeepSpeed setting: the DEEPSPEED entry whose key is the longest prefix of its name."""
    while setting not in DEEPSPEED and "." in setting:
        setting = setting.rpartition(".")[0]
    return DEEPSPEED.get(setting, "confirm")


def _quoted(value: Any) -> str:
    return "not set" if value is None else str(value)
