"""The DeepSpeed engine: configuration checks and startup."""

from __future__ import annotations

from cfvlm_ds.deepspeed_compat.running_engine import (
    apply_optimizer_options,
    drop_prefetch_recording,
    gather_clock,
    optimizer_options,
    release,
)
from cfvlm_ds.engine.configuration import offloaded, read_json, resolve, validate
from cfvlm_ds.engine.setup import hidden_size, in_parts, initialize, recompute_activations, start
