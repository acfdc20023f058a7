"""An index over captions with one word left open, on disk: which rows say the same but for it. Memory does not grow with the data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from cfvlm_ds.core.files import whole_file
from cfvlm_ds.counterfactuals.propose.once import made_once
from cfvlm_ds.counterfactuals.propose.word_difference import words

_SHORTEST, _LONGEST = 3, 24  # words of a caption: of fewer, any two fit; of more, no two
_ENTRY = "S20"
"""A key of 8 bytes, the hash of a word of 4 and a row of 8, big-endian: the order of the bytes is that of the three numbers."""


def slots(caption: str) -> Iterator[tuple[bytes, int, str]]:
    """Yield a key for the caption without each of its words, the place and the word."""
    said = words(caption)
    if not _SHORTEST <= len(said) <= _LONGEST:
        return
    for place, word in enumerate(said):
        if word.isalnum():
            yield _hash("\0".join([*said[:place], "", *said[place + 1 :]]), 8), place, word


def _hash(text: str, size: int) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).digest()[
        ::-1
    ]  # the order decides which pairs are found


class SlotIndex:
    """Key -> rows that have it, by their word. The file is mapped: what is not asked for is not in memory."""

    def __init__(self, path: Path) -> None:
        self._entries = np.memmap(path, _ENTRY, "r") if path.stat().st_size else np.empty(0, _ENTRY)

    def rows(self, key: bytes, word: str, most: int, start: int) -> list[int]:
        """Return at most so many rows that have a key and another word in its place, from a place that is drawn on; where there are more,
        as many of each word as it has a share of them."""
        of_word, end = key + _hash(word, 4), b"\xff" * 12
        first, before = (int(place) for place in self._entries.searchsorted(np.array([key, of_word], _ENTRY)))
        after, last = (int(place) for place in self._entries.searchsorted(np.array([of_word + end[4:], key + end], _ENTRY)))
        count = last - first - (after - before)
        places = [(start + k * max(1, count // most)) % count for k in range(min(count, most))]
        found = [self._entries[first + (place if first + place < before else place + after - before)] for place in places]
        return [int.from_bytes(entry.ljust(20, b"\0")[12:], "big") for entry in found]  # numpy leaves zeros at the end out


def opened(path: Path, captions: Iterable[tuple[int, str]]) -> SlotIndex:
    """Return the index at a path, made of rows and their captions where it is not there."""
    return SlotIndex(made_once(path, lambda: _write(path, captions)))


def _write(path: Path, captions: Iterable[tuple[int, str]]) -> None:
    with whole_file(path) as file:
        for row, caption in captions:
            for key, _, word in slots(caption):
                file.write(key + _hash(word, 4) + row.to_bytes(8, "big"))
        file.flush()
        if file.tell():
            np.memmap(file, _ENTRY, "r+").sort()
