"""Distributed processes: rank, world size, collectives, random state and rank-0 output. The same code runs on one CPU and on 64 GPUs."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cfvlm_ds.core.errors import ConfigError, InputError, StorageError
from cfvlm_ds.core.files import replace
from cfvlm_ds.core.ranks import launcher, others_wait
from cfvlm_ds.core.secrets import print_line
from cfvlm_ds.core.verbosity import shows_progress


@dataclass(frozen=True)
class World:
    """Place of this process in the distributed job: rank, world size and device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on rank 0, the only rank that prints, logs metrics and exports the model."""
        return self.rank == 0

    def wait(self) -> None:
        """Block until every rank has called this method."""
        if self.size > 1:
            dist.barrier()

    def say(self, message: str) -> None:
        """Print a message on rank 0, with secrets masked. With --quiet, only warnings are printed."""
        if self.is_main and (shows_progress() or message.startswith("warning: ")):
            print_line(message)


def own_device() -> torch.device:
    """Return the current CUDA device if a GPU is available, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def usual_dtype(device: torch.device) -> torch.dtype:
    """Return the default dtype for inference: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def launch_environment() -> None:
    """Set the environment variables that a launcher would set. In an ``srun`` task, they are derived from Slurm's variables. Without a
    launcher, the process becomes the only rank, and torch selects a free port (MASTER_PORT 0).
    """
    if "RANK" not in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ and "MASTER_ADDR" in os.environ:
        slurm = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
        os.environ.update({name: os.environ[value] for name, value in slurm.items()})
        os.environ["LOCAL_WORLD_SIZE"] = str(_tasks_on_node(os.environ["SLURM_STEP_TASKS_PER_NODE"], int(os.environ["SLURM_NODEID"])))
    elif "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


@contextlib.contextmanager
def meeting_point() -> Iterator[None]:
    """Set MASTER_PORT to the port of the rendezvous. The process group must be initialized within the block.

    DeepSpeed's launcher gives every training run port 29500, so a second run on the same machine would fail. If all ranks are on one node
    and MASTER_PORT is 29500, rank 0 selects a free port and publishes it in a file named after the launcher (the ranks' parent
    process). Any other port was set by the user or torchrun's agent and is kept.
    """
    port_is_chosen = dist.is_initialized() or "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get("CROSS_SIZE") != "1"
    if port_is_chosen or os.environ.get("MASTER_PORT", _DEFAULT_PORT) != _DEFAULT_PORT:
        yield
        return
    main, published = os.environ["RANK"] == "0", Path(tempfile.gettempdir()) / f"cfvlm_ds-{os.getuid()}-{launcher()}.port"
    if main:
        with socket.socket() as probe:
            probe.bind(("", 0))
            replace(published, str(probe.getsockname()[1]).encode(), shared=True)
    os.environ["MASTER_PORT"] = _published_port(published)
    try:
        yield
    finally:
        if main:
            published.unlink(missing_ok=True)


_DEFAULT_PORT = "29500"
_PORT_TIMEOUT_S = 300.0


def _published_port(file: Path) -> str:
    """Wait until rank 0 publishes a port in ``file``, and return the port. A file that belongs to another user is ignored."""
    end = time.monotonic() + _PORT_TIMEOUT_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError), file.open() as handle:
            if os.fstat(handle.fileno()).st_uid == os.getuid():
                return handle.read()
        time.sleep(0.05)
    raise ConfigError(f"rank 0 did not publish a port in {file} within {_PORT_TIMEOUT_S:g} s; pass --master_port to the launcher")


def _tasks_on_node(notation: str, node: int) -> int:
    """Parse Slurm's notation for tasks per node, and return the number of tasks on node ``node``. "8(x2),1" means 8, 8, 1."""
    counts: list[int] = []
    for part in notation.split(","):
        tasks, _, repeats = part.partition("(x")
        counts += [int(tasks)] * int(repeats.rstrip(")") or 1)
    return counts[node]


