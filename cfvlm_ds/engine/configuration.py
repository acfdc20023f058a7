"""DeepSpeed configuration: reads a run's JSON, replaces every "auto" with a value, and validates the result before anything is loaded.

DeepSpeed ignores unknown keys and detects most invalid settings only after the model is loaded. Every problem that can be detected without
a model is reported here in one sentence that names the key.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

import torch

from cfvlm_ds.core import reading
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.errors import ConfigError, first_line
from cfvlm_ds.core.options import flat
from cfvlm_ds.core.shipped import listed
from cfvlm_ds.deepspeed_compat import settings
from cfvlm_ds.deepspeed_compat.starting import import_deepspeed

_SECTIONS = ("bf16", "fp16", "optimizer", "scheduler", "zero_optimization")


def read_json(path: str) -> dict[str, Any]:
    """Read a run's DeepSpeed JSON. Raises ConfigError naming the file if it is missing or broken."""
    try:
        content = reading.read_json(path)
    except FileNotFoundError:
        raise ConfigError(f"--deepspeed {path}: no such file; available: {listed('ds_configs')}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"--deepspeed {path}: broken JSON at line {error.lineno}, column {error.colno} ({error.msg})") from error
    except (OSError, ValueError, RecursionError) as error:  # a folder, a binary file, deep nesting
        raise ConfigError(f"--deepspeed {path}: cannot be read ({error}); give a file like those in ds_configs") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--deepspeed {path}: contains a {type(content).__name__}, not an object; give a file like those in ds_configs")
    if flat := sorted(name for name in _SECTIONS if not isinstance(content.get(name, {}), dict)):
        raise ConfigError(f"--deepspeed {path}: {', '.join(flat)} must be an object of options, as in ds_configs")
    for section in ("bf16", "fp16"):  # transformers, DeepSpeed and Python differ in what they accept as true
        enabled = content.get(section, {}).get("enabled", False)
        if not isinstance(enabled, bool) and enabled != "auto":
            raise ConfigError(f'--deepspeed {path}: {section}.enabled must be true, false or "auto", not {json.dumps(enabled)}')
    stage = content.get("zero_optimization", {}).get("stage", 0)
    if isinstance(stage, bool) or not isinstance(stage, int) or not 0 <= stage <= 3:
        raise ConfigError(f"--deepspeed {path}: zero_optimization.stage must be 0, 1, 2 or 3, not {json.dumps(stage)}")
    return content


def resolve(raw: dict[str, Any], config: RunConfig, world_size: int, device: torch.device, hidden_size: int, total_steps: int) -> Any:
    """Replace every "auto" in the DeepSpeed configuration according to transformers' rules, and return transformers' configuration object.

    Raises ConfigError naming both values if the JSON contradicts the run configuration.
    """
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

    train = config.train
    bf16_option = raw.get("bf16", {}).get("enabled", False)
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    fp16 = raw.get("fp16", {}).get("enabled", False) is True
    bf16 = train.bf16 if train.bf16 != "auto" else (has_bf16 and not fp16 if bf16_option == "auto" else bool(bf16_option))
    arguments = SimpleNamespace(
        world_size=world_size,
        per_device_train_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        max_grad_norm=train.max_grad_norm,
        learning_rate=train.learning_rate,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_epsilon=train.adam_epsilon,
        weight_decay=train.weight_decay,
        save_on_each_node=False,
        fp16=fp16,
        fp16_full_eval=False,
        bf16=bf16,
        bf16_full_eval=False,
        get_warmup_steps=lambda steps: warmup_steps(config, steps),
    )
    resolved = None
    try:
        resolved = HfTrainerDeepSpeedConfig(copy.deepcopy(raw))
        resolved.trainer_config_process(arguments)
        resolved.trainer_config_finalize(arguments, SimpleNamespace(config=SimpleNamespace(hidden_size=hidden_size)), total_steps)
    except Exception as error:  # if no values contradict each other, one is invalid: transformers does not check values
        if resolved is None or not resolved.mismatches:
            raise unusable(config.deepspeed, error) from error
        pairs = "; ".join(line[2:].replace("ds ", "", 1).replace(" vs hf ", " against train.") for line in resolved.mismatches)
        pairs = pairs.replace("train.train_batch_size (calculated)", "micro-batch x accumulation x ranks").replace("|bf16_full_eval", "")
        raise ConfigError(f'{config.deepspeed} contradicts the run configuration: {pairs}; write "auto" there or change one') from error
    finally:
        unset_hf_deepspeed_config()  # while it is set, transformers partitions every model that it builds
    if unresolved := sorted(name for name, value in flat(resolved.config).items() if value == "auto"):
        raise ConfigError(f'{config.deepspeed}: there is no rule for "auto" in {", ".join(unresolved)}; write a value')
    if "gradient_clipping" not in resolved.config:
        raise ConfigError(
            f'{config.deepspeed}: gradient_clipping is missing, which releases interpret differently; write a value or "auto"'
        )
    if bf16 and resolved.dtype() != torch.bfloat16:
        raise ConfigError(f'{config.deepspeed}: train.bf16=true needs "bf16": {{"enabled": "auto"}}, but the file gives {resolved.dtype()}')
    return resolved


def unusable(path: str, error: Exception) -> ConfigError:
    """Return the ConfigError for a JSON file that causes ``error`` in DeepSpeed or transformers."""
    return ConfigError(f"{path}: not a DeepSpeed configuration ({first_line(error)}); compare it with the files in ds_configs")


def warmup_steps(config: RunConfig, total_steps: int) -> int:
    """Return the number of warm-up steps, rounded up as transformers does."""
    return math.ceil(config.train.warmup_ratio * total_steps)


_KEYS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "steps_per_print", "sequence_parallel_size",
    "data_parallel_size", "gradient_clipping", "gradient_predivide_factor", "prescale_gradients", "managed_gradient_accumulation",
    "sparse_gradients", "disable_allgather", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "dataloader_drop_last",
    "wall_clock_breakdown", "memory_breakdown", "dump_state", "disable_python_gc", "communication_data_type",
    "seq_parallel_communication_data_type", "gradient_allreduce_op", "log_level", "zero_optimization", "bf16", "fp16", "optimizer",
    "scheduler", "torch_autocast", "data_types", "compile", "activation_checkpointing", "flops_profiler", "aio", "checkpoint",
    "comms_logger", "timers", "tensorboard", "wandb", "csv_monitor", "comet", "amp", "pipeline", "hybrid_engine", "data_efficiency",
    "expert_parallel", "tensor_parallel",
)  # fmt: skip
"""Valid top-level keys of a DeepSpeed JSON."""
_INSIDE = {
    "optimizer": ("type", "params", "legacy_fusion"),
    "scheduler": ("type", "params"),
    "torch_autocast": ("enabled", "dtype", "lower_precision_safe_modules"),
    "data_types": ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"),
    "aio": ("block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"),
    "checkpoint": (
        "tag_validation", "load_universal", "use_node_local_storage", "parallel_write", "checkpoint_serialization", "writer",
    ),
    "activation_checkpointing": (
        "partition_activations", "contiguous_memory_optimization", "cpu_checkpointing", "number_checkpoints", "profile",
        "synchronize_checkpoint_boundary",
    ),
    "flops_profiler": ("enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed", "output_file"),
}  # fmt: skip
"""Valid keys of the sections that DeepSpeed parses without a pydantic model. Pydantic models reject unknown keys themselves."""


