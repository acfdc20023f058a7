"""Dry run: a report on a run's parameters and its memory per GPU, computed without weights, data or other ranks."""

from __future__ import annotations

import torch

from cfvlm_ds import engine
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.distributed import own_device
from cfvlm_ds.models import MODULES, attention, family_of, meta_model, parameter_counts
from cfvlm_ds.models.adapters import BYTES_OF_4BIT, linear_weights
from cfvlm_ds.training.validation import validate

_GPUS = (1, 2, 4, 8, 16, 32, 64)
_GPUS_PER_NODE = 8
_TOKENS = 8192
_GIB = 1 << 30


def dry_run(config: RunConfig) -> str:
    """Resolve the configuration and the DeepSpeed JSON, build the model on the meta device, and return the report. Raises the same
    ConfigErrors as a run.

    The memory for the model's states (weights, gradients, optimizer) is DeepSpeed's own estimate for mixed precision. The memory for
    activations is the language model's peak during a forward and backward pass in bfloat16.
    """
    validate(config, None)
    resolved = engine.resolve(engine.read_json(config.deepspeed), config, 1, torch.device("cpu"), engine.hidden_size(config), 1)
    model = meta_model(config.model, torch.bfloat16, engine.attention_without_data())
    lines = [f"model type       {model.config.model_type}", f"attention        {attention(config.model.attn_implementation, model.config)}"]
    lines += [f"objective        {config.loss}", *config.model.unused, ""]
    counts = parameter_counts(model, family_of(model.config))
    lines.append(f"{'module':<16} {'parameters':>16} {'trainable':>16} {'tuning':>8} {'learning rate':>14}")
    for module in MODULES:
        options = getattr(config.model, module)
        rate = config.train.learning_rate if options.learning_rate is None else options.learning_rate
        shown = "" if options.tuning == "frozen" else f"{rate:.2g}"
        lines.append(f"{module:<16} {counts[module][0]:>16,} {counts[module][1]:>16,} {options.tuning:>8} {shown:>14}".rstrip())
    total_parameters, trainable = (sum(count[k] for count in counts.values()) for k in (0, 1))
    lines += [f"{'all':<16} {total_parameters:>16,} {trainable:>16,}", ""]
    ds_config, recompute = resolved.config, config.model.gradient_checkpointing
    tokens = config.data.max_tokens_per_forward or config.data.max_tokens_per_micro_batch or _TOKENS  # prompts and images included
    working = engine.working_memory(model, ds_config, tokens, recompute)
    quantised = config.model.lora.load_in_4bit and linear_weights(model, family_of(model.config))
    stage, names = ds_config.get("zero_optimization", {}).get("stage", 0), {"optimizer": "optimizer", "param": "weights"}
    moved = " and ".join(names[name] for name, is_offloaded in engine.offloaded(ds_config).items() if is_offloaded)
    offloaded = f", {moved} offloaded" if moved else ""
    lines.append(
        f"memory of the model's states, ZeRO-{stage}, {_GPUS_PER_NODE} GPUs per node{offloaded}; peak with {tokens} tokens per forward"
    )
    lines.append(f"{'GPUs':>6} {'GiB per GPU':>12} {'peak':>8} {'GiB of host memory per node':>28}")
    for gpus in _GPUS:
        card, host = engine.model_states(model, ds_config, gpus, _GPUS_PER_NODE)
        card -= int(quantised * (2 - BYTES_OF_4BIT))
        lines.append(f"{gpus:>6} {card / _GIB:>12.1f} {(card + sum(working.values())) / _GIB:>8.1f} {host / _GIB:>28.1f}")
    if config.model.vision_tower.tuning != "frozen":
        lines.append("not counted: activations of the vision tower, which is trained")
    if config.train.bf16 is False:
        lines.append("all sizes are for bfloat16; train.bf16 is false, and weights and activations in float32 take twice as much")
    if own_device().type == "cpu":
        lines.append("the table is for GPUs; this machine has none, and a run on its CPUs has no CUDA or NCCL")
    if engine.model_states(model, ds_config, 1, _GPUS_PER_NODE)[0] < sum(working.values()) / 20:
        lines.append("the model is so small that more GPUs do not lower the peak")
    sizes = ", ".join(f"{name} {size / _GIB:.1f}" for name, size in working.items())
    other = engine.activations(model, tokens, not recompute) / _GIB
    lines.append(
        f"in addition to the states: {sizes} GiB; activations {'without' if recompute else 'with'} gradient checkpointing: {other:.1f} GiB"
    )
    return "\n".join(lines)
