"""An index over captions with one word left open, on disk: which rows say the same but for one word. Memory does not grow with the data."""

from __future__ import annotations

import hashlib
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from cfvlm_ds.core.errors import StorageError, unwritten
from cfvlm_ds.core.files import whole_file
from cfvlm_ds.counterfactuals.propose.once import made_once
from cfvlm_ds.counterfactuals.propose.word_difference import words

_BUCKETS = 64
_WAITING = 1 << 12  # entries of a bucket that are held in memory
_SHORTEST, _LONGEST = 3, 24  # words of a caption: of fewer, any two fit; of more, no two
_MAGIC = b"cfslots1"

Numbers = npt.NDArray[Any]


def slots(caption: str) -> Iterator[tuple[int, int, str]]:
    """A key of 64 bits for the caption without each of its words, the place and the word."""
    said = words(caption)
    if not _SHORTEST <= len(said) <= _LONGEST:
        return
    for place, word in enumerate(said):
        if word.isalnum():
            rest = "\0".join([*said[:place], "", *said[place + 1 :]])
            yield int.from_bytes(hashlib.blake2b(rest.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"), place, word


class SlotIndex:
    """Key -> rows that have it, for the keys of more than one row. The file is mapped: what is not asked for is not in memory."""

    def __init__(self, path: Path) -> None:
        size = (path.stat().st_size - len(_MAGIC)) // 16
        self._keys: Numbers = np.memmap(path, np.uint64, "r", len(_MAGIC), (size,)) if size else np.empty(0, np.uint64)
        self._rows: Numbers = np.memmap(path, np.int64, "r", len(_MAGIC) + 8 * size, (size,)) if size else np.empty(0, np.int64)

    def rows(self, key: int, most: int, start: int) -> list[int]:
        """At most so many rows that have a key, from a place that is drawn on where there are more."""
        first, last = (int(self._keys.searchsorted(np.uint64(key), side)) for side in ("left", "right"))
        count = last - first
        if count <= most:
            return [int(row) for row in self._rows[first:last]]
        return [int(self._rows[first + (start + k) % count]) for k in range(most)]


def opened(path: Path, captions: Iterable[tuple[int, str]]) -> SlotIndex:
    """The index at a path, made of rows and their captions where it is not there."""
    try:
        return SlotIndex(made_once(path, _is_index, lambda: _write(path, captions)))
    except OSError as error:
        raise StorageError(f"{unwritten(path, error)}; make room, or correct the folder") from error


def _is_index(path: Path) -> bool:
    if (path.stat().st_size - len(_MAGIC)) % 16:
        return False
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def _write(path: Path, captions: Iterable[tuple[int, str]]) -> None:
    with ExitStack() as stack:

        def scratch() -> IO[bytes]:
            return stack.enter_context(tempfile.TemporaryFile(dir=path.parent))  # has no name: a kill leaves nothing

        files, waiting = [scratch() for _ in range(_BUCKETS)], [array("Q") for _ in range(_BUCKETS)]
        for row, caption in captions:
            for key, _, _ in slots(caption):
                bucket = key >> 58
                waiting[bucket].extend((key, row))
                if len(waiting[bucket]) >= 2 * _WAITING:
                    files[bucket].write(waiting[bucket].tobytes())
                    waiting[bucket] = array("Q")
        rows = scratch()
        with whole_file(path, shared=True) as out:
            out.write(_MAGIC)
            for file, rest in zip(files, waiting, strict=True):
                file.write(rest.tobytes())
                file.seek(0)
                pairs = np.frombuffer(file.read(), np.uint64).reshape(-1, 2)
                pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
                keys = pairs[:, 0]
                again = keys[1:] == keys[:-1]
                shared = np.concatenate([again, [False]]) | np.concatenate([[False], again]) if len(keys) else np.empty(0, bool)
                out.write(np.ascontiguousarray(keys[shared]).tobytes())
                rows.write(np.ascontiguousarray(pairs[shared, 1]).tobytes())
                file.truncate(0)
            rows.seek(0)
            while block := rows.read(1 << 20):
                out.write(block)
