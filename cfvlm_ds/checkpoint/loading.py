"""Continuing from a checkpoint written by any number of ranks. Only tensors are read: nothing that it pickles is run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cfvlm_ds.checkpoint.finding import description
from cfvlm_ds.checkpoint.reshard import reshard
from cfvlm_ds.checkpoint.saving import RANDOM_STATE, kept_failures, reason_of
from cfvlm_ds.checkpoint.state import TrainState
from cfvlm_ds.core.distributed import World, gather_objects, set_random_state
from cfvlm_ds.core.errors import ConfigError, StorageError
from cfvlm_ds.core.files import remove
from cfvlm_ds.deepspeed_compat.checkpoint_files import flat_tensors, read_states, reading_tensors_alone
from cfvlm_ds.models.model_files import explained


def load(engine: Any, path: Path, state: TrainState, world: World, output_dir: Path) -> None:
    """Restore weights, optimizer, schedule, random state and ``state`` from a complete checkpoint.

    Where another number of ranks wrote it, it is first resharded for this one, into a folder of ``output_dir`` that is removed again; that
    takes as much room as the checkpoint, and StorageError is raised on all ranks where there is none.
    """
    if (ranks := description(path)["world_size"]) == world.size:
        _load(engine, path, path, state, world)
        return
    world.say(f"{path} was written by {ranks} ranks; resharding it for {world.size}")
    resharded = output_dir / f"{path.name}.resharded.partial"
    if world.is_main:
        remove(resharded)
        resharded.mkdir(parents=True)
    dist.barrier()
    failures = list[str]()
    try:
        with explained(f"{path} cannot be resharded", "name another checkpoint with train.resume"), kept_failures(failures):
            reshard(path, resharded, world.rank, world.size, *flat_tensors(engine))
        reasons = gather_objects(reason_of(failures[0], resharded) if failures else None, world)
        if reason := next(filter(None, reasons), None):
            raise StorageError(f"{path} cannot be resharded in {output_dir} ({reason}); make room, or start {ranks} ranks")
        _load(engine, resharded, path, state, world)
        dist.barrier()
    finally:
        if world.is_main:
            shutil.rmtree(resharded, ignore_errors=True)


def kept_state(path: Path) -> TrainState | None:
    """The loop's state in a complete checkpoint, before anything is loaded; None if an older revision stored it among the weights.

    Raises ConfigError for a state that this revision cannot continue from.
    """
    described = description(path)
    if (loop := described.get("loop")) is None:
        return None
    if (state := _state(loop, path)).step != described["step"]:
        raise ConfigError(f"{path}: it was written at step {described['step']}, and its state is of step {state.step}; name another one")
    return state


def _state(loop: Any, path: Path) -> TrainState:
    state = TrainState()
    try:
        state.load_state_dict(loop)
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise ConfigError(f"{path}: {error}") from None
        raise ConfigError(f"{path}: its state cannot be read ({error}); name another checkpoint with train.resume") from error
    return state


def _load(engine: Any, folder: Path, path: Path, state: TrainState, world: World) -> None:
    """Load the checkpoint ``path`` from ``folder``, which holds it for this number of ranks."""
    with explained(f"{path} cannot be loaded", "name another checkpoint with train.resume"), reading_tensors_alone(engine):
        _, client = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if client is None:
        raise ConfigError(f"{path}: DeepSpeed could not load it; name another checkpoint with train.resume")
    found = kept_state(path) or _state(client.get("loop"), path)
    vars(state).update(vars(found))
    own = path / RANDOM_STATE.format(world.rank % description(path)["world_size"])
    random = read_states(own) if own.is_file() else client.get("rng")  # an older revision kept it among the weights
    if random is None:
        raise ConfigError(f"{path} holds no random state; name another checkpoint with train.resume")
    try:
        set_random_state(random, world.device)
    except (TypeError, KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{own}: its random state cannot be used ({error}); name another checkpoint with train.resume") from error
