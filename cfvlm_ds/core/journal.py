"""Append-only files. If a process is killed, only the last entry can be incomplete, and it is then dropped when the file is next opened."""

from __future__ import annotations

import errno
import json
import os
from collections import deque
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from cfvlm_ds.core.errors import ConfigError, DataError, StorageError, unwritten, writing
from cfvlm_ds.core.files import lock
from cfvlm_ds.core.progress import Say
from cfvlm_ds.core.secrets import print_line

_BLOCK = 1 << 20


def as_line(record: Any) -> bytes:
    """Encode a record as a line of JSON. Unpaired surrogates, which UTF-8 cannot represent, are escaped."""
    return json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"


class Journal:
    """A file of lines that one process appends to. When it is opened, an incomplete last line is reported and dropped.

    Args:
        alone: lock the file; not needed if its folder is locked.
        end: offset of the next entry, for a file whose entries are not lines; bytes after this offset are dropped.

    Raises ConfigError if another process has locked the file, and StorageError if the file cannot be written.
    """

    def __init__(self, path: Path, *, alone: bool = True, end: int | None = None) -> None:
        self.path = path
        with writing(path, "free some space, or correct the folder"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            if alone and not lock(self._handle, path):
                raise ConfigError(f"{path} is being written by another process; wait for it, or stop it")
            size = os.fstat(self._handle).st_size
            self.size = self._whole_lines(size) if end is None else end
            os.ftruncate(self._handle, self.size)

    def _whole_lines(self, size: int) -> int:
        """Return the number of bytes up to and including the last line break."""
        block, start = b"", size
        while start > 0 and b"\n" not in block:
            start = max(0, start - _BLOCK)
            block = os.pread(self._handle, _BLOCK, start)
        end = start + block.rfind(b"\n") + 1
        if end < size:
            print_line(f"{self.path}: its incomplete last line, left by a killed process or a full disk, is dropped", error=True)
        return end

    def append(self, entry: bytes) -> int:
        """Append an entry, completely or not at all, and return its offset. Raises StorageError."""
        written = 0
        try:
            while written < len(entry):
                written += os.pwrite(self._handle, entry[written:], self.size + written)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._handle, self.size)
            raise StorageError(f"{unwritten(self.path, error)}; free some space and start again; written data are kept") from error
        self.size += written
        return self.size - written

    def close(self) -> None:
        """Flush the file to the disk and close it. Later calls do nothing. Raises StorageError."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            try:
                os.fsync(handle)
            except OSError as error:  # a network file system can report a failed write only now
                raise StorageError(f"{unwritten(self.path, error)}; its last lines may be lost") from error
            finally:
                os.close(handle)


def records(path: Path, remedy: str) -> Iterator[dict[str, Any]]:
    """Yield the records of a journal. A missing file has no records.

    A last line without a line break is skipped: either it is still being written, or a killed process left it behind and the next writer
    drops it. Raises DataError for an invalid record; the message names the file and the line, and ends with ``remedy``.
    """
    with suppress(FileNotFoundError), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = dict(json.loads(line))
            except (ValueError, TypeError, RecursionError) as error:
                raise DataError(f"{path}:{number}: not a valid record ({error}); {remedy}") from error
            yield record


def append(path: Path, line: str, say: Say) -> bool:
    """Append a line to a file. If that fails, only warn. Return whether the line was appended."""
    try:
        with closing(Journal(path, alone=False)) as journal:
            journal.append(line.encode() + b"\n")
    except StorageError as error:
        say(f"warning: {error}; the run continues without this line: {line}")
        return False
    return True


class Waiting:
    """A journal whose write errors never terminate the process. Lines that cannot be written are kept in memory and written in order as
    soon as the disk accepts them.

    Args:
        say: called with a message when writing first fails, and when it works again.
    """

    def __init__(self, path: Path, say: Say) -> None:
        self.path, self._say = path, say
        self._journal: Journal | None = None
        self._lines = deque[bytes]()
        self._failing = self.closed = False
        self._flush()

    def write(self, line: str) -> None:
        """Append a line, now or as soon as the disk accepts it."""
        self._lines.append(line.encode() + b"\n")
        self._flush()

    def close(self) -> list[str]:
        """Try to write one last time, close the file, and return the lines that could not be written. Later calls return an empty list."""
        if self.closed:
            return []
        self.closed = True
        self._flush()
        if self._journal:
            try:
                self._journal.close()
            except StorageError as error:
                self._say(str(error))
        return [line.decode() for line in self._lines]

    def _flush(self) -> None:
        try:
            self._journal = self._journal or Journal(self.path, alone=False)
            while self._lines:
                self._journal.append(self._lines[0])
                self._lines.popleft()
        except StorageError as error:
            cause = error.__cause__
            assert isinstance(cause, OSError)
            if not self._failing:
                self._say(f"{unwritten(self.path, cause)}; its new lines are kept in memory, and each new line triggers another attempt")
            self._failing = True
            if cause.errno == errno.ESTALE:  # NFS: the file must be opened again
                self._journal = None
            return
        if self._failing:
            self._say(f"{self.path} can be written again; no line was lost")
        self._failing = False
