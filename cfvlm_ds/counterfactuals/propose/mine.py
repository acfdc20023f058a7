"""Mined counterfactuals: pairs of pictures in the user's own data whose captions differ in one word, for example a colour.

A slot index finds the pairs: the key of each word is the hash of its caption without that word. The index is on disk, so memory use does
not grow with the data. Each pair is proposed once, for the source with the smaller id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.files import whole_file
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.counterfactuals.propose import vocabulary as v
from cfvlm_ds.counterfactuals.propose.base import Context, Found, Proposal, Source, made_once, sources
from cfvlm_ds.counterfactuals.propose.word_difference import SYNONYMS, defect, difference, words
from cfvlm_ds.counterfactuals.work_folder import seed_of

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
    ]  # a different byte order would change which pairs are found


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


def _write(path: Path, captions: Iterable[tuple[int, str]]) -> None:
    with whole_file(path) as file:
        for row, caption in captions:
            for key, _, word in slots(caption):
                file.write(key + _hash(word, 4) + row.to_bytes(8, "big"))
        file.flush()
        if file.tell():
            np.memmap(file, _ENTRY, "r+").sort()


VERSION = 4
_LOOKED_AT = 256
"""Maximum number of rows that a caption is compared with per omitted word. If there are more, an evenly spaced subset is used."""
_LISTS: dict[str, frozenset[str]] = {
    "colour": frozenset(v.COLOURS), "size": frozenset(v.SIZES), "material": frozenset(v.MATERIALS), "texture": frozenset(v.TEXTURES),
    "count": frozenset(v.NUMBERS), "object": frozenset(v.NOUNS), "action": frozenset(v.ACTIONS),
    "relation": frozenset(["left", "right", "above", "below", "under", "behind", "inside", "outside"]),
}  # fmt: skip


class Mine:
    """Back end ``mine``: proposes other pictures' captions that differ from the source's caption in one word."""

    threads = 1

    def __init__(self, context: Context) -> None:
        self._store, self._types, self._most = context.store, context.options.wanted, context.options.per_type
        path = context.work.path / "mine" / "slots.bin"
        self._index = SlotIndex(made_once(path, lambda: _write(path, self._captions(context))))

    def _captions(self, context: Context) -> Iterator[tuple[int, str]]:
        progress = Progress(context.say, "mine: indexing", len(self._store), "captions")
        for row in progress.over(range(len(self._store))):
            for source in sources(self._store, [row]):
                if not isinstance(source, DataError) and source.picture is not None:
                    yield row, source.caption

    def settings(self) -> Mapping[str, Any]:
        return {"version": VERSION}

    def propose(self, source: Source) -> Found:
        if source.picture is None:
            return []
        proposals: list[Proposal] = []
        counts = dict.fromkeys(self._types, 0)
        for key, place, word in slots(source.caption):
            kinds = [kind for kind in self._types if kind == "other" or word in _LISTS.get(kind, ())]
            rows: Iterable[int] = ()
            if any(counts[kind] < self._most for kind in kinds):
                rows = dict.fromkeys(self._index.rows(key, word, _LOOKED_AT, seed_of("mine", source.id, place)))
            for row in rows:
                for other in sources(self._store, [row]):
                    if isinstance(other, DataError) or other.picture is None or source.id >= other.id:
                        continue
                    kind = self._kind(source, other, place, word)
                    if kind and counts[kind] < self._most and all(other.caption != proposal.text for proposal in proposals):
                        counts[kind] += 1
                        new = words(other.caption)[place]
                        proposals.append(Proposal(kind, other.caption, word, new, "", "mine", other.picture))
                if all(counts[kind] >= self._most for kind in kinds):
                    break
        return proposals

    def _kind(self, source: Source, other: Source, place: int, word: str) -> str:
        """Return the edit type of a pair of captions, or "" if the pair is not a counterfactual of a requested type."""
        differs = difference(source.caption, other.caption)
        if differs.first != place or differs.before != (word,) or len(differs.after) != 1 or other.picture == source.picture:
            return ""
        (new,) = differs.after
        if SYNONYMS.get(word, word) == SYNONYMS.get(new, new):
            return ""
        kind = next((kind for kind, listed in _LISTS.items() if word in listed and new in listed), "other")
        if kind == "object" and v.NOUNS[word][0] != v.NOUNS[new][0]:
            kind = "other"
        return kind if kind in self._types and defect(source.caption, other.caption, kind) is None else ""