def validate(config: RunConfig, resolved: Any, world_size: int = 1, device: torch.device | None = None) -> None:
    """Parse a resolved configuration with DeepSpeed. Refuse settings that DeepSpeed would ignore, that the training loop does not support,
    or that would fail after the model is loaded.

    ``device`` is the run's device, or None if the run is on another machine. Raises ConfigError naming the key.
    """
    path, options = config.deepspeed, resolved.config
    for key, value in options.items():
        if _is_comment(key):
            continue
        if key not in _KEYS:
            _refuse_key(path, "", key, _KEYS)
        for subkey in value if key in _INSIDE and isinstance(value, dict) else ():
            if subkey not in _INSIDE[key] and not _is_comment(subkey):
                _refuse_key(path, f"{key}.", subkey, _INSIDE[key])
    parsed = _parse(path, options)
    for problem in _unsupported(parsed, options, world_size, device):
        raise ConfigError(f"{path}: {problem}")


def _parse(path: str, options: Mapping[str, Any]) -> Any:
    """Parse the configuration with DeepSpeed. Raises ConfigError naming an invalid key."""
    import_deepspeed()
    import deepspeed
    from pydantic import ValidationError

    copied = {key: value for key, value in copy.deepcopy(dict(options)).items() if key != "train_batch_size"}  # the resolver has checked it
    try:
        return deepspeed.DeepSpeedConfig(copied)
    except ValidationError as error:
        first = error.errors()[0]
        *inside, key = (str(part) for part in first["loc"])
        holders = [name for name, values in copied.items() if isinstance(values, dict) and [*inside, key][0] in values]
        section = ".".join([*([] if [*inside, key][0] in copied else holders[:1]), *inside, ""])
        if first["type"] == "extra_forbidden":
            _refuse_key(path, section, key, settings.field_names())
        raise ConfigError(f"{path}: {section}{key}: {first['msg']}; see DeepSpeed's configuration reference") from None
    except Exception as error:  # in sections without a pydantic model, DeepSpeed uses unchecked values
        raise unusable(path, error) from error


