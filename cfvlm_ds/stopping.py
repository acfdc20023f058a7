"""A run that has to stop before its end: somebody asks by a signal, or the time of the Slurm job runs out.

Signals only set a flag. Every rank votes at the start of a step, the votes are added in the step's own all-reduce, and so all ranks stop
behind the same step: they save one checkpoint and exit with ``EXIT_STOPPED``, and the same command continues from there.

SIGUSR1 is what the scripts in slurm/ send before a time limit, SIGTERM what Slurm itself sends first. Ctrl-C still ends a process at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType

import torch
from torch import Tensor

EXIT_STOPPED = 85
"""Exit code of a run that stopped because it was asked to: saved, and to be continued."""
EXIT_HANG = 86
"""Exit code of every rank that has found one of them hanging (see heartbeat.py)."""

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_asked = threading.Event()


def install() -> None:
    """Have SIGUSR1 and SIGTERM ask for a stop, also those that arrived while train.py held them back during its imports."""
    for number in _SIGNALS:
        signal.signal(number, _ask)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _ask(number: int, frame: FrameType | None) -> None:
    _asked.set()


def shield_worker(worker_id: int) -> None:
    """A DataLoader's ``worker_init_fn``: leaves stopping to the rank, since srun and Slurm signal every process of a task.

    SIGTERM is obeyed from the rank itself alone, which ends its workers by it.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, name="cfvlm_ds-terminate", daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class Stop:
    """Whether this run must stop; asked once per step.

    Args:
        margin_s: seconds before the job's end (``SLURM_JOB_END_TIME``, Unix time) by which the next step and a checkpoint must be done. The
            longest time between two votes so far, with whatever evaluation or checkpoint it held, is added.
    """

    def __init__(self, margin_s: float) -> None:
        self._margin_s = margin_s
        self._end = float(os.environ.get("SLURM_JOB_END_TIME", "inf"))
        self._last = time.time()
        self._longest = 0.0

    def votes(self) -> Tensor:
        """[2], to be added over ranks: 1 where a signal has come, 1 where time runs out."""
        now = time.time()
        self._longest, self._last = max(self._longest, now - self._last), now
        return torch.tensor([float(_asked.is_set()), float(now + self._longest + self._margin_s > self._end)])


def reason(votes: Sequence[float]) -> str | None:
    """Why the ranks stop, from the sum of their votes; None when they go on."""
    signalled, late = (vote > 0 for vote in votes)
    if signalled:
        return "a signal asked for it"
    return "the job's time is nearly over" if late else None
