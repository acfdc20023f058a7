"""Training runs with injected faults, each a fault (its name and details) and the run's options.

The runs are executed in order. Every rank prints the exception of a run and continues with the next one.
"""

import contextlib
import fcntl
import functools
import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from test_run_files import full, handle_of
from torch import Tensor

from cfvlm_ds import OBJECTIVES, GroupLayout, Scores, checkpoint
from cfvlm_ds.checkpoint import loading
from cfvlm_ds.cli.exits import exit_cleanly
from cfvlm_ds.cli.train import run
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.data import GroupSampler
from cfvlm_ds.training import run as training
from cfvlm_ds.training import trainer
from cfvlm_ds.training.step import OptimizerStep, StepResult
from cfvlm_ds.training.trainer import Trainer


def rank() -> int:
    return int(os.environ["RANK"])


@contextlib.contextmanager
def nothing() -> Iterator[None]:
    yield


def on_full_disk(write: Callable[..., Any], applies: Callable[..., bool]) -> Callable[..., Any]:
    """Make the system refuse files of more than 50 KB on rank 1 in calls of ``write`` whose arguments ``applies`` accepts."""

    def limited(*arguments: Any) -> Any:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank() == 1 and applies(*arguments):
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            return write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return limited


def full_disk(*steps: int) -> contextlib.AbstractContextManager[Any]:
    """A full disk while checkpoints of these steps are saved."""
    return patch.object(checkpoint, "save", on_full_disk(checkpoint.save, lambda engine, state, *_: state.step in steps))


def full_at_resize() -> contextlib.AbstractContextManager[Any]:
    """A full disk while a checkpoint is resharded."""
    return patch.object(loading, "reshard", on_full_disk(loading.reshard, lambda *_: True))


@contextlib.contextmanager
def full_metrics(run_dir: str, first: int, last: int) -> Iterator[None]:
    """Make the system refuse writes to metrics.jsonl from step ``first`` to step ``last``, and all writes to nonfinite.jsonl."""
    take, kept = OptimizerStep.take, 0

    def stepped(step, number, *arguments):  # type: ignore[no-untyped-def]
        nonlocal kept
        if rank() == 0:
            (Path(run_dir) / "nonfinite.jsonl").mkdir(exist_ok=True)
        done = take(step, number, *arguments)
        if rank() == 0 and number == first:
            kept = full(handle_of(Path(run_dir) / "metrics.jsonl"))
        if rank() == 0 and number == last + 1:
            os.dup2(kept, handle_of(Path("/dev/full")))
        return done

    with patch.object(OptimizerStep, "take", stepped):
        yield


def between() -> None:
    """Wait until all ranks have finished a run before any of them starts the next."""
    dist.barrier()
    print("=== next training", flush=True)


@dataclass(frozen=True, kw_only=True)
class Planted:
    """Objective of value 0 with a fault in one group: a non-finite loss, a non-finite gradient, or an allocation of 1 PiB."""

    weight: float = 0.0
    warmup: float = 0.0
    group: str = ""
    what: str = "loss"
    cells, needs_reference, needs_prior, needs_tokens, needs_blank, divergence = "anchor", False, False, False, False, None

    def denominator(self, layout: GroupLayout) -> Tensor:
        return layout.weight.sum()

    def numerator(self, scores: Scores) -> Tensor:
        here, logp = self.group in scores.layout.ids, scores.logp.sum()
        if here and self.what == "memory":
            torch.empty(1 << 50, dtype=torch.uint8)
        if here and self.what == "gradient":
            return (logp - logp.detach()).abs().sqrt()
        return logp * (torch.nan if here else 0)

    def report(self, scores: Scores) -> dict[str, tuple[Tensor, Tensor]]:
        return {}


OBJECTIVES["planted"] = Planted


@contextlib.contextmanager
def left_out(number: int) -> Iterator[None]:
    """Make step ``number`` only read its data, as a skipped step should."""
    take = OptimizerStep.take

    def stepped(step, at, batches, *arguments):  # type: ignore[no-untyped-def]
        if at != number:
            return take(step, at, batches, *arguments)
        for _ in range(step.config.train.gradient_accumulation_steps):
            next(batches)
        return StepResult(None, False, 0.0, [])

    with patch.object(OptimizerStep, "take", stepped):
        yield


@contextlib.contextmanager
def without(index: int) -> Iterator[None]:
    """Make the sampler leave group ``index`` out of its micro-batch."""
    batches = GroupSampler.__iter__

    def fewer(self: GroupSampler) -> Iterator[list[int]]:
        return ([group for group in batch if group != index] for batch in batches(self))

    with patch.object(GroupSampler, "__iter__", fewer):
        yield


