"""Checkpoint saving: atomically writes DeepSpeed's shards and the training loop's state.

A checkpoint is written as ``checkpoint-STEP.partial`` and renamed to ``checkpoint-STEP`` when it is complete. Each rank computes the CRC-32
of its files while writing them, and flushes them to disk. ``complete.json`` lists sizes and checksums. Layout::

    checkpoint-STEP/
        complete.json                     step, number of ranks, size and CRC-32 of every file, training loop state (state.py)
        random-state-RANK.pt              states of the random number generators
        *_model_states.pt                 DeepSpeed: 16-bit weights, or their shapes under ZeRO-3; schedule
        *_optim_states.pt                 DeepSpeed: 32-bit weights and moments, one shard per rank (deepspeed_compat/shards.py)
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cfvlm_ds.checkpoint.finding import COMPLETE, by_step, own_sum, step_of
from cfvlm_ds.checkpoint.state import SCHEMA, TrainState
from cfvlm_ds.core.distributed import World, broadcast_object, gather_objects, random_state
from cfvlm_ds.core.errors import StorageError
from cfvlm_ds.core.files import Summed, crc32_of, put_in_place, remove
from cfvlm_ds.deepspeed_compat.checkpoint_files import guarded_writes

RANDOM_STATE = "random-state-{}.pt"


class SaveError(StorageError):
    """Raised if a rank could not write a checkpoint. The unfinished checkpoint has been removed; older checkpoints are unchanged."""


def save(engine: Any, state: TrainState, output_dir: Path, world: World, keep: int, keep_every: int = 0) -> Path:
    """Write ``output_dir/checkpoint-STEP``, remove older checkpoints, and return the new checkpoint's path.

    The newest ``keep`` checkpoints are kept (0: all), as are the best checkpoint and every checkpoint whose step is a multiple of
    ``keep_every`` (0: none). All ranks must call this. Raises SaveError on all ranks if one of them cannot write a file, for example
    because the disk is full.
    """
    final = output_dir / f"checkpoint-{state.step}"
    partial = final.with_name(final.name + ".partial")
    if world.is_main:
        for leftover in output_dir.glob("checkpoint-*.partial"):
            remove(leftover)
    dist.barrier()
    failures: list[str] = []

    def guard(write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with collect_failure(failures):
                return write(*arguments, **options)

        return call

    files: dict[str, tuple[int, int]] = {}

    def write(state_dict: Any, path: str | Path) -> None:
        files[str(Path(path).relative_to(partial))] = _written(state_dict, Path(path))

    with guarded_writes(engine, guard, write):
        engine.save_checkpoint(str(output_dir), tag=partial.name, client_state={}, save_latest=False)
    if failures:
        gc.collect()  # in newer torch versions, the error's frames form a reference cycle, which keeps the broken file open
    with collect_failure(failures):  # on every rank, because ZeRO-1 and 2 save only the first rank's client state
        write(random_state(world.device), partial / RANDOM_STATE.format(world.rank))
    reports = gather_objects((failures[0] if failures else None, files), world)
    problem = next((f"rank {rank}: {failure}" for rank, (failure, _) in enumerate(reports) if failure), None)
    if world.is_main and problem is None:
        description = {"schema": SCHEMA, "step": state.step, "world_size": world.size, "run_id": state.run_id, "loop": vars(state)}
        with collect_failure(failures):
            _publish(partial, final, description, {name: entry for _, each in reports for name, entry in each.items()})
        problem = failures[0] if failures else None
    if problem := broadcast_object(problem):
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise SaveError(
            f"{final} cannot be written ({problem}); free some space or correct the folder's permissions; older checkpoints are intact"
        )
    if world.is_main:
        _delete_older(output_dir, state, keep, keep_every)
    dist.barrier()
    return final


def _delete_older(output_dir: Path, state: TrainState, keep: int, keep_every: int) -> None:
    """Delete the checkpoints that ``save`` does not keep. Checkpoints of steps after ``state.step`` are never deleted."""
    older = [path for path in by_step(output_dir) if step_of(path) <= state.step]
    for path in older[keep:] if keep else ():
        if not (keep_every and step_of(path) % keep_every == 0) and not (state.best and step_of(path) == state.best["step"]):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def collect_failure(failures: list[str]) -> Iterator[None]:
    """Suppress a write error in the block, and append its message to ``failures``. The exception itself is not kept, because it would keep
    the broken file open and its disk space in use.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):  # if the disk is full, torch's writer raises a RuntimeError as well
            cause = cause.__context__
        failures.append(str(cause or error).partition("\n")[0])


def _written(states: Any, file: Path) -> tuple[int, int]:
    """Write states to a file, flush it to disk, and return its size and CRC-32, which are computed during the write."""
    with file.open("wb") as handle:
        summed: Any = Summed(handle)
        torch.save(states, summed)
        handle.flush()
        os.fsync(handle.fileno())
    return summed.size, summed.crc32


def flushed(file: Path) -> tuple[int, int]:
    """Flush a file to disk, so that it survives a power loss, and return its size and CRC-32."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
    return file.stat().st_size, crc32_of(file)


def _publish(partial: Path, final: Path, description: Mapping[str, Any], files: dict[str, tuple[int, int]]) -> None:
    """Write complete.json, and rename the folder to its final name. Files in the folder that are missing from ``files`` are flushed and
    added to it.
    """
    for file in partial.rglob("*"):
        if file.is_file() and (name := str(file.relative_to(partial))) not in files:
            files[name] = flushed(file)
    listed = {**description, "files": dict(sorted(files.items()))}
    (partial / COMPLETE).write_text(json.dumps({**listed, "crc32": own_sum(listed)}, indent=1))
    flushed(partial / COMPLETE)
    for folder in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
        _sync_names(folder)
    put_in_place(partial, final, older := final.with_name(final.name + ".old.partial"))
    _sync_names(final.parent)
    remove(older)


def _sync_names(folder: Path) -> None:
    """Flush the directory entries of a folder (its file names) to disk if the file system supports it."""
    handle = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(handle)
    os.close(handle)
