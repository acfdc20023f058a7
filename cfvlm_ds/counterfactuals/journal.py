"""Append-only files of JSON lines, one line a unit of work: after a kill what is whole is kept, and a torn last line is cut.

Lines hold no times and no names of machines, so that work that was killed and continued gives the bytes of work that was not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from cfvlm_ds.core.errors import ConfigError, DataError, StorageError, unwritten
from cfvlm_ds.core.files import lock
from cfvlm_ds.core.reading import MIB, TooLarge, lines, open_regular, parse_json

MAX_LINE = 16 * MIB
_BLOCK = MIB


def as_line(record: Any) -> bytes:
    """A record as a line of JSON; half characters, which some writers make, are escaped."""
    return json.dumps(record, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def sha256_of_file(path: Path) -> str:
    """Of all bytes of a file, as a completion file has it. Raises OSError, and ValueError for what is no file."""
    digest = hashlib.sha256()
    with open_regular(path) as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a journal. Raises DataError naming file and line for what is none."""
    return (record for _, record in _located(path))


def _located(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Where each line begins, and its record."""
    where, start = str(path), 0
    try:
        with open_regular(path) as handle:
            for number, line in enumerate(lines(handle, MAX_LINE), 1):
                where = f"{path}:{number}"
                value = parse_json(line.decode())
                if not isinstance(value, dict):
                    raise ValueError(f"it is a {type(value).__name__} and no object")
                yield start, value
                start += len(line)
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError, TooLarge) as error:
        raise DataError(f"{where}: no record ({error}); remove this file and its completion file, and run the step again") from error


class Journal:
    """A file of lines that one process adds to. ``count`` is the number of whole lines.

    Raises ConfigError where another process has it, StorageError where it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
            if not lock(self._handle, path):
                raise ConfigError(f"{path} is written by another process; wait for it, or end it")
            self.count, self._digest, self.size = self._whole_lines()
        except OSError as error:
            raise StorageError(f"{unwritten(path, error)}; make room, or correct the folder") from error

    def _whole_lines(self) -> tuple[int, Any, int]:
        """Cut what follows the last line break; the number of lines, their hash and size."""
        count, size, digest, rest = 0, 0, hashlib.sha256(), b""
        while block := os.pread(self._handle, _BLOCK, size + len(rest)):
            whole, found, rest = (rest + block).rpartition(b"\n")
            digest.update(whole + found)
            count, size = count + whole.count(b"\n") + len(found), size + len(whole) + len(found)
        os.ftruncate(self._handle, size)
        os.lseek(self._handle, size, os.SEEK_SET)
        return count, digest, size

    @property
    def sha256(self) -> str:
        """Of all lines."""
        return str(self._digest.hexdigest())

    def append(self, record: Any) -> int:
        """Add a line; returns where it begins."""
        line = as_line(record)
        try:
            written = 0
            while written < len(line):
                written += os.write(self._handle, line[written:])
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._handle, self.size)
            raise StorageError(f"{unwritten(self.path, error)}; make room and start again: what is there is kept") from error
        self._digest.update(line)
        self.count, start, self.size = self.count + 1, self.size, self.size + len(line)
        return start

    def entries(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Where each line begins, and its record."""
        return _located(self.path)

    def read(self, start: int) -> Any:
        """The record that begins at a place."""
        line = b""
        while (end := line.find(b"\n")) < 0:
            block = os.pread(self._handle, 1 << 16, start + len(line))
            if not block:
                raise DataError(f"{self.path}: byte {start} begins no record; remove the file")
            line += block
        return parse_json(line[:end].decode())

    def close(self) -> None:
        """Hand it to the disk."""
        if self._handle >= 0:
            with suppress(OSError):
                os.fsync(self._handle)
            os.close(self._handle)
            self._handle = -1
