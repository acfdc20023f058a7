"""Stop requests, from signals and from a Slurm job's time limit.

While ranks train or evaluate, a signal only sets a flag. Every rank votes at the start of a step and before each forward pass of an
evaluation, and the votes are summed over ranks, so all ranks stop after the same step. They save a checkpoint and exit with
``EXIT_STOPPED``. Running the same command again resumes the run. Before the first step and after the last evaluation, there is nothing to
save, so a signal to any rank immediately terminates all ranks with the same exit code.

The scripts in slurm/ send SIGUSR1 before the time limit. Slurm itself sends SIGTERM before it kills a job, and Ctrl-C sends SIGINT. A
second Ctrl-C terminates the run immediately with ``EXIT_INTERRUPTED``. A thread receives the signals, because Python's handlers run in the
main thread, which can be blocked in a collective.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:  # a command's --help does not need these imports
    from torch import Tensor

    from cfvlm_ds.core.distributed import World

EXIT_STOPPED = 85
"""Exit code of a run that stopped on request. Its state is saved, so it can be resumed."""
EXIT_HANG = 86
"""Exit code of every rank that has detected a hung rank (see heartbeat.py)."""
EXIT_DISK_FULL = 87
"""Exit code of a command that failed because a disk was full or a quota was exceeded."""
EXIT_INTERRUPTED = 130
"""Exit code of a run that a second Ctrl-C aborted. Its work since the last checkpoint is lost."""

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_ONE_PRESS_S = 1.0  # a terminal and a launcher may both forward the same Ctrl-C
_LEAVE_WITHIN_S, _NOTIFIED_WITHIN_S, _POLL_S = 10.0, 4.0, 1.0
_LEAVING, _NOTIFIED = "cfvlm_ds/leaving", "cfvlm_ds/notified"
_stop_requested = threading.Event()
_together = False
_left = threading.Lock()
_before_leaving: list[Callable[[int], object]] = []


def install() -> None:
    """Install signal handlers that request a stop. They also handle signals that arrived during train.py's imports, when signals are
    blocked.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in _SIGNALS:
        signal.signal(number, lambda number, frame: _stop_requested.set())
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # A child process must not report its signals to the parent: a SIGTERM to a process pool's worker would stop the run.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=_listen, args=(reader,), name="cfvlm_ds-signals", daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _listen(reader: int) -> None:
    pressed = None
    while numbers := os.read(reader, 64):
        for number in numbers:
            if number not in _SIGNALS:  # other signals with handlers, such as SIGCHLD
                continue
            _stop_requested.set()
            if not _together:
                _leave(EXIT_STOPPED)
            if number == signal.SIGINT:
                now = time.monotonic()
                if pressed is not None and now - pressed > _ONE_PRESS_S:
                    _leave(EXIT_INTERRUPTED)
                pressed = pressed or now


