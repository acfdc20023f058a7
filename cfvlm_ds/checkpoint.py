"""Checkpoints: DeepSpeed's shards plus the state of the loop, complete or invisible.

A checkpoint is written as ``checkpoint-STEP.partial``. Every rank flushes its own files to the disk and takes their CRC-32; sizes and sums
are listed in ``complete.json``, and one rename makes it ``checkpoint-STEP``. A folder that does not match its list is never resumed from.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cfvlm_ds.config import ConfigError
from cfvlm_ds.distributed import World, broadcast_object, gather_objects, random_state, set_random_state
from cfvlm_ds.models.stored import explained
from cfvlm_ds.reading import MAX_RECORD, parse_json, read_bytes
from cfvlm_ds.reshard import reshard
from cfvlm_ds.untrusted import own_file, remove

_COMPLETE = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_BLOCK = 1 << 24  # bytes read at a time
_RANDOM = "random-state-{}.pt"


class SaveError(ConfigError):
    """A checkpoint could not be written, on any rank: nothing of it is left, and no older one was touched."""


@dataclass
class TrainState:
    """Where the loop is: what a checkpoint holds besides weights, optimizer and schedule.

    ``step`` counts finished optimizer steps; ``sampler`` is GroupSampler's state; ``data`` the identity of the training groups;
    ``run_id`` the MLflow run; ``baseline_lp`` the factual log-likelihood per token at the start, against which displacement is measured;
    ``best`` the ``step`` and ``value`` of the best evaluation by ``train.save_best``; ``skipped`` the groups left out, and why; ``record``
    what the run was told (see changes.py).
    """

    step: int = 0
    sampler: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    run_id: str | None = None
    baseline_lp: float | None = None
    best: dict[str, float] | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    record: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; what an older revision did not save keeps its default.

        Raises ConfigError where it lacks what has no default, or has what this revision does not know.
        """
        if lacking := sorted({"step", "sampler", "data"} - state.keys()):
            raise ConfigError(f"its state has no {', '.join(lacking)}; resume from another checkpoint, or with the revision that wrote it")
        if unknown := sorted(state.keys() - vars(self).keys()):
            raise ConfigError(f"its state has {', '.join(unknown)}, which a newer revision must have written; resume with that one")
        if odd := sorted(name for name, value in state.items() if not isinstance(value, _KINDS[name]) or isinstance(value, bool)):
            raise ConfigError(f"its state has a {odd[0]} of type {type(state[odd[0]]).__name__}; resume from another checkpoint")
        for name, value in state.items():
            setattr(self, name, value)


_KINDS: dict[str, Any] = {
    "step": int,
    **dict.fromkeys(("sampler", "record"), (dict, type(None))),
    "data": (dict, str, type(None)),  # of an older revision, one hash
    "run_id": (str, type(None)),
    "baseline_lp": (int, float, type(None)),
    "best": (dict, type(None)),
    "skipped": dict,
}


def save(engine: Any, state: TrainState, output_dir: Path, world: World, keep: int, keep_every: int = 0) -> Path:
    """Write ``output_dir/checkpoint-STEP``; then, of the older ones, only the newest stay, ``keep`` in all (0 for every one of them), the
    best one, and those whose step is a multiple of ``keep_every``.

    Every rank calls it. Raises SaveError on all of them when one cannot write a file: disk full, quota, read-only folder.
    """
    final = output_dir / f"checkpoint-{state.step}"
    partial = final.with_name(final.name + ".partial")
    if world.is_main:
        for left in output_dir.glob("checkpoint-*.partial"):
            remove(left)
    dist.barrier()
    with _failures_kept(engine) as (written, failures):
        engine.save_checkpoint(str(output_dir), tag=partial.name, client_state={}, save_latest=False)
    files: dict[str, tuple[int, int]] = {}
    with _kept(failures):
        written.append(partial / _RANDOM.format(world.rank))  # of every rank: ZeRO-1 and 2 keep the client state of the first alone
        torch.save(random_state(world.device), written[-1])
        files.update((str(file.relative_to(partial)), _settled(file)) for file in written)
    reports = gather_objects((_reason(failures[0], partial) if failures else None, files), world)
    problem = next((f"rank {rank}: {failure}" for rank, (failure, _) in enumerate(reports) if failure), None)
    if world.is_main and problem is None:
        description = {"step": state.step, "world_size": world.size, "run_id": state.run_id, "loop": state.state_dict()}
        with _kept(failures):
            _publish(partial, final, description, {name: entry for _, each in reports for name, entry in each.items()})
        problem = failures[0] if failures else None
    if problem := broadcast_object(problem):
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise SaveError(f"{final} cannot be written ({problem}); make room or mend the folder's permissions; older checkpoints are whole")
    if world.is_main and keep > 0:
        older = [path for path in _by_step(output_dir) if _step(path) <= state.step]
        for path in older[keep:]:
            if not (keep_every and _step(path) % keep_every == 0) and not (state.best and _step(path) == state.best["step"]):
                shutil.rmtree(path, ignore_errors=True)
    dist.barrier()
    return final


