"""One run per folder: a lock that says who holds it, on file systems that may not know flock.

The lock is a file made with O_EXCL, which network file systems honour, and its holder touches it every half minute. It is stale when its
holder's process is gone on this machine, when it is another start of the same Slurm job (which Slurm never runs twice at a time), or when
nobody has touched it for five minutes by the file server's own clock.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from cfvlm_ds.core.errors import ConfigError, StorageError, unwritten
from cfvlm_ds.core.files import replace
from cfvlm_ds.core.secrets import print_line

NAME = "run.lock"
_TOUCHED_EVERY_S = 30.0
_STALE_AFTER_S = 300.0
_NAMED_AFTER_S = 30.0


class RunLock:
    """Holds ``folder/run.lock`` from construction to exit. Raises ConfigError naming the holder when another run has the folder."""

    def __init__(self, folder: Path, say: Callable[[str], object] = print, option: str = "train.output_dir") -> None:
        self.path, self._option = folder / NAME, option
        self._mine = json.dumps(_identity())
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._take(folder, say)
        except OSError as error:
            raise StorageError(f"{unwritten(self.path, error)}; make room, or choose another {option} that may be written") from error
        self._ended, self._failing = threading.Event(), False
        threading.Thread(target=self._touch, daemon=True).start()

    def _take(self, folder: Path, say: Callable[[str], object]) -> None:
        claim = self.path.with_name(f"{NAME}.claim")
        while not self._created():
            try:
                os.close(os.open(claim, os.O_CREAT | os.O_EXCL))  # who has made it may change a lock that is not its own
            except FileExistsError:
                remedy = f"choose another {self._option}, or remove {claim} if that run is gone"
                raise ConfigError(f"another run is starting in {folder}; {remedy}") from None
            try:
                holder = _parsed(_content(self.path) or "")
                reason = self._stale(holder, claim.stat().st_mtime - self.path.stat().st_mtime)  # by the clock of the file server
                if reason is None:
                    raise ConfigError(
                        f"{folder} is in use by {_named(holder)}; choose another {self._option}, or remove {self.path} if that run is gone"
                    )
                replace(self.path, self._mine.encode(), shared=True)
                say(f"took {folder} over from {_named(holder)}: {reason}")
                break
            except FileNotFoundError:
                continue  # released in between
            finally:
                claim.unlink()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Let the folder go."""
        self._ended.set()
        with contextlib.suppress(OSError):  # it must not hide why the run ends, and is stale in any case
            if _content(self.path) == self._mine:
                self.path.unlink(missing_ok=True)

    def _created(self) -> bool:
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with open(handle, "wb", buffering=0) as file:
                if file.write(mine := self._mine.encode()) < len(mine):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self.path.unlink(missing_ok=True)  # an empty one would refuse the next start
            raise
        return _content(self.path) == self._mine  # not where this took so long that another run believed its maker dead

    def _stale(self, holder: dict[str, Any], age: float) -> str | None:
        """Why the holder of a lock that was touched so many seconds ago cannot be alive, or None."""
        here = json.loads(self._mine)
        if holder.get("processes") == here["processes"]:
            return None if _runs(holder) else "its process is gone"
        if holder.get("job") and holder["job"] == here["job"] and holder.get("restart") != here["restart"]:
            return f"Slurm has started job {here['job']} again"
        return f"it has not touched the lock for {age:.0f} s" if age > (_STALE_AFTER_S if holder else _NAMED_AFTER_S) else None

    def _touch(self) -> None:
        while not self._ended.wait(_TOUCHED_EVERY_S):
            try:
                content = _content(self.path)
                if content == self._mine:
                    os.utime(self.path)
                    self._failing = False
                    continue
            except OSError as error:  # a file server that is away for a while
                if not self._failing:
                    print_line(f"warning: {unwritten(self.path, error)}: another run may take the folder over in five minutes")
                self._failing = True
                continue
            if self._ended.is_set():
                return
            # Two must not write here, and the launcher ends the other ranks.
            if content is None and not self.path.parent.is_dir():
                why = f"{self.path.parent} has been removed while this run was writing to it"
            elif content is None:
                why = f"{self.path} has been removed while this run was holding it"
            else:  # suspended for minutes, this run was taken for dead
                why = f"another run has taken {self.path.parent} over"
            print_line(f"error: {why}; this one ends")
            os._exit(1)


def _identity() -> dict[str, Any]:
    process = psutil.Process()
    return {
        "host": socket.gethostname(),
        "pid": process.pid,
        "born": process.create_time(),
        "processes": _process_space(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _process_space() -> str:
    """Where this process's number is meaningful: one boot and one process namespace, since containers share host names."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {psutil.boot_time()}"


def _runs(holder: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(holder["pid"])
        return abs(process.create_time() - holder["born"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError, OverflowError):  # gone, or never the number of a process
        return False


def _content(lock: Path) -> str | None:
    """The lock's content; waits a moment for a holder that has just created the file and is about to write."""
    for _ in range(20):
        try:
            if content := lock.read_text(errors="replace"):
                return content
        except FileNotFoundError:
            return None
        time.sleep(0.05)
    return ""


def _parsed(content: str) -> dict[str, Any]:
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError, RecursionError):
        return {}


def _named(holder: dict[str, Any]) -> str:
    if not holder:
        return "a run that has not said who it is"
    job = f", Slurm job {holder['job']}" if holder.get("job") else ""
    return f"process {holder.get('pid')} on {holder.get('host')}{job}, started {holder.get('started')}"
