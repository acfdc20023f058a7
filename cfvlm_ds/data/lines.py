"""Indexed lines: random access to the rows of a JSON lines file through an index of their offsets and checksums.

The index takes 12 bytes per row, or 16 if the file has blank lines. In a store, it is a memory-mapped file.
"""

from __future__ import annotations

import os
import zlib
from array import array
from pathlib import Path

import numpy as np

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.files import whole_file
from cfvlm_ds.core.progress import Alive, Progress, Say, no_op
from cfvlm_ds.core.reading import MIB, HeldFile
from cfvlm_ds.data.passes import Array

MAX_LINE = 4 * MIB
"""Maximum size of a row in a JSON lines file, in bytes: about four times the size of a group with a thousand captions."""

_MAGIC = b"cfvlm_ds lines 3"
_HEADER = np.dtype([("magic", "S16"), ("size", "<i8"), ("rows", "<i8")])


class IndexedLines:
    """Non-blank lines of a file, accessed by index. An instance can be shared by threads and forked processes.

    Args:
        path: the file.
        held: the open file.
        starts: offset of each row, followed by the size of the file.
        sums: checksum of each row.
        numbers: line number of each row; None if the file has no blank lines.
    """

    def __init__(self, path: Path, held: HeldFile, starts: Array, sums: Array, numbers: Array | None = None) -> None:
        self.path, self.starts, self.sums, self._numbers = path, starts, sums, numbers
        self._held = held

    @classmethod
    def scanned(cls, path: Path, *, alive: Alive = no_op, progress: Say = no_op) -> IndexedLines:
        """Read a file once and index its lines. Raises OSError, ValueError (without the file's name) if the file is not regular or changes
        meanwhile, and DataError for a line of more than MAX_LINE bytes.
        """
        held = HeldFile(path)
        stat = os.fstat(held.number)
        counted = Progress(progress, f"indexing {path}", stat.st_size / 1e6, "MB")
        starts, sums, numbers = array("Q"), array("I"), array("I")
        place, lines, reported = 0, 0, 0
        with open(held.number, "rb", buffering=MIB, closefd=False) as file:
            while line := file.readline(MAX_LINE + 1):
                lines += 1
                if len(line) > MAX_LINE:
                    remedy = "shorten it, or split the file into lines"
                    raise DataError(f"{path}:{lines}: the line has more than {MAX_LINE} bytes, the limit for one row; {remedy}")
                if not line.isspace():
                    starts.append(place)
                    sums.append(zlib.crc32(line))
                    numbers.append(lines)
                place += len(line)
                if place - reported >= MIB:
                    alive()
                    counted.advance((place - reported) / 1e6)
                    reported = place
        starts.append(stat.st_size)
        final = os.fstat(held.number)
        if (final.st_size, final.st_mtime_ns, final.st_ctime_ns) != (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns):
            raise ValueError("the file changed while it was indexed; start again when it is complete")
        return cls(path, held, np.array(starts), np.array(sums), np.array(numbers) if lines > len(sums) else None)

    @classmethod
    def mapped(cls, path: Path) -> IndexedLines:
        """Open a file, using the index that ``write_index`` wrote. Raises OSError or ValueError if either cannot be read."""
        data = np.memmap(index_file(path), np.uint8, "r")
        begin, rows = _HEADER.itemsize, int(data[: _HEADER.itemsize].view(_HEADER)["rows"][0])
        end = begin + 8 * (rows + 1)
        return cls(path, HeldFile(path), np.asarray(data[begin:end]).view("<u8"), np.asarray(data[end:]).view("<u4"))

    def __len__(self) -> int:
        return len(self.sums)

    def where(self, row: int) -> str:
        """Return the location of a row as ``file:line``."""
        return f"{self.path}:{row + 1 if self._numbers is None else self._numbers[row]}"

    def line(self, row: int) -> bytes:
        """Return a row without its line break. Raises OSError, and DataError if the row has changed since the file was indexed."""
        start, end = self.starts.item(row), self.starts.item(row + 1)
        data = self._held.read(start, min(end - start, MAX_LINE))
        line = data[: data.find(b"\n") + 1 or None]
        if zlib.crc32(line) != self.sums.item(row):
            raise DataError(
                f"{self.where(row)}: the row has changed since it was indexed; do not modify a data set in use, and prepare the store again"
            )
        return line.rstrip(b"\r\n")


def index_file(path: Path) -> Path:
    """Return the path of a file's index, which is next to the file."""
    return path.with_name(f"{path.name}.idx")


def write_index(path: Path) -> Path:
    """Write the index of a file in a store, and return the path of the index. The file must not have blank lines. Raises OSError."""
    lines, file = IndexedLines.scanned(path), index_file(path)
    header = np.array([(_MAGIC, lines.starts[-1], len(lines))], _HEADER)
    with whole_file(file, shared=True) as handle:
        for part in (header, lines.starts.astype("<u8"), lines.sums.astype("<u4")):
            handle.write(part.data)
    return file
