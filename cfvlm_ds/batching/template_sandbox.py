"""Running a chat template, which is a program written by whoever made the model folder: bounded in time, memory and output. A tokenizer and
an image processor are tried out in the same way.

Jinja's sandbox keeps a template away from files and the network, but does not stop it from looping or computing 9**9**9. The first
conversation is therefore rendered in a child process with limits that the kernel enforces, every later one under a watch that ends loops.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import resource
import select
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

CPU_SECONDS = 5
"""Processor time for the first conversation, sentence or picture; these take some hundredths of a second."""
MEMORY = 2**30
"""Bytes of memory that these may take on top of what the process already has."""
MAX_WRITTEN = 1_000_000
"""Characters of a conversation of one sentence, or tokens of a picture."""
WATCHED_SECONDS = 20
"""Time of any conversation, on the clock: a busy machine makes a template slow, too."""
_WAITING_SECONDS = 120


class TemplateBound(Exception):
    """A chat template went over a bound, which the message names. ``trial`` is the number of the trial that did."""

    trial = 0


Trial = tuple[Callable[[], int], str]
"""What returns the number of characters or tokens that it makes, and of what it makes them."""


def try_out(*trials: Trial) -> None:
    """Call each trial's function in a child process, which is one for all of them: a fork of so large a process takes longer than they do.
    Raises TemplateBound for the first that goes over a bound.

    What else they raise is not reported: it will be raised again where they are called without a child.
    """
    alive, held = os.pipe()
    pid = _fork()
    if pid == 0:
        _render_and_leave([render for render, _ in trials], held)
    os.close(held)  # the child's end alone is left, and closed when it ends
    os.set_blocking(alive, False)
    deadline = time.monotonic() + _WAITING_SECONDS
    done = ended = status = 0
    with open(alive, "rb", buffering=0) as finished, contextlib.suppress(ChildProcessError):  # somebody else waited for every child
        (poll := select.poll()).register(alive)
        while not ended and time.monotonic() < deadline:
            if not poll.poll(1000):  # another child may have been forked in between, and hold its end too
                ended, status = os.waitpid(pid, os.WNOHANG)
            elif more := finished.read(len(trials)):
                done, deadline = done + len(more), time.monotonic() + _WAITING_SECONDS
            else:
                ended, status = os.waitpid(pid, 0)
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        done += len(finished.read(len(trials)) or b"")
        if (over := _over(status if ended else None, trials[min(done, len(trials) - 1)][1])) is not None:
            over.trial = done
            raise over


def _over(status: int | None, of: str) -> TemplateBound | None:
    """The bound that a child which ended so went over; without a status it did not end."""
    if status is None:
        return TemplateBound(f"takes more than {_WAITING_SECONDS} s for {of}")
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
        return TemplateBound(f"takes more than {CPU_SECONDS} s of processor time for {of}")
    if os.WIFSIGNALED(status):
        return TemplateBound(f"crashes the process that works on {of} (signal {os.WTERMSIG(status)})")
    if os.WEXITSTATUS(status) == _NO_MEMORY:
        return TemplateBound(f"takes more than {MEMORY // 2**20} MiB of memory for {of}")
    if os.WEXITSTATUS(status) == _TOO_LONG:
        return TemplateBound(f"writes more than {MAX_WRITTEN} characters or tokens for {of}")
    return None


_NO_MEMORY, _TOO_LONG = 3, 4


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forks beside threads: the child takes no lock of theirs
        return os.fork()


def _render_and_leave(renders: Sequence[Callable[[], int]], finished: int) -> None:
    code = 0
    try:
        gc.disable()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGXCPU):
            signal.signal(number, signal.SIG_DFL)
        with open("/proc/self/statm") as handle:
            used = int(handle.read().split()[0]) * resource.getpagesize()
        _lower(resource.RLIMIT_CORE, 0)
        _lower(resource.RLIMIT_AS, used + MEMORY)
        for render in renders:
            _lower(resource.RLIMIT_CPU, math.ceil(time.process_time()) + CPU_SECONDS)
            try:
                code = _TOO_LONG if render() > MAX_WRITTEN else 0
            except MemoryError:
                code = _NO_MEMORY
            except BaseException:
                code = 0
            if code:
                break
            os.write(finished, b".")
    except MemoryError:
        code = _NO_MEMORY
    except BaseException:
        code = 0
    finally:
        os._exit(code)


def _lower(limit: int, value: int) -> None:
    hard = resource.getrlimit(limit)[1]
    resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


class _Overdue(BaseException):
    """Raised in a thread whose template takes too long; no template can catch it."""


class _Watch:
    """One thread of a process that looks every second how long each other thread has been rendering."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.since: dict[int, float] = {}
        self.thread: threading.Thread | None = None

    def begin(self, ident: int) -> None:
        with self.lock:
            self.since[ident] = time.monotonic()
            if self.thread is None:
                self.thread = threading.Thread(target=self._look, name="chat template watch", daemon=True)
                self.thread.start()

    def end(self, ident: int) -> None:
        """Returns where nothing was raised in the thread, nor will be."""
        with self.lock:
            overdue = self.since.pop(ident, None) is None
        while overdue:
            time.sleep(0.01)

    def _look(self) -> None:
        while True:
            time.sleep(1)
            with self.lock:
                for ident, since in list(self.since.items()):
                    if time.monotonic() - since > WATCHED_SECONDS:
                        del self.since[ident]
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(_Overdue))


_watch = _Watch()


def _watch_again() -> None:
    global _watch
    _watch = _Watch()  # a forked process has no thread but its own, and the lock may have been held


os.register_at_fork(after_in_child=_watch_again)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """End a template in the block that loops for more than WATCHED_SECONDS. Raises TemplateBound."""
    ident, watch = threading.get_ident(), _watch
    try:
        watch.begin(ident)
        try:
            yield
        except _Overdue:
            raise
        except BaseException:
            watch.end(ident)
            raise
        watch.end(ident)
    except _Overdue:
        raise TemplateBound(f"takes more than {WATCHED_SECONDS} s") from None