@contextlib.contextmanager
def taken(lock: str) -> Iterator[None]:
    """Lock the run folder as another run would."""
    if rank() != 0:
        yield
        return
    Path(lock).parent.mkdir()
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        json.dump({"host": "node9", "pid": 7, "job": "4711", "started": "yesterday"}, file)
        file.flush()
        yield


class Stopped(Exception):
    """Planned end of a run, from which a later run resumes."""


@contextlib.contextmanager
def stopped(step: int) -> Iterator[None]:
    """End the run after it has saved this step."""
    save = checkpoint.save

    def last(engine, state, *arguments):  # type: ignore[no-untyped-def]
        save(engine, state, *arguments)
        if state.step == step:
            raise Stopped("as planned")

    with patch.object(checkpoint, "save", last):
        yield


@contextlib.contextmanager
def slow_gathers(delay: float, told: str) -> Iterator[None]:
    """Make every collective that gathers weights take ``delay`` seconds longer. Rank 0 appends the additional seconds of each step to the
    file ``told``.
    """
    from deepspeed import comm

    take, slept = OptimizerStep.take, 0.0

    def slow(gather):  # type: ignore[no-untyped-def]
        def slower(*arguments, **options):  # type: ignore[no-untyped-def]
            nonlocal slept
            time.sleep(delay)
            slept += delay
            return gather(*arguments, **options)

        return slower

    def told_step(step, *arguments):  # type: ignore[no-untyped-def]
        nonlocal slept
        slept = 0.0  # the delays of evaluations and of the check before the first step do not belong to a step
        done = take(step, *arguments)
        if rank() == 0:
            with Path(told).open("a") as handle:
                handle.write(f"{slept}\n")
        return done

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(OptimizerStep, "take", told_step))
        for name in ("allgather_fn", "all_gather_into_tensor", "all_gather_coalesced"):
            stack.enter_context(patch.object(comm, name, slow(getattr(comm, name))))
        yield


@contextlib.contextmanager
def branched(source: str) -> Iterator[None]:
    """Copy another run's folder. This run resumes in the copy."""
    if rank() == 0:
        shutil.copytree(source, source.replace("broken", "allowed"))
    dist.barrier()
    yield


@contextlib.contextmanager
def unchanged(folder: str, late: bool = False) -> Iterator[None]:
    """Print the files of a run folder that a refused start has changed. With ``late``, the start is refused after the model is loaded."""
    before = contents(Path(folder)) if rank() == 0 else {}
    try:
        with patch.object(training, "_check_scores", refuse) if late else contextlib.nullcontext():
            yield
    finally:
        if rank() == 0:
            after = contents(Path(folder))
            changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
            print(f"changed {changed}", flush=True)


def contents(run_dir: Path) -> dict[str, bytes]:
    """Return the contents of all files in a run folder except heartbeats, keyed by relative path."""
    files = [path for path in run_dir.rglob("*") if path.is_file() and "heartbeat" not in path.relative_to(run_dir).parts]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in sorted(files)}


def refuse(*arguments: object) -> None:
    raise ConfigError("the scores are wrong")


@contextlib.contextmanager
def slow_export(limit: float) -> Iterator[None]:
    """Make the export take three times the timeout of collectives, while it makes progress. The timeout is set after training."""
    finish, export = Trainer._finish, trainer.export_checkpoint

    def finished(ending, tracker):  # type: ignore[no-untyped-def]
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=limit), dist.group.WORLD)
        finish(ending, tracker)
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=30), dist.group.WORLD)

    def exported(config, checkpoint, say, alive, dtype):  # type: ignore[no-untyped-def]
        end = time.monotonic() + 3 * limit
        while time.monotonic() < end:
            alive()
            time.sleep(0.1)
        export(config, checkpoint, say, alive, dtype)

    with patch.object(Trainer, "_finish", finished), patch.object(trainer, "export_checkpoint", exported):
        yield


FAULTS = {
    "slow export": slow_export,
    "branched": branched,
    "unchanged": unchanged,
    "slow gathers": slow_gathers,
    "taken": taken,
    "stopped": stopped,
    "exit": nothing,
    "left out": left_out,
    "without": without,
    "nothing": nothing,
    "full disk": full_disk,
    "full at resize": full_at_resize,
    "full metrics": full_metrics,
}


def train_listed(plans: Sequence[tuple[list[Any], list[str]]]) -> None:
    for index, ((name, *details), arguments) in enumerate(plans):
        if index:
            between()
        if name == "exit":
            exit_cleanly(functools.partial(run, arguments))
        try:
            with FAULTS[name](*details):
                run(arguments)
        except Exception as error:
            print(f"rank {rank()} raised {type(error).__name__}: {error}", flush=True)
