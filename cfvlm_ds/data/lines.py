"""The rows of a file of JSON lines at random, by an index of where each begins: 12 bytes a row. That of a store is mapped from its file.

A row that is read proves its place: it begins behind a line break, nothing but blank lines follows it before the next one, and it has the
sum that was noted when the file was indexed. An index that says otherwise is of another file, or somebody's invention.
"""

from __future__ import annotations

import os
import zlib
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.files import whole_file
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.reading import MIB, HeldFile, TooLarge

MAX_LINE = 4 * MIB
"""Bytes of a row of JSON lines: four times as many as a group of a thousand captions has."""

_NUMBERED = 64  # rows from one whose line number is noted to the next one
_MAGIC = b"cfvlm_ds lines 2"
_HEADER = np.dtype([("magic", "S16"), ("size", "<i8"), ("rows", "<i8"), ("lines", "<i8")])

Array = npt.NDArray[Any]
State = tuple[int, int, int]
"""Size and times of a file; an old time of change can be set again, but not the last one of all."""


class LineIndex(NamedTuple):
    """Where rows begin (and the end of the file), a checksum of each, the line number of every ``_NUMBERED``-th, and the number of lines.

    ``long``: the last row has more than MAX_LINE bytes, and what follows it was not looked at.
    """

    starts: Array
    sums: Array
    numbers: Array
    lines: int
    long: bool


class IndexedLines:
    """The lines of a file that are not blank. One object serves all threads, and processes that are forked.

    Args:
        path: the file.
        held: it, open.
        index: where its lines are.
        file: of the index; None for one in memory.
    """

    def __init__(self, path: Path, held: HeldFile, index: LineIndex, file: Path | None) -> None:
        self.path, self.index, self.file = path, index, file
        self.state = state_of(held)
        self._held = held

    @classmethod
    def scanned(
        cls, path: Path, *, alive: Callable[[], object] = lambda: None, progress: Callable[[str], object] = lambda line: None
    ) -> IndexedLines:
        """Index the lines of a regular file, which is read once. Raises OSError, and ValueError without the file's name."""
        held = HeldFile(path)
        state = state_of(held)
        index = _scanned(held, state[0], alive, Progress(progress, f"index of {path}", state[0] / 1e6, "MB"))
        if state_of(held) != state:
            raise ValueError("it was written while it was indexed; start again when it is whole")
        return cls(path, held, index, None)

    @classmethod
    def mapped(cls, path: Path) -> IndexedLines:
        """Open the lines of a file that is not written any more, by the index beside it (write_index). Raises OSError, ValueError."""
        held = HeldFile(path)
        return cls(path, held, _mapped(file := index_file(path), state_of(held)[0]), file)

    def __len__(self) -> int:
        return len(self.index.sums)

    def where(self, row: int) -> str:
        """``file:line`` of a row."""
        if self.index.lines == len(self):
            return f"{self.path}:{row + 1}"
        noted = row // _NUMBERED
        place, end, number = int(self.index.starts[noted * _NUMBERED]), int(self.index.starts[row]), int(self.index.numbers[noted])
        while place < end and (block := self._held.read(place, min(MIB, end - place))):
            number += block.count(b"\n")
            place += len(block)
        return f"{self.path}:{number}"

    def line(self, row: int) -> bytes:
        """A row without its line break. Raises TooLarge for one of more than MAX_LINE bytes, DataError for one that is not what was
        indexed, OSError."""
        start, end = self.index.starts.item(row), self.index.starts.item(row + 1)
        if self.index.long and row == len(self) - 1 and end - start > MAX_LINE:
            raise TooLarge(f"the line has more than {MAX_LINE} bytes, the bound for one row")
        before = min(start, 1)
        data = self._held.read(start - before, min(end - start, MAX_LINE + 1) + before)
        stop = data.find(b"\n", before) + 1 or len(data)
        line = data[before:stop]
        is_row = (not before or data[:1] == b"\n") and zlib.crc32(line) == self.index.sums.item(row) and line.strip()
        if not is_row or not self._is_blank(start + len(line), end):
            raise DataError(
                f"{self.where(row)}: the row is not the one that was indexed; do not write a data set while it is used"
                + (", and if it was not, prepare it again" if self.file else "")
            )
        return line.rstrip(b"\r\n")

    def _is_blank(self, place: int, end: int) -> bool:
        while place < end:
            block = self._held.read(place, min(MIB, end - place))
            if not block or block.strip():
                return False
            place += len(block)
        return True


def state_of(held: HeldFile) -> State:
    """The state of an open file."""
    stat = os.fstat(held.number)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def index_file(path: Path) -> Path:
    """Return the path of a file's index."""
    return path.with_name(f"{path.name}.idx")


def write_index(path: Path) -> Path:
    """Index a file that is not written any more. Raises OSError."""
    held = HeldFile(path)
    size, file = state_of(held)[0], index_file(path)
    index = _scanned(held, size, lambda: None, Progress(lambda line: None, "index", 1, "MB"))
    header = np.array([(_MAGIC, size, len(index.sums), index.lines)], _HEADER)
    with whole_file(file, shared=True) as handle:
        for each in (header, index.starts, index.numbers, index.sums):
            handle.write(np.ascontiguousarray(each).data)
    return file


def _scanned(held: HeldFile, size: int, alive: Callable[[], object], progress: Progress) -> LineIndex:
    """Go through a file once."""
    starts, sums, numbers = array("Q"), array("I"), array("Q")
    place, lines, long, said = 0, 0, False, 0
    with open(held.number, "rb", buffering=MIB, closefd=False) as file:
        while not long and (line := file.readline(MAX_LINE + 1)):
            lines, long = lines + 1, len(line) > MAX_LINE
            if long or not line.isspace():
                if len(starts) % _NUMBERED == 0:
                    numbers.append(lines)
                starts.append(place)
                sums.append(zlib.crc32(line))
            place += len(line)
            if place - said >= MIB:
                alive()
                progress.advance((place - said) / 1e6)
                said = place
    starts.append(size)
    return LineIndex(np.array(starts, "<u8"), np.array(sums, "<u4"), np.array(numbers, "<u8"), lines, long)


def _mapped(file: Path, size: int) -> LineIndex:
    """The index in a file, of one of so many bytes. Raises OSError, and ValueError for one that cannot be true."""
    data = np.memmap(file, np.uint8, "r") if file.stat().st_size >= _HEADER.itemsize else np.zeros(_HEADER.itemsize, np.uint8)
    magic, of, rows, lines = np.frombuffer(data[: _HEADER.itemsize].tobytes(), _HEADER, 1)[0].item()
    lengths = np.array([_HEADER.itemsize, 8 * (rows + 1), 8 * -(-rows // _NUMBERED), 4 * rows], object)
    if magic != _MAGIC or of != size or not 0 <= rows <= lines or lengths.sum() != len(data):
        raise ValueError("its index is of another file")
    parts = np.split(np.asarray(data), np.cumsum(lengths[:3]).tolist())
    starts, numbers, sums = parts[1].view("<u8"), parts[2].view("<u8"), parts[3].view("<u4")
    if int(starts[-1]) != size or not bool((starts[1:] > starts[:-1]).all()):
        raise ValueError("its index is of another file")
    return LineIndex(starts, sums, numbers, lines, False)