def _leave(code: int) -> None:
    """Run the actions registered with ``before_leaving`` within a time limit, and terminate this process and its children."""
    if not _left.acquire(blocking=False):
        return

    def leave() -> None:
        for action in reversed(_before_leaving):
            with contextlib.suppress(Exception):
                action(code)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()

    last = threading.Thread(target=leave, daemon=True)
    last.start()
    last.join(_LEAVE_WITHIN_S)
    with contextlib.suppress(psutil.Error):
        for child in (children := psutil.Process().children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                child.kill()
        if children:
            time.sleep(0.5)  # time for a thread that compiles an extension to release its lock; the next start would wait for it
    os._exit(code)


@contextlib.contextmanager
def last_word() -> Iterator[None]:
    """Wait forever at the end of the block if a signal is terminating the process.

    Otherwise, an error in the block could change the exit code or the output, for example if the same signal killed a data worker.
    """
    try:
        yield
    finally:
        if _left.locked():
            threading.Event().wait()


@contextlib.contextmanager
def before_leaving(action: Callable[[int], object]) -> Iterator[None]:
    """Within the block, call ``action`` with the exit code if a signal terminates the process immediately. The last action registered is
    called first.
    """
    _before_leaving.append(action)
    try:
        yield
    finally:
        _before_leaving.remove(action)


@contextlib.contextmanager
def leaving_together(world: World) -> Iterator[None]:
    """Within the block, notify the other ranks if a signal terminates this rank immediately, so that they exit with the same code."""
    if world.size == 1:
        yield
        return
    import torch.distributed as dist

    shared: Any = dist.distributed_c10d._get_default_store()
    store, over = shared.clone(), threading.Event()  # a separate connection, because the shared one may be in use

    def notify(code: int) -> None:
        store.set(_LEAVING, str(code))
        store.add(_NOTIFIED, 1)
        end = time.monotonic() + _NOTIFIED_WITHIN_S
        while store.add(_NOTIFIED, 0) < world.size and time.monotonic() < end:
            time.sleep(_POLL_S)

    def watch() -> None:
        with contextlib.suppress(RuntimeError):  # rank 0, which hosts the store, has crashed
            while not over.wait(_POLL_S):
                if store.check([_LEAVING]):
                    _leave(int(store.get(_LEAVING)))

    watcher = threading.Thread(target=watch, name="cfvlm_ds-leaving", daemon=True)
    watcher.start()
    try:
        with before_leaving(notify):
            yield
    finally:
        over.set()
        watcher.join()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Defer signals to the ranks' vote within the block, so that the ranks stop together or not at all."""
    global _together
    before, _together = _together, True
    try:
        yield
        if _stop_requested.is_set() and not before:  # the signal arrived after the last vote
            _leave(EXIT_STOPPED)
    finally:
        _together = before


class StopRequested(Exception):
    """The ranks have agreed to stop during an evaluation. The message gives the reason."""


class WorkerLost(Exception):
    """A data worker has died on some rank before any rank started the step."""


def shield_worker(worker_id: int) -> None:
    """Make a data worker ignore stop signals. This is a ``worker_init_fn`` for a DataLoader.

    srun, Slurm and terminals send signals to every process of a task, but only the rank decides when to stop. A worker therefore obeys
    SIGTERM only if it comes from its rank, which terminates its workers this way.
    """
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, name="cfvlm_ds-terminate", daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


@contextlib.contextmanager
def worker_deaths() -> Iterator[None]:
    """Within the block, raise WorkerLost instead of torch's error if a data worker dies.

    The worker's connection closes a moment before torch reports the death. After a connection error, this function waits for the report.
    """
    try:
        try:
            yield
        except (ConnectionError, EOFError):
            from torch._C import _error_if_any_worker_fails

            for _ in range(100):
                _error_if_any_worker_fails()
                time.sleep(0.02)
            raise
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise WorkerLost(" ".join(str(error).split()).rstrip(".")) from error


_torchs_handler: Any = None


def defer_worker_deaths() -> None:
    """Make a DataLoader's SIGCHLD handler raise errors only within ``deferred_deaths_raised``, because an error elsewhere would interrupt
    a step.
    """
    global _torchs_handler
    if threading.current_thread() is threading.main_thread() and callable(handler := signal.getsignal(signal.SIGCHLD)):
        _torchs_handler = handler
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@contextlib.contextmanager
def deferred_deaths_raised() -> Iterator[None]:
    """Within the block, raise an error as soon as a data worker dies, or at the start of the block if a worker has already died."""
    if _torchs_handler is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGCHLD, _torchs_handler)
    try:
        _torchs_handler(signal.SIGCHLD, None)
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


class Stop:
    """Vote of the ranks, once per step, on whether to stop the run.

    Args:
        margin_s: margin in seconds for a step and a checkpoint. The ranks stop if the time until the job ends (``SLURM_JOB_END_TIME``, a
            Unix time) is less than this margin plus the longest interval so far between two votes. Such an interval can include an
            evaluation or a checkpoint.
    """

    def __init__(self, margin_s: float) -> None:
        self._margin_s = margin_s
        self._end = math.inf
        with contextlib.suppress(ValueError):  # a site may use a different format
            self._end = float(os.environ.get("SLURM_JOB_END_TIME", "inf"))
        self._last = time.time()
        self._longest = 0.0

    def votes(self) -> Tensor:
        """Return this rank's votes [2], to be summed over ranks: whether a signal has arrived, and whether time is running out (1 or 0)."""
        now = time.time()
        self._longest, self._last = max(self._longest, now - self._last), now
        import torch

        return torch.tensor([float(_stop_requested.is_set()), float(now + self._longest + self._margin_s > self._end)])


def reason(votes: Sequence[float]) -> str | None:
    """Return the reason to stop, or None to continue. ``votes`` is the sum of the ranks' votes."""
    signalled, late = (vote > 0 for vote in votes)
    if signalled:
        return "a signal was received"
    return "the job's time limit is near" if late else None
