"""Reads a run's DeepSpeed JSON and replaces every "auto" with a value. check.py validates the result."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.errors import ConfigError, first_line
from cfvlm_ds.core.options import flat
from cfvlm_ds.core.reading import parse_json
from cfvlm_ds.core.shipped import listed

_SECTIONS = ("bf16", "fp16", "optimizer", "scheduler", "zero_optimization")


def read_json(path: str) -> dict[str, Any]:
    """Read a run's DeepSpeed JSON. Raises ConfigError naming the file if it is missing or broken."""
    try:
        content = parse_json(Path(path).read_bytes().decode())
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