def all_reduce_sums(values: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Sum every tensor over all ranks in one collective, in float64, and return the sums. The tensors must have the same order and shapes
    on all ranks.
    """
    flat = [value.detach().to(device=device, dtype=torch.float64).reshape(-1) for value in values]
    joined = torch.cat(flat)
    dist.all_reduce(joined)
    parts = joined.split([len(part) for part in flat])
    return [part.view(value.shape) for value, part in zip(values, parts, strict=True)]


def all_reduce_rate(device: torch.device) -> float:
    """Measure the bandwidth of an all-reduce of 256 MiB (16 MiB on CPUs) over all ranks, after a warm-up all-reduce.

    Returns the slowest rank's bus bandwidth in GB/s, as defined by nccl-tests: each of n ranks sends 2 (n - 1) / n bytes per reduced byte.
    Raises RuntimeError if the sum is wrong.
    """
    size = dist.get_world_size()
    for _ in range(2):
        ones = torch.ones(2 ** (26 if device.type == "cuda" else 22), device=device)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(ones)
        if not bool((ones == size).all()):
            raise RuntimeError("the sum is wrong")
        duration = torch.tensor(time.perf_counter() - start, device=device)
    dist.all_reduce(duration, dist.ReduceOp.MAX)
    return ones.nbytes * 2 * (size - 1) / size / duration.item() / 1e9


def gather_objects(item: Any, world: World) -> list[Any]:
    """Gather every rank's ``item``, and return the items in rank order on all ranks. With a single rank, no process group is needed."""
    if world.size == 1:
        return [item]
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, item)
    return gathered


def broadcast_object(item: Any) -> Any:
    """Return rank 0's ``item`` on every rank."""
    box = [item]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class ProgressBarrier:
    """Barrier that is not subject to the timeout of collectives: a rank waits for as long as any rank is still making progress.

    Every rank must create the barrier at the same point of the program, call ``alive`` while it works, and call ``meet`` to wait for the
    other ranks.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._name, self._meetings = f"cfvlm_ds/barrier/{next(_BARRIERS)}", 0
        self._store: Any = None if world.size == 1 else dist.distributed_c10d._get_default_store()
        self._last_sign = -math.inf

    def alive(self) -> None:
        """Report that this rank is making progress. This is cheap enough to call for every work item."""
        if self._store is not None and (now := time.monotonic()) - self._last_sign > _SIGN_OF_LIFE_S:
            self._last_sign = now
            self._store.add(f"{self._name}/alive", 1)

    def meet(self) -> None:
        """Wait for every rank, so that all ranks enter the next collective together. If no rank shows a sign of life for half an hour,
        raises a TimeoutError that names the missing ranks.
        """
        self.alive()
        if self._store is None:
            return
        self._meetings += 1
        arrivals = [f"{self._name}/{self._meetings}/{rank}" for rank in range(self._world.size)]
        self._store.set(arrivals[self._world.rank], "here")
        signs, since = -1, time.monotonic()
        while not self._store.check(arrivals):
            if (current := self._store.add(f"{self._name}/alive", 0)) != signs:
                signs, since = current, time.monotonic()
            if time.monotonic() - since > _LIMIT_S:
                missing = ", ".join(str(rank) for rank, key in enumerate(arrivals) if not self._store.check([key]))
                raise TimeoutError(f"no sign of life from rank {missing} for {_LIMIT_S:.0f} s")
            time.sleep(_POLL_S)


def run_on_rank0(world: World, function: Callable[[], Any], barrier: ProgressBarrier | None = None) -> Any:
    """Call a function on rank 0, and return its result or raise its error on every rank. If the call can take a long time, pass a
    ``barrier`` for the other ranks to wait at.
    """
    result: Any = None
    problem: InputError | None = None
    if world.is_main:
        try:
            with others_wait():
                result = function()
        except InputError as error:
            problem = error
        except OSError as error:
            problem = StorageError(str(error))
    if barrier is not None:
        barrier.meet()
    if world.size > 1:
        result, problem = broadcast_object((result, problem))
    if problem is not None:
        raise problem
    return result


_BARRIERS = itertools.count()
_SIGN_OF_LIFE_S, _POLL_S, _LIMIT_S = 5.0, 0.1, 1800.0


def seed_everything(seed: int) -> None:
    """Seed the random generators of Python and torch, identically on every rank. The data order does not depend on their state."""
    random.seed(seed)
    torch.manual_seed(seed)


def isolated_rng() -> torch.Generator:
    """Return a generator for the seeds of a DataLoader's iterators.

    A resumed run and an uninterrupted run create their iterators at different steps. If the iterators drew their seeds from torch's global
    generator, dropout would differ between the two runs.
    """
    return torch.Generator()


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of Python's and torch's random generators, on the CPU and on ``device``."""
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore a state that ``random_state`` returned, possibly on a different kind of device."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextlib.contextmanager
def preserve_rng(device: torch.device) -> Iterator[None]:
    """Restore the random state at the end of the block, so that random numbers drawn inside it do not affect later ones."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)
