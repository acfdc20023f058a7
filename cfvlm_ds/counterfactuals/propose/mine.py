"""Mined counterfactuals: pairs of pictures in the user's own data whose captions differ in one word, for example a colour.

The slot index (slots.py) finds the pairs. Each pair is proposed once, for the source with the smaller id.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.counterfactuals.propose import vocabulary as v
from cfvlm_ds.counterfactuals.propose.base import Context, Found, Proposal, Source, sources
from cfvlm_ds.counterfactuals.propose.slots import opened, slots
from cfvlm_ds.counterfactuals.propose.word_difference import SYNONYMS, defect, difference, words
from cfvlm_ds.counterfactuals.work_folder import seed_of

VERSION = 4
_LOOKED_AT = 256
"""Maximum number of rows with which a caption is compared per omitted word. If there are more, an evenly spaced subset is used."""
_LISTS: dict[str, frozenset[str]] = {
    "colour": frozenset(v.COLOURS), "size": frozenset(v.SIZES), "material": frozenset(v.MATERIALS), "texture": frozenset(v.TEXTURES),
    "count": frozenset(v.NUMBERS), "object": frozenset(v.NOUNS), "action": frozenset(v.ACTIONS),
    "relation": frozenset(["left", "right", "above", "below", "under", "behind", "inside", "outside"]),
}  # fmt: skip


class Mine:
    """Back end ``mine``. Its index is a file in the work folder, so memory does not grow with the data."""

    threads = 1

    def __init__(self, context: Context) -> None:
        self._store, self._types, self._most = context.store, context.options.wanted, context.options.per_type
        self._index = opened(context.work.path / "mine" / "slots.bin", self._captions(context))

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
