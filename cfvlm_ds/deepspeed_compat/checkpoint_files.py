"""DeepSpeed's checkpoint files: a safe reader, and hooks that replace DeepSpeed's reader and writer."""

from __future__ import annotations

import contextlib
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cfvlm_ds.core.errors import ConfigError

Guard = Callable[[Callable[..., Any]], Callable[..., Any]]


@contextlib.contextmanager
def guarded_writes(engine: Any, guard: Guard, write: Callable[..., object]) -> Iterator[None]:
    """Within the block, make ``engine.save_checkpoint`` write states with ``write``, and wrap each of its write functions in ``guard``.

    DeepSpeed runs a collective after each write. If an exception terminated one rank before this collective, the other ranks would hang in
    it.
    """
    writer, script = engine.checkpoint_engine, engine._copy_recovery_script
    save, makedirs = writer.save, writer.makedirs
    writer.save, writer.makedirs, engine._copy_recovery_script = guard(write), guard(makedirs), guard(script)
    try:
        yield
    finally:
        writer.save, writer.makedirs, engine._copy_recovery_script = save, makedirs, script


@contextlib.contextmanager
def reading_tensors_alone(engine: Any) -> Iterator[None]:
    """Within the block, make ``engine.load_checkpoint`` read with ``read_states``, because DeepSpeed's reader can run code from a file."""
    reader = engine.checkpoint_engine
    load = reader.load
    reader.load = lambda path, map_location=None: read_states(path, map_location)
    try:
        yield
    finally:
        reader.load = load


def read_states(file: str | Path, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """Read a checkpoint file: tensors, and the objects that DeepSpeed pickles with them.

    Raises ConfigError for a file that contains anything else, because unpickling it could run code.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    known: list[Any] = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    try:
        with torch.serialization.safe_globals(known):
            return torch.load(file, map_location=map_location, mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        match = re.search(r"WeightsUnpickler error: ([^\n]*)", str(error))  # the rest of torch's message recommends unpickling anyway
        reason = match[1].partition(" was not")[0] if match else str(error).splitlines()[0]
        raise ConfigError(f"{file} contains objects other than tensors ({reason}); use another checkpoint") from error


def flat_tensors(engine: Any) -> tuple[Sequence[Mapping[str, torch.Size]], list[int]]:
    """Return, for each of the optimizer's flat tensors, its weights (name -> shape) and its number of elements on this rank."""
    zero = engine.optimizer
    flat = zero.fp32_partitioned_groups_flat if hasattr(zero, "fp32_partitioned_groups_flat") else zero.single_partition_of_fp32_groups
    return engine._get_zero_param_shapes(), [tensor.numel() for tensor in flat]