@contextlib.contextmanager
def _failures_kept(engine: Any) -> Iterator[tuple[list[Path], list[str]]]:
    """DeepSpeed's writes by this rank, and what went wrong with them instead of an exception.

    Behind its writes it has collectives, in which the other ranks would wait for a rank that had left.
    """
    written: list[Path] = []
    failures: list[str] = []
    writer, script = engine.checkpoint_engine, engine._copy_recovery_script
    save, makedirs = writer.save, writer.makedirs

    def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            with _kept(failures):
                return function(*arguments, **named)

        return call

    def noted(state_dict: Any, path: str) -> None:
        written.append(Path(path))
        save(state_dict, path)

    writer.save, writer.makedirs, engine._copy_recovery_script = guarded(noted), guarded(makedirs), guarded(script)
    try:
        yield written, failures
    finally:
        writer.save, writer.makedirs, engine._copy_recovery_script = save, makedirs, script
    if failures:
        gc.collect()  # in newer versions of torch the error's frames are a cycle


@contextlib.contextmanager
def _kept(failures: list[str]) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        failures.append(str(error).partition("\n")[0])  # not the error: its frames hold the broken file open, and so its room


def _reason(failure: str, folder: Path) -> str:
    """Why a write failed, in the system's words: torch's writer has none."""
    if not folder.is_dir():
        return failure
    try:
        (probe := folder / f"probe-{os.getpid()}").write_bytes(bytes(1 << 20))
        probe.unlink()
    except OSError as error:
        return str(error)
    return failure


def _settled(file: Path) -> tuple[int, int]:
    """Size and CRC-32 of a file that a power loss cannot take any more."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
    return file.stat().st_size, _crc32(file)


def _crc32(file: Path) -> int:
    found = 0
    with file.open("rb", buffering=0) as handle:
        while block := handle.read(_BLOCK):
            found = zlib.crc32(block, found)
    return found


def _publish(partial: Path, final: Path, description: Mapping[str, Any], files: dict[str, tuple[int, int]]) -> None:
    """List the files, those that no rank has named too, and make the folder visible by its name."""
    for file in partial.rglob("*"):
        if file.is_file() and (name := str(file.relative_to(partial))) not in files:
            files[name] = _settled(file)
    listed = {**description, "files": dict(sorted(files.items()))}
    (partial / _COMPLETE).write_text(json.dumps({**listed, "crc32": _own_sum(listed)}, indent=1))
    _settled(partial / _COMPLETE)
    for folder in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
        _settle_names(folder)
    aside = final.with_name(final.name + ".old.partial")
    if final.exists():
        os.replace(final, aside)
    os.replace(partial, final)
    _settle_names(final.parent)
    remove(aside)


def _own_sum(listed: Mapping[str, Any]) -> int:
    """CRC-32 of the list itself, but for this number: a flipped bit in ``step`` or ``world_size`` would not be noticed otherwise."""
    return zlib.crc32(json.dumps({name: value for name, value in listed.items() if name != "crc32"}, sort_keys=True).encode())


def _settle_names(folder: Path) -> None:
    """Have the folder's entries on the disk, where its file system knows how."""
    handle = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(handle)
    os.close(handle)


