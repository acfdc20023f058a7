"""Slot index, which finds rows whose captions differ in one word. Each word of a caption has a key, the hash of the caption without this
word. The index is on disk, so memory does not grow with the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from cfvlm_ds.core.files import whole_file
from cfvlm_ds.counterfactuals.propose.base import made_once
from cfvlm_ds.counterfactuals.propose.word_difference import words

_SHORTEST, _LONGEST = 3, 24  # words per caption; shorter captions match by chance, longer ones hardly ever
_ENTRY = "S20"
"""8-byte key, 4-byte hash of the word and 8-byte row index, all big-endian, so that sorting bytes sorts the numbers."""


def slots(caption: str) -> Iterator[tuple[bytes, int, str]]:
    """Yield the key, index and text of each word in a caption of 3 to 24 tokens."""
    tokens = words(caption)
    if not _SHORTEST <= len(tokens) <= _LONGEST:
        return
    for place, word in enumerate(tokens):
        if word.isalnum():
            yield _hash("\0".join([*tokens[:place], "", *tokens[place + 1 :]]), 8), place, word


def _hash(text: str, size: int) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).digest()[
        ::-1
    ]  # another byte order would change which pairs are found


class SlotIndex:
    """A memory-mapped index from keys to rows. The rows of a key are sorted by the hash of the omitted word."""

    def __init__(self, path: Path) -> None:
        self._entries = np.memmap(path, _ENTRY, "r") if path.stat().st_size else np.empty(0, _ENTRY)

    def rows(self, key: bytes, word: str, most: int, start: int) -> list[int]:
        """Return the rows with this key whose omitted word is not ``word``. If there are more than ``most``, return an evenly spaced subset
        with offset ``start``, so that each omitted word keeps its share of the rows.
        """
        of_word, end = key + _hash(word, 4), b"\xff" * 12
        first, before = (int(place) for place in self._entries.searchsorted(np.array([key, of_word], _ENTRY)))
        after, last = (int(place) for place in self._entries.searchsorted(np.array([of_word + end[4:], key + end], _ENTRY)))
        count = last - first - (after - before)
        places = [(start + k * max(1, count // most)) % count for k in range(min(count, most))]
        entries = [self._entries[first + (place if first + place < before else place + after - before)] for place in places]
        return [int.from_bytes(entry.ljust(20, b"\0")[12:], "big") for entry in entries]  # numpy strips trailing zeros


def opened(path: Path, captions: Iterable[tuple[int, str]]) -> SlotIndex:
    """Open the index file at ``path``. If it does not exist, build it from (row index, caption) pairs."""
    return SlotIndex(made_once(path, lambda: _write(path, captions)))


def _write(path: Path, captions: Iterable[tuple[int, str]]) -> None:
    with whole_file(path) as file:
        for row, caption in captions:
            for key, _, word in slots(caption):
                file.write(key + _hash(word, 4) + row.to_bytes(8, "big"))
        file.flush()
        if file.tell():
            np.memmap(file, _ENTRY, "r+").sort()
