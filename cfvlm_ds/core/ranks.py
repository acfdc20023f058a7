"""What a process knows of its launch before torch is imported: its rank, how many there are, and who says what all of them may know."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

_WAIT_S, _STAGGER_S, _POLL_S = 5.0, 0.2, 0.02
_CLOCK_S = 2.0  # by which the time of a process may be wrong


def num_ranks() -> int:
    """Processes of this launch, by torchrun, DeepSpeed's launcher or srun; 1 without one."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)


def own_rank() -> int:
    """The number of this process in its launch."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) if num_ranks() > 1 else 0


def launcher() -> str:
    """What the ranks of one launch on one machine have in common: their parent, and when it was started, in ticks since the machine booted,
    unlike the time of day the same for everyone who asks."""
    parent, started = os.getppid(), "0"
    with contextlib.suppress(OSError, IndexError):
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]  # proc(5): field 22, counted from the third
    return f"{parent}-{started}"


@contextlib.contextmanager
def said_once(sentence: str) -> Iterator[bool]:
    """Whether this rank is the one to print, inside the block, a sentence that others may have to say too.

    Rank 0 prints, for many look at its log alone. Another rank waits a little for that, and prints what rank 0 does not say. Ranks may fail
    before they meet, or while others wait in a collective, so that nothing is sent: who has printed leaves an empty file in the temporary
    folder, named after launch and sentence. So it is once on each machine.
    """
    if num_ranks() == 1:
        yield True
        return
    place = f"{os.environ.get('MASTER_PORT')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}/{sentence}"
    key = hashlib.sha256(place.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    mark = Path(tempfile.gettempdir()) / f"cfvlm_ds-{os.getuid()}-{launcher()}-{key}.said"
    if own_rank():
        _wait_for(mark, _WAIT_S + _STAGGER_S * own_rank())
    if _is_said(mark):
        yield False
        return
    yield True
    _leave(mark)


def _wait_for(mark: Path, seconds: float) -> None:
    """Launchers end the others when the first rank has left: that must not change the exit code of this one."""
    with contextlib.suppress(ValueError):  # of a thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end = time.monotonic() + seconds
    while time.monotonic() < end and not _is_said(mark):
        time.sleep(_POLL_S)


def _is_said(mark: Path) -> bool:
    """Whether a rank of this launch has left the mark. An older one is of another launch by the same parent, and anybody may write here."""
    try:
        stat = mark.lstat()
        return stat.st_uid == os.getuid() and stat.st_mtime > psutil.Process().create_time() - _CLOCK_S
    except (OSError, psutil.Error):
        return False


def _leave(mark: Path) -> None:
    """Leave a mark, and remove those of launches that are over."""
    with contextlib.suppress(OSError):
        os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        os.utime(mark)
        for other in mark.parent.glob(f"cfvlm_ds-{os.getuid()}-*.said"):
            parent = other.name.split("-")[2]
            if parent.isdecimal() and not psutil.pid_exists(int(parent)):
                other.unlink(missing_ok=True)
