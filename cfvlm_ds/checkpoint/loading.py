"""Checkpoint loading for any number of ranks. Unpickling is restricted, so that a file cannot run code."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cfvlm_ds.checkpoint.finding import description
from cfvlm_ds.checkpoint.saving import RANDOM_STATE, collect_failure
from cfvlm_ds.checkpoint.state import TrainState, refuse_other_version
from cfvlm_ds.core.distributed import World, gather_objects, set_random_state
from cfvlm_ds.core.errors import ConfigError, StorageError
from cfvlm_ds.core.files import create, remove
from cfvlm_ds.deepspeed_compat.checkpoint_files import flat_tensors, read_states, reading_tensors_alone
from cfvlm_ds.deepspeed_compat.shards import Shapes, Shards
from cfvlm_ds.models.model_files import explained


def load(engine: Any, path: Path, state: TrainState, world: World, output_dir: Path) -> None:
    """Restore the weights, the optimizer, the schedule, the random state and ``state`` from a complete checkpoint.

    If a different number of ranks wrote the checkpoint, it is first resharded into a temporary folder in ``output_dir``. This folder takes
    as much space as the checkpoint. Raises StorageError on all ranks if there is not enough space.
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
        with explained(f"{path} cannot be resharded", "use another checkpoint with train.resume"), collect_failure(failures):
            reshard(path, resharded, world.rank, world.size, *flat_tensors(engine))
        reasons = gather_objects(failures[0] if failures else None, world)
        if reason := next(filter(None, reasons), None):
            raise StorageError(f"{path} cannot be resharded in {output_dir} ({reason}); free some space, or start {ranks} ranks")
        _load(engine, resharded, path, state, world)
        dist.barrier()
    finally:
        if world.is_main:
            shutil.rmtree(resharded, ignore_errors=True)


def reshard(source: Path, target: Path, rank: int, ranks: int, shapes: Shapes, sizes: Sequence[int]) -> None:
    """Reshard the checkpoint ``source`` for ``ranks`` ranks, and write rank ``rank``'s files to ``target`` in DeepSpeed's own format.

    ``shapes`` and ``sizes`` describe this rank's engine, as returned by ``flat_tensors``. Raises ConfigError if the checkpoint was trained
    with a different set of trainable weights.
    """
    shards = Shards(source)
    if shards.trained != {name for group in shapes for name in group}:
        raise ConfigError(f"{source} trained a different set of weights; restore model.*.tuning or choose another output_dir")
    for name, contents in shards.resharded(rank, ranks, shapes, sizes):
        with create(target / name) as handle:
            torch.save(contents, handle)


def kept_state(path: Path) -> TrainState:
    """Read only the training loop's state from a complete checkpoint. Raises ConfigError if a different version wrote the checkpoint."""
    described = description(path)
    refuse_other_version(described, path)
    return TrainState(**described["loop"])


def _load(engine: Any, folder: Path, path: Path, state: TrainState, world: World) -> None:
    """Load the checkpoint ``path``. ``folder`` contains its DeepSpeed files for the current number of ranks."""
    with explained(f"{path} cannot be loaded", "use another checkpoint with train.resume"), reading_tensors_alone(engine):
        _, client = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if client is None:
        raise ConfigError(f"{path}: DeepSpeed could not load it; use another checkpoint with train.resume")
    vars(state).update(vars(kept_state(path)))
    set_random_state(read_states(path / RANDOM_STATE.format(world.rank % description(path)["world_size"])), world.device)
