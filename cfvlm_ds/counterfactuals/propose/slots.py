"""An index over captions with one word left open, on disk: which rows say the same but for it. Memory does not grow with the data."""

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
_MAGIC = b"cfslots2"
_ENTRY = 20  # bytes: a key of 8, a row of 8, the hash of a word of 4

Numbers = npt.NDArray[Any]


def slots(caption: str) -> Iterator[tuple[int, int, str]]:
    """A key of 64 bits for the caption without each of its words, the place and the word."""
    said = words(caption)
    if not _SHORTEST <= len(said) <= _LONGEST:
        return
    for place, word in enumerate(said):
        if word.isalnum():
            yield _hash("\0".join([*said[:place], "", *said[place + 1 :]]), 8), place, word


def _hash(text: str, size: int) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).digest(), "little")


class SlotIndex:
    """Key -> rows that have it, by their word, for the keys that are there with more than one. The file is mapped: what is not asked for is
    not in memory."""

    def __init__(self, path: Path) -> None:
        size = (path.stat().st_size - len(_MAGIC)) // _ENTRY
        places = (np.uint64, len(_MAGIC)), (np.int64, len(_MAGIC) + 8 * size), (np.uint32, len(_MAGIC) + 16 * size)
        self._keys, self._rows, self._words = (
            np.memmap(path, kind, "r", place, (size,)) if size else np.empty(0, kind) for kind, place in places
        )

    def rows(self, key: int, word: str, most: int, start: int) -> list[int]:
        """At most so many rows that have a key and another word in its place, from a place that is drawn on; where there are more, as many
        of each word as it has a share of them."""
        first, last = (int(self._keys.searchsorted(np.uint64(key), side)) for side in ("left", "right"))
        here = self._words[first:last]
        before, after = (int(here.searchsorted(np.uint32(_hash(word, 4)), side)) for side in ("left", "right"))
        count = last - first - (after - before)
        places = [(start + k * max(1, count // most)) % count for k in range(min(count, most))]
        return [int(self._rows[first + (place if place < before else place + after - before)]) for place in places]


def opened(path: Path, captions: Iterable[tuple[int, str]]) -> SlotIndex:
    """The index at a path, made of rows and their captions where it is not there."""
    try:
        return SlotIndex(made_once(path, lambda: _write(path, captions)))
    except OSError as error:
        raise StorageError(f"{unwritten(path, error)}; make room, or correct the folder") from error


def _write(path: Path, captions: Iterable[tuple[int, str]]) -> None:
    with ExitStack() as stack:

        def scratch() -> IO[bytes]:
            return stack.enter_context(tempfile.TemporaryFile(dir=path.parent))  # has no name: a kill leaves nothing

        files, waiting = [scratch() for _ in range(_BUCKETS)], [array("Q") for _ in range(_BUCKETS)]
        for row, caption in captions:
            for key, _, word in slots(caption):
                bucket = key >> 58
                waiting[bucket].extend((key, row, _hash(word, 4)))
                if len(waiting[bucket]) >= 3 * _WAITING:
                    files[bucket].write(waiting[bucket].tobytes())
                    waiting[bucket] = array("Q")
        rest = rows, open_words = scratch(), scratch()
        with whole_file(path) as out:
            out.write(_MAGIC)
            for file, held in zip(files, waiting, strict=True):
                file.write(held.tobytes())
                file.seek(0)
                entries = _of_several_words(np.frombuffer(file.read(), np.uint64).reshape(-1, 3))
                out.write(np.ascontiguousarray(entries[:, 0]).tobytes())
                rows.write(np.ascontiguousarray(entries[:, 1]).tobytes())
                open_words.write(entries[:, 2].astype(np.uint32).tobytes())
                file.truncate(0)
            for part in rest:
                part.seek(0)
                while block := part.read(1 << 20):
                    out.write(block)


def _of_several_words(entries: Numbers) -> Numbers:
    """Entries (key, row, word) by key, word and row: those of the keys that are there with more than one word."""
    if not len(entries):
        return entries
    entries = entries[np.lexsort((entries[:, 1], entries[:, 2], entries[:, 0]))]
    first = np.flatnonzero(np.concatenate([[True], entries[1:, 0] != entries[:-1, 0]]))
    lengths = np.diff(np.append(first, len(entries)))
    several = entries[first, 2] != entries[first + lengths - 1, 2]
    return entries[np.repeat(several, lengths)]
