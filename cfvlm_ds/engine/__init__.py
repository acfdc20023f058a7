"""The DeepSpeed engine: configuration checks, startup and memory estimates."""

from __future__ import annotations

from cfvlm_ds.deepspeed_compat.running_engine import (
    apply_optimizer_options,
    drop_prefetch_recording,
    gather_clock,
    invalidate_prefetch_trace,
    optimizer_options,
    release,
)
from cfvlm_ds.engine.check import validate
from cfvlm_ds.engine.configuration import read_json, resolve
from cfvlm_ds.engine.memory import activations, attention_without_data, model_states, offloaded, working_memory
from cfvlm_ds.engine.setup import hidden_size, in_parts, initialize, recompute_activations, start

__all__ = [
    "activations",
    "apply_optimizer_options",
    "attention_without_data",
    "drop_prefetch_recording",
    "gather_clock",
    "hidden_size",
    "in_parts",
    "initialize",
    "invalidate_prefetch_trace",
    "model_states",
    "offloaded",
    "optimizer_options",
    "read_json",
    "recompute_activations",
    "release",
    "resolve",
    "start",
    "validate",
    "working_memory",
]