def find(output_dir: Path, resume: str, world: World) -> Path | None:
    """The checkpoint to continue from: the newest one without a defect (``auto``), the named one, or None; the same on every rank.

    Rank 0 looks for missing and truncated files, then every rank reads a share of them and compares their sums. Says which checkpoints were
    passed over and why. Raises ConfigError when the named one has a defect, when ``never`` meets a folder that has checkpoints, and when
    ``auto`` finds checkpoints, under whatever name, and none that can be used: ``restart`` takes step 0 then.
    """
    by_name = resume in ("auto", "never", "restart")
    candidates, others = broadcast_object((_by_step(output_dir), _renamed(output_dir)) if by_name else ([Path(resume)], []))
    if resume == "never":
        if candidates:
            raise ConfigError(f"{output_dir} already holds {candidates[0].name}; use train.resume=auto or another output_dir")
        return None
    unusable = []
    for path in candidates:
        defect = _defect(path, world)
        if defect is None:
            for other, step in others:
                if step > _step_of(path):
                    world.say(
                        f"{other} is a checkpoint of step {step} and not continued from for its name; give train.resume its path to do so"
                    )
            return path
        if not by_name:
            raise ConfigError(f"train.resume={path}: {defect}; name a complete checkpoint or use auto")
        world.say(f"passed over {path}: {defect}")
        unusable.append(f"{path.name}: {defect}")
    unusable += [f"{other.name}: it is a checkpoint of step {step} under another name than checkpoint-{step}" for other, step in others]
    if unusable and resume == "auto":
        more = f" ({len(unusable) - 1} more)" if len(unusable) > 1 else ""
        raise ConfigError(
            f"{output_dir} holds checkpoints of which none can be continued from: {unusable[0]}{more}; restore one or give train.resume "
            "the path of another, choose another train.output_dir, or set train.resume to restart to start at step 0 beside them"
        )
    return None


def _renamed(output_dir: Path) -> list[tuple[Path, int]]:
    """Folders that are checkpoints by what is in them and not by their names, with their steps; what a killed save left is none."""
    found = []
    for listed in sorted(output_dir.glob(f"*/{_COMPLETE}")):
        if _NAME.fullmatch(listed.parent.name) or listed.parent.name.endswith(".partial"):
            continue
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            found.append((listed.parent, int(description(listed.parent)["step"])))
    return found


def _step_of(path: Path) -> int:
    return int(description(path)["step"])


def newest(output_dir: Path) -> Path:
    """The newest complete checkpoint of a run folder. Raises ConfigError when there is none."""
    for path in _by_step(output_dir):
        if incomplete(path) is None:
            return path
    raise ConfigError(f"{output_dir} holds no complete checkpoint; train first, or name a checkpoint")


def description(path: Path) -> dict[str, Any]:
    """What a complete checkpoint says of itself: ``step``, ``world_size``, ``run_id``, and ``files`` with their sizes and CRC-32."""
    return parse_json(read_bytes(path / _COMPLETE, MAX_RECORD).decode())


