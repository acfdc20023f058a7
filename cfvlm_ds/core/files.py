"""Small files of a run folder, on a disk that may be full or fail for a while: what they say is not worth a training.

The folder may be one that somebody else has prepared: nothing is written through a link, and a pipe is not waited for.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

from cfvlm_ds.core.errors import unwritten
from cfvlm_ds.core.reading import read_bytes

Say = Callable[[str], object]


_APPENDING = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def create(path: Path) -> IO[bytes]:
    """A new file to write, in place of a file or a link of this name; never the file that a link leads to. Raises OSError."""
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb")


def remove(path: Path) -> None:
    """Remove a folder with all it holds, or a file; of a link, only the link."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def replace(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, never meets half of it. Raises OSError that names the file, and leaves nothing."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with create(temporary) as file:
            file.write(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise _named(error, path) from error


def update(path: Path, content: bytes) -> None:
    """``replace`` unless the file has this content already: a run that goes on needs no room for it."""
    with contextlib.suppress(OSError, ValueError):
        if read_bytes(path, len(content)) == content:
            return
    replace(path, content)


def keep(path: Path, text: str, say: Say) -> bool:
    """``replace`` where a file that cannot be written is a warning. Whether it was written."""
    try:
        replace(path, text.encode())
    except OSError as error:
        say(f"warning: {unwritten(path, error)}; the run goes on without it")
        return False
    return True


def append(path: Path, line: str, say: Say) -> bool:
    """Add a whole line or nothing, where a failure is a warning. Whether it was added."""
    try:
        with os.fdopen(os.open(path, _APPENDING, 0o666), "ab", buffering=0) as file:
            size = file.tell()
            try:
                _write(file.fileno(), bytearray(line.encode() + b"\n"))
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(size)  # takes no room
                raise
    except OSError as error:
        say(f"warning: {unwritten(path, error)}; the run goes on without this line of it: {line}")
        return False
    return True


class Lines:
    """A file that grows by lines. What cannot be written waits in memory, and every later line tries again, in order.

    A line of which the disk took a part goes on where it stopped, so nobody else may write the file meanwhile.

    Args:
        say: gets a sentence when writing fails for the first time, when it works again, and when something is lost in the end.
    """

    def __init__(self, path: Path, say: Say) -> None:
        self.path, self._say = path, say
        self._waiting = bytearray()
        self._error: OSError | None = None
        self._handle: int | None = None
        self._lock = threading.Lock()
        self.closed = False
        self._flush()

    def write(self, line: str) -> None:
        """Add a line, now or as soon as the disk takes it."""
        with self._lock:
            self._waiting += line.encode() + b"\n"
            self._flush()

    def close(self) -> list[str]:
        """Try a last time; the lines that are lost. Later calls do nothing."""
        if self.closed:
            return []
        with self._lock:
            return self._closed()

    def _closed(self) -> list[str]:
        self.closed = True
        self._flush()
        if self._handle is not None:
            try:
                os.close(self._handle)
            except OSError as error:  # of earlier writes, on network file systems
                self._error = error
                self._say(f"{unwritten(self.path, error)}: its last lines may be lost")
        return self._waiting.decode().splitlines()

    def _flush(self) -> None:
        try:
            if self._handle is None:
                self._handle = os.open(self.path, _APPENDING, 0o644)
            _write(self._handle, self._waiting)
        except OSError as error:
            if self._error is None:
                self._say(f"{unwritten(self.path, error)}: what belongs there waits in memory, and is tried again with every record")
            self._error = error
            if error.errno == errno.ESTALE and self._handle is not None:  # NFS: the name may be good, the handle never again
                with contextlib.suppress(OSError):
                    os.close(self._handle)
                self._handle = None
            return
        if self._error is not None:
            self._say(f"{self.path} can be written again, and has everything")
        self._error = None


def _write(handle: int, waiting: bytearray) -> None:
    """Write and take off what the system accepts, until nothing is left."""
    while waiting:
        del waiting[: os.write(handle, waiting)]


def _named(error: OSError, path: Path) -> OSError:
    return OSError(error.errno, error.strerror, str(path))
