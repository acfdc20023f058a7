"""Running a chat template, which is a program written by whoever made the model folder: bounded in time, memory and output. A tokenizer and
an image processor are tried out in the same way.

Jinja's sandbox keeps a template away from files and the network, but does not stop it from looping or computing 9**9**9. The first
conversation is therefore rendered in a child process with limits that the kernel enforces, every later one under a watch that ends loops.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import select
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator

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
    """A chat template went over a bound, which the message names."""


def try_out(render: Callable[[], int], of: str = "a conversation of one sentence") -> None:
    """Call ``render``, which returns the number of characters or tokens that it makes ``of`` something, in a child process. Raises
    TemplateBound.

    What else ``render`` raises is not reported: it will be raised again where it is called without a child.
    """
    alive, held = os.pipe()
    pid = _fork()
    if pid == 0:
        _render_and_leave(render)
    os.close(held)  # the child's end alone is left, and closed when it ends
    deadline = time.monotonic() + _WAITING_SECONDS
    ended, status = 0, 0
    with open(alive, "rb", buffering=0), contextlib.suppress(ChildProcessError):  # somebody else waited for every child
        (poll := select.poll()).register(alive)
        while not ended and time.monotonic() < deadline:
            if poll.poll(1000):
                ended, status = os.waitpid(pid, 0)
            else:  # another child may have been forked in between, and hold its end too
                ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TemplateBound(f"takes more than {_WAITING_SECONDS} s for {of}")
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
        raise TemplateBound(f"takes more than {CPU_SECONDS} s of processor time for {of}")
    if os.WIFSIGNALED(status):
        raise TemplateBound(f"crashes the process that works on {of} (signal {os.WTERMSIG(status)})")
    if os.WEXITSTATUS(status) == _NO_MEMORY:
        raise TemplateBound(f"takes more than {MEMORY // 2**20} MiB of memory for {of}")
    if os.WEXITSTATUS(status) == _TOO_LONG:
        raise TemplateBound(f"writes more than {MAX_WRITTEN} characters or tokens for {of}")


_NO_MEMORY, _TOO_LONG = 3, 4


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forks beside threads: the child takes no lock of theirs
        return os.fork()


def _render_and_leave(render: Callable[[], int]) -> None:
    code = 0
    try:
        gc.disable()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGXCPU):
            signal.signal(number, signal.SIG_DFL)
        with open("/proc/self/statm") as handle:
            used = int(handle.read().split()[0]) * resource.getpagesize()
        _lower(resource.RLIMIT_CORE, 0)
        _lower(resource.RLIMIT_CPU, CPU_SECONDS)
        _lower(resource.RLIMIT_AS, used + MEMORY)
        code = _TOO_LONG if render() > MAX_WRITTEN else 0
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