def incomplete(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when every listed file is there in full; their contents are not read."""
    try:
        described = description(path) if (path / _COMPLETE).is_file() else {}  # a pipe would be waited for
        listed = {name: (int(size), int(crc32)) for name, (size, crc32) in described["files"].items()}
        whole = described["crc32"] == _own_sum(described)
        step, ranks, run_id = described["step"], described["world_size"], described.get("run_id")
        if not (type(step) is type(ranks) is int and step >= 0 < ranks and (run_id is None or isinstance(run_id, str))):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return f"{_COMPLETE} is missing or broken, so the checkpoint was never finished"
    if not whole:
        return f"{_COMPLETE} is damaged"
    if (named := _NAME.fullmatch(path.name)) and int(named[1]) != step:
        return f"it was written at step {step}, so its name is wrong"
    for name, (size, _) in listed.items():
        try:
            file = own_file(path, name, _COMPLETE)
        except ConfigError as error:
            return str(error)
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def damaged(path: Path, names: Iterable[str]) -> str | None:
    """Which of these files of a complete checkpoint does not have the contents that were written, or None."""
    listed = description(path)["files"]
    for name in names:
        try:
            found = _crc32(path / name)
        except OSError as error:
            return f"{name} cannot be read ({error})"
        if found != listed[name][1]:
            return f"{name} is damaged: its CRC-32 is {found:08x} instead of {listed[name][1]:08x}"
    return None


def _defect(path: Path, world: World) -> str | None:
    if defect := broadcast_object(incomplete(path) if world.is_main else None):
        return defect
    largest_first = sorted(listed := description(path)["files"], key=lambda name: -listed[name][0])
    reports = gather_objects(damaged(path, largest_first[world.rank :: world.size]), world)
    return next((report for report in reports if report), None)


def load(engine: Any, path: Path, state: TrainState, world: World, output_dir: Path) -> None:
    """Restore weights, optimizer, schedule, random state and ``state`` from a complete checkpoint.

    Where another number of ranks wrote it, it is first cut anew for this one, into a folder of ``output_dir`` that is removed again; that
    takes as much room as the checkpoint, and ConfigError is raised on all ranks where there is none.
    """
    if (ranks := description(path)["world_size"]) == world.size:
        _load(engine, path, path, state, world)
        return
    world.say(f"{path} was written by {ranks} ranks; cutting it anew for {world.size}")
    cut = output_dir / f"{path.name}.anew.partial"
    if world.is_main:
        remove(cut)
        cut.mkdir(parents=True)
    dist.barrier()
    zero, failures = engine.optimizer, list[str]()
    flat = zero.fp32_partitioned_groups_flat if hasattr(zero, "fp32_partitioned_groups_flat") else zero.single_partition_of_fp32_groups
    try:
        with explained(f"{path} cannot be cut anew", "name another checkpoint with train.resume"), _kept(failures):
            shapes, sizes = engine._get_zero_param_shapes(), [tensor.numel() for tensor in flat]
            reshard(path, cut, world.rank, world.size, shapes, sizes, partial(read_states, mmap=True))
        reasons = gather_objects(_reason(failures[0], cut) if failures else None, world)
        if reason := next(filter(None, reasons), None):
            raise ConfigError(f"{path} cannot be cut anew in {output_dir} ({reason}); make room, or start {ranks} ranks")
        _load(engine, cut, path, state, world)
        dist.barrier()
    finally:
        if world.is_main:
            shutil.rmtree(cut, ignore_errors=True)


def kept_state(path: Path) -> TrainState | None:
    """The loop's state in a complete checkpoint, before anything is loaded; None where an older revision kept it among the weights.

    Raises ConfigError for what this revision cannot continue.
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
        if state.best is not None:
            float(state.best["step"]), float(state.best["value"])
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise ConfigError(f"{path}: {error}") from None
        raise ConfigError(f"{path}: its state cannot be read ({error}); name another checkpoint with train.resume") from error
    return state


def _load(engine: Any, folder: Path, path: Path, state: TrainState, world: World) -> None:
    """Load what ``folder`` holds for this number of ranks of the checkpoint ``path``."""
    with explained(f"{path} cannot be loaded", "name another checkpoint with train.resume"), _tensors_alone(engine):
        _, client = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if client is None:
        raise ConfigError(f"{path}: DeepSpeed could not load it; name another checkpoint with train.resume")
    found = kept_state(path) or _state(client.get("loop"), path)
    vars(state).update(vars(found))
    own = path / _RANDOM.format(world.rank % description(path)["world_size"])
    random = read_states(own) if own.is_file() else client.get("rng")  # an older revision kept it among the weights
    if random is None:
        raise ConfigError(f"{path} holds no random state; name another checkpoint with train.resume")
    try:
        set_random_state(random, world.device)
    except (TypeError, KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{own}: its random state cannot be used ({error}); name another checkpoint with train.resume") from error


def read_states(file: str | Path, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """A file of a checkpoint: tensors, and what DeepSpeed pickles beside them. Raises ConfigError for one that holds anything else, which
    would be run."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    known: list[Any] = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    try:
        with torch.serialization.safe_globals(known):
            return torch.load(file, map_location=map_location, mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"WeightsUnpickler error: ([^\n]*)", str(error))  # the rest is advice to run it
        reason = found[1].partition(" was not")[0] if found else str(error).splitlines()[0]
        raise ConfigError(f"{file} holds more than tensors, which would be run ({reason}); name another checkpoint") from error


@contextlib.contextmanager
def _tensors_alone(engine: Any) -> Iterator[None]:
    """DeepSpeed reads its files by ``read_states``: by its own reader, a checkpoint runs what whoever made it has put in."""
    reader = engine.checkpoint_engine
    load = reader.load
    reader.load = lambda path, map_location=None: read_states(path, map_location)
    try:
        yield
    finally:
        reader.load = load


def _by_step(output_dir: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name)), key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))
