"""Launch environment of a process, read without importing torch: rank, number of ranks, cores per rank, and the rank that prints."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

_WAIT_S, _STAGGER_S, _POLL_S = 5.0, 0.2, 0.02
_CLOCK_S = 2.0  # largest error of a process's start time


def num_ranks() -> int:
    """Return the world size set by torchrun, DeepSpeed's launcher or srun; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)


def own_rank() -> int:
    """Return the global rank of this process; 0 without a launcher."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) if num_ranks() > 1 else 0


_others_wait = False


@contextlib.contextmanager
def others_wait() -> Iterator[None]:
    """Within the block, let ``cores_per_rank`` count all cores of this machine, because the other ranks are waiting for this one."""
    global _others_wait
    before, _others_wait = _others_wait, True
    try:
        yield
    finally:
        _others_wait = before


def cores_per_rank() -> int:
    """Return the number of cores per rank on this machine or, within ``others_wait``, the total number of cores."""
    local_ranks = 1 if _others_wait else int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cores // local_ranks)


def default_workers() -> int:
    """Return the default number of data workers per rank: one less than ``cores_per_rank``, but at least 1 and at most 4."""
    return max(1, min(4, cores_per_rank() - 1))


def launcher() -> str:
    """Return a key that identifies this launch on this machine: the process id and start time of the ranks' parent.

    The start time is in ticks since the machine booted. Unlike a wall-clock time, it is the same in every process.
    """
    parent, started = os.getppid(), "0"
    with contextlib.suppress(OSError, IndexError):
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]  # proc(5): field 22; the list starts at field 3
    return f"{parent}-{started}"


@contextlib.contextmanager
def printed_once(sentence: str) -> Iterator[bool]:
    """Choose one of several ranks to print a sentence. Yields True on the chosen rank, which prints within the block, and False on the
    others.

    Usually rank 0 prints, because many users read only its log. The other ranks wait briefly, and one of them prints if rank 0 does not. A
    rank can fail before the process group is initialized, or while others wait in a collective, so the ranks cannot exchange messages.
    Instead, the printing rank creates an empty marker file in the machine's temporary folder, named after the launch and the sentence. The
    sentence is therefore printed once per machine.
    """
    if num_ranks() == 1:
        yield True
        return
    place = f"{os.environ.get('MASTER_PORT')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}/{sentence}"
    key = hashlib.sha256(place.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    mark = Path(tempfile.gettempdir()) / f"cfvlm_ds-{os.getuid()}-{launcher()}-{key}.said"
    if own_rank():
        _wait_for(mark, _WAIT_S + _STAGGER_S * own_rank())
    if _is_printed(mark):
        yield False
        return
    yield True
    with contextlib.suppress(OSError):
        os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        os.utime(mark)


def _wait_for(mark: Path, seconds: float) -> None:
    """Wait for a marker file (see ``printed_once``) while ignoring SIGTERM.

    Once a rank has exited, the launcher sends this signal to the others. It must not change this rank's exit code.
    """
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end = time.monotonic() + seconds
    while time.monotonic() < end and not _is_printed(mark):
        time.sleep(_POLL_S)


def _is_printed(mark: Path) -> bool:
    """Return whether a rank of this launch has created the marker file (see ``printed_once``).

    A marker file older than this process comes from an earlier launch by the same parent, and does not count.
    """
    try:
        return mark.lstat().st_mtime > psutil.Process().create_time() - _CLOCK_S
    except (OSError, psutil.Error):
        return False
