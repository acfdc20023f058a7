"""Counterfactuals that are there already: two pictures of the user's own data whose captions differ in one word of a kind.

An index over all captions with one word left open: each pair is proposed once, by the source that comes first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.counterfactuals.propose import vocabulary as v
from cfvlm_ds.counterfactuals.propose.base import Context, Found, Proposal, Source, sources
from cfvlm_ds.counterfactuals.propose.word_difference import SYNONYMS, defect, words

VERSION = 1
_SHORTEST, _LONGEST = 3, 24  # words of a caption: of fewer, any two fit; of more, no two
_LISTS: dict[str, frozenset[str]] = {
    "colour": frozenset(v.COLOURS_READ), "size": frozenset(v.SIZES), "material": frozenset(v.MATERIALS), "texture": frozenset(v.TEXTURES),
    "count": frozenset(v.NUMBERS), "object": frozenset(v.NOUNS), "action": frozenset(word for line in v.ACTIONS for word in line),
    "relation": frozenset(["left", "right", "above", "below", "under", "behind", "inside", "outside"]),
}  # fmt: skip


class Mine:
    """The back end ``mine``. Memory: 32 bytes for each word of all captions."""

    threads = 1

    def __init__(self, context: Context) -> None:
        self._store, self._types, self._most = context.store, context.options.wanted, context.options.per_type
        keys, owners = array("Q"), array("q")
        for group, source in self._sources():
            for key, _, _ in _slots(source.caption):
                keys.append(key)
                owners.append(group)
        order = np.argsort(np.array(keys, np.uint64), kind="stable")
        self._keys, self._owners = np.array(keys, np.uint64)[order], np.array(owners, np.int64)[order]

    def _sources(self) -> Iterator[tuple[int, Source]]:
        for group in range(len(self._store)):
            for source in sources(self._store, [group]):
                if not isinstance(source, DataError) and source.picture is not None:
                    yield group, source

    def settings(self) -> Mapping[str, Any]:
        return {"version": VERSION}

    def propose(self, source: Source) -> Found:
        if source.picture is None:
            return []
        found: list[Proposal] = []
        made = dict.fromkeys(self._types, 0)
        for key, place, word in _slots(source.caption):
            start, end = self._keys.searchsorted(np.uint64(key), "left"), self._keys.searchsorted(np.uint64(key), "right")
            for group in dict.fromkeys(int(each) for each in self._owners[start:end]):
                for other in sources(self._store, [group]):
                    if isinstance(other, DataError) or other.picture is None or not _comes_first(source, other):
                        continue
                    kind = self._kind(source, other, place, word)
                    if kind and made[kind] < self._most and all(other.caption != each.text for each in found):
                        made[kind] += 1
                        new = words(other.caption)[place]
                        found.append(Proposal(kind, other.caption, word, new, "", "mine", other.picture))
        return found

    def _kind(self, source: Source, other: Source, place: int, word: str) -> str:
        """What a pair differs in; empty where it is no counterfactual, or of no wanted type."""
        theirs = words(other.caption)
        if len(theirs) != len(words(source.caption)) or theirs[place] == word or other.picture == source.picture:
            return ""
        if any(old != new for k, (old, new) in enumerate(zip(words(source.caption), theirs, strict=True)) if k != place):
            return ""
        new = theirs[place]
        if SYNONYMS.get(word, word) == SYNONYMS.get(new, new):
            return ""
        kind = next((kind for kind, listed in _LISTS.items() if word in listed and new in listed), "other")
        if kind == "object" and v.NOUNS[word][0] != v.NOUNS[new][0]:
            kind = "other"
        return kind if kind in self._types and defect(source.caption, other.caption, kind) is None else ""


def _comes_first(source: Source, other: Source) -> bool:
    return source.id < other.id


def _slots(caption: str) -> Iterator[tuple[int, int, str]]:
    """A key of 64 bits for the caption without each of its words, the place and the word."""
    said = words(caption)
    if not _SHORTEST <= len(said) <= _LONGEST:
        return
    for place, word in enumerate(said):
        if word.isalnum():
            rest = "\0".join([*said[:place], "", *said[place + 1 :]])
            yield int.from_bytes(hashlib.blake2b(rest.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"), place, word
