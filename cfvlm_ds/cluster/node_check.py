"""Node check for a Slurm job: one task per node runs before the ranks start, and reports whether its node works.

Each task checks its node's GPUs, connects to the first node's TCP store, and checks that its packages and code match the first node's. All
tasks then run one collective, and the first node prints the measured bandwidth. Each task writes one line to ``FOLDER/NODE``: ``ok``,
``bad: WHY``, or ``waited: WHY`` if the fault is on another node or in the network. A node that does not write a line cannot start Python,
sees a different file system, or does not respond. slurm/launch.sh reports these nodes as well.
"""

from __future__ import annotations

import hashlib
import os
import platform
import socket
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from cfvlm_ds.core.distributed import all_reduce_rate, own_device
from cfvlm_ds.core.errors import ConfigError, first_line
from cfvlm_ds.core.files import replace
from cfvlm_ds.core.versions import PACKAGE, version

PACKAGES = ("torch", "transformers", "deepspeed", "mlflow", "peft")
FLOOR = "CFVLM_MIN_GB_S"
"""Environment variable for the minimum bandwidth between nodes, in GB/s."""


def check(folder: Path, timeout_s: float) -> str:
    """Check the node that this task of ``srun --ntasks-per-node=1`` runs on. Writes the result line to ``folder`` and returns it.

    Needs the environment variables MASTER_ADDR and MASTER_PORT. ``timeout_s`` is the time limit in seconds for all tasks to connect, and
    the same limit applies to the collective that follows. Raises OSError if ``folder`` does not exist or cannot be written.
    """
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    line = _check(name, timeout_s)
    replace(folder / name, f"{line}\n".encode())
    return line


def software() -> str:
    """Return the versions that must match across nodes: Python, the packages, and a hash of this package's code."""
    versions = [f"{name} {version(name)}" for name in PACKAGES]
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    return ", ".join([f"python {platform.python_version()}", *versions, f"code {digest.hexdigest()[:12]}"])


def gpu_fault(expected: int | None) -> str | None:
    """Describe a GPU fault on this node, or return None. ``expected`` is the number of GPUs that Slurm allocated, or None if unknown."""
    visible = torch.cuda.device_count()
    if expected is not None and visible != expected:
        return f"Slurm allocated {expected} GPUs, but torch finds {visible}"
    for index in range(visible):
        try:
            torch.ones(8, device=f"cuda:{index}").sum().item()
        except RuntimeError as error:
            return f"GPU {index} does not compute: {first_line(error)}"
    return None


def _check(name: str, timeout_s: float) -> str:
    needed = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "MASTER_ADDR", "MASTER_PORT")
    if absent := [name for name in needed if name not in os.environ]:
        raise ConfigError(f"the node check runs as srun tasks, but {absent[0]} is not set; see slurm/launch.sh")
    rank, size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_STEP_NUM_TASKS"])
    own = software()
    num_gpus = os.environ.get("SLURM_GPUS_ON_NODE")
    fault = gpu_fault(int(num_gpus) if num_gpus else None)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = timedelta(seconds=timeout_s)
    try:
        store = dist.TCPStore(address, port, size, is_master=rank == 0, timeout=limit, wait_for_workers=False)
        if rank == 0:
            store.set("software", own)
        first = store.get("software").decode()
        if fault is None and own != first:
            fault = f"it has {_difference(own, first)}, but {address} has {_difference(first, own)}"
        store.set(f"node {rank}", "ok" if fault is None else "bad")
        others = [store.get(f"node {other}") for other in range(size)]
    except (dist.DistError, RuntimeError) as error:
        return f"bad: {fault}" if fault else f"waited: no meeting at {address}:{port} within {timeout_s:g} s: {first_line(error)}"
    if fault:
        return f"bad: {fault}"
    if b"bad" in others:
        return "ok"
    try:
        rate = _collective(store, rank, size, limit)
    except (dist.DistError, RuntimeError) as error:
        return f"waited: the collective failed: {first_line(error)}"
    if rank == 0:
        print(f"{size} nodes with {own}\nall-reduce between the nodes: {rate:.1f} GB/s", flush=True)
    if size > 1 and rate < (least := float(os.environ.get(FLOOR) or 0)):
        return (
            f"waited: the nodes exchange only {rate:.1f} GB/s, but {FLOOR} is {least:g}; check for a link that is down or a wrong network"
        )
    return "ok"


def _collective(store: dist.Store, rank: int, size: int, limit: timedelta) -> float:
    """Return the all-reduce bandwidth between the nodes in GB/s. Raises the same errors as ``all_reduce_rate``."""
    device = own_device()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size, timeout=limit)
    rate = all_reduce_rate(device)
    dist.destroy_process_group()
    store.set(f"left {rank}", "")
    for other in range(size) if rank == 0 else ():  # rank 0 hosts the store, so it leaves last
        store.get(f"left {other}")
    return rate


def _difference(one: str, other: str) -> str:
    return ", ".join(part for part in one.split(", ") if part not in other.split(", "))