def _is_comment(key: str) -> bool:
    return key.startswith(("_", "#", "//"))


def _refuse_key(path: str, section: str, key: str, known: Sequence[str]) -> NoReturn:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]!r}?" if near else "DeepSpeed has no such key; leave it out"
    raise ConfigError(f"{path}: unknown key {section + key!r}; {remedy}")


def _unsupported(parsed: Any, options: Mapping[str, Any], world_size: int, device: torch.device | None) -> Iterator[str]:
    """Yield one sentence for each setting that the training loop does not support, or that would make DeepSpeed fail after the model is
    loaded.
    """
    for setting, value in flat(options).items():
        if value != _ONLY.get(setting, value):
            yield f"{setting}={str(value).lower()} is not supported, only {str(_ONLY[setting]).lower()} is; leave it out"
    zero = parsed.zero_config
    if zero.stage == 0:
        yield "zero_optimization.stage 0 writes checkpoints that cannot be exported; set 1, 2 or 3 (on one rank, 1 trains identically)"
    offloads = {name: getattr(getattr(zero, f"offload_{name}"), "device", "none") != "none" for name in ("optimizer", "param")}
    on_cpu = device is not None and device.type == "cpu"
    if on_cpu and parsed.float16_config.enabled:
        yield "fp16.enabled=true needs a GPU, but this machine has none; set it to false (bf16 also works on CPUs)"
    if offloads["param"] and zero.stage != 3:
        yield f"zero_optimization.offload_param needs stage 3, but stage is {int(zero.stage)}; set its device to none"
    if "optimizer" not in options and offloads["optimizer"] and parsed.zero_force_ds_cpu_optimizer:
        yield (
            'zero_optimization.offload_optimizer needs an "optimizer" section, from which DeepSpeed builds its CPU Adam; copy the section '
            "from ds_configs/z3_offload.json, or set the device to none"
        )
    if on_cpu and (quantised := [name for name in _QUANTISED if getattr(zero, name)]):
        yield f"zero_optimization.{quantised[0]}=true has kernels only for GPUs, but this machine has none; set it to false"
    if device is not None and world_size % min(max(1, zero.zero_hpz_partition_size), world_size):
        yield (
            f"zero_optimization.zero_hpz_partition_size={zero.zero_hpz_partition_size} must divide the number of ranks, which is "
            f"{world_size}; set it to the number of ranks per node, or to 1"
        )
    if "optimizer" in options and not isinstance(parsed.optimizer_name, str):
        yield 'optimizer.type is missing; write "AdamW", or leave the section out for torch\'s AdamW'


_ONLY = {
    "gradient_allreduce_op": "mean", "gradient_predivide_factor": 1.0, "prescale_gradients": False, "managed_gradient_accumulation": True,
    "sequence_parallel_size": 1, "data_parallel_size": 1, "tensor_parallel.autotp_size": 0, "expert_parallel.enabled": False,
    "hybrid_engine.enabled": False, "data_efficiency.enabled": False, "checkpoint.load_universal": False,
    "zero_optimization.compute_grad_norm": True, "zero_optimization.parameter_alignment": False,
}  # fmt: skip
"""Setting -> its only supported value. With a different value, gradients would be wrong, a checkpoint could not be exported, or the setting
would have no effect, because the run makes its own batches and only ZeRO partitions weights.
"""
_QUANTISED = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")


def offloaded(options: Mapping[str, Any]) -> dict[str, bool]:
    """Return {"optimizer": bool, "param": bool}: whether the optimizer states and the weights are offloaded from the GPU."""
    zero = options.get("zero_optimization", {})
    return {name: (zero.get(f"offload_{name}") or {}).get("device", "none") != "none" for name in ("optimizer", "param")}
