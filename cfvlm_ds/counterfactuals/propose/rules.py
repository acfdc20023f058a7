"""The back end `rules`: edits of a caption by its parse and closed lists; few are proposed, and those are meant to be right."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.files import replace
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.reading import parse_json
from cfvlm_ds.core.text import printable
from cfvlm_ds.counterfactuals.propose import vocabulary as v
from cfvlm_ds.counterfactuals.propose.balance import Prices, drawn, prices_of
from cfvlm_ds.counterfactuals.propose.base import Context, Found, Proposal, Rejected, Source, sources
from cfvlm_ds.counterfactuals.propose.edits import MAKERS
from cfvlm_ds.counterfactuals.propose.english import Caption, versions
from cfvlm_ds.counterfactuals.propose.once import made_once
from cfvlm_ds.counterfactuals.propose.word_difference import MOST_CHARACTERS, SYNONYMS, defect, difference

VERSION = 8
"""Raised when the same caption gets other edits than before."""
_LOOKED_AT = 10_000
"""Rows whose words are counted."""
_KINDS = ("colour", "size", "material", "texture", "count", "object", "action")
"""Types of edits of which ``--words`` may list the words."""


class Rules:
    """The back end ``rules``, for English. Which of the possible edits of a caption are proposed depends on all captions at hand: the words
    of the proposals are balanced."""

    threads = 1

    def __init__(self, context: Context) -> None:
        options = context.options
        self._types, self._per_type, self._seed, self._words = options.wanted, options.per_type, options.seed, context.words
        for kind, words in self._words.items():
            if kind not in _KINDS:
                raise ConfigError(f"--words: {kind!r} has no list of words; there are {', '.join(_KINDS)}")
            if kind == "object" and (unknown := [word for word in words if word not in v.NOUNS]):
                raise ConfigError(f"--words: the forms of {unknown[0]!r} are not known; name listed nouns")
        self._prices = self._read(context)

    def settings(self) -> Mapping[str, Any]:
        return {"version": VERSION, "words": {kind: list(words) for kind, words in self._words.items()}, **versions()}

    def propose(self, source: Source) -> Found:
        """Proposals of each type, and why there is none where one reason is true of the whole caption."""
        edits = edits_of(source.caption, self._types, self._words)
        if isinstance(edits, Rejected):
            return [edits]
        found: list[Proposal] = []
        for kind in self._types:
            same = [edit for edit in edits if edit.type == kind]
            kept = drawn(same, self._prices, self._per_type, self._seed, source.id, kind)
            found += [proposal for edit in kept if (proposal := edit.proposal()) is not None]
        return found or [Rejected("rules", "each word that may come comes oftener than it goes")]

    def _read(self, context: Context) -> Prices:
        """The prices of words, which the first shard of a work folder writes for all. At most so many captions are looked at, evenly over
        the data, that they fit in memory."""
        path, store = context.work.path / "prices.json", context.store
        said = {"per_type": self._per_type, "types": list(self._types), **self.settings()}

        def write() -> None:
            count = min(len(store), _LOOKED_AT)
            progress = Progress(context.say, "rules: words", count, "rows")
            edits = (
                [] if isinstance(found := edits_of(source.caption, self._types, self._words), Rejected) else found
                for source in progress.over(sources(store, [k * len(store) // count for k in range(count)]))
                if not isinstance(source, DataError)
            )
            prices = prices_of(edits, [kind for kind in self._types if kind not in self._words], self._per_type)
            replace(path, json.dumps({"settings": said, "prices": prices}, indent=1).encode(), shared=True)

        return parse_json(made_once(path, write, lambda file: parse_json(file.read_text())["settings"] == said).read_text())["prices"]


@dataclass(frozen=True)
class Edit:
    """An edit that rules allow: new words by place, what goes and comes by them (nothing where words change places), and what an editor of
    pictures is told."""

    type: str
    caption: Caption
    changes: Mapping[int, str]
    told: str
    gone: str
    come: str

    def proposal(self) -> Proposal | None:
        """As it is written down; None where its text is no counterfactual."""
        text = self.caption.with_words(self.changes)
        if defect(self.caption.text, text, self.type) is not None:
            return None
        differs = difference(self.caption.text, text)
        told = self.told or f"Make the picture show: {text}"
        return Proposal(self.type, text, " ".join(differs.before), " ".join(differs.after), told, "rules")


def edits_of(text: str, types: Sequence[str], words: Mapping[str, Sequence[str]] = MappingProxyType({})) -> list[Edit] | Rejected:
    """All the edits of a caption that rules allow, by type, or why there is none. ``words`` are those that edits of a type may lead to."""
    if len(text) > MOST_CHARACTERS or printable(text) != text:
        return Rejected("rules", "no caption of one printable line")
    caption = Caption(text)
    if caption.said & v.word_set("no_edit") or caption.is_definition:
        return Rejected("rules", "a negation, an alternative, a question or a definition")
    said = {SYNONYMS.get(word, word) for word in caption.words}
    found: dict[tuple[tuple[int, str], ...], Edit] = {}
    for kind in (kind for kind in types if kind in MAKERS):
        for changes, told in MAKERS[kind](caption):
            gone, come = [caption.words[place] for place in changes], [word for word in changes.values() if word]
            if sorted(gone) == sorted(come):
                gone, come = [], []
            elif kind != "relation" and any(SYNONYMS.get(word, word) in said or word not in words.get(kind, come) for word in come):
                continue
            if not changes.keys() & caption.fixed:
                found.setdefault(tuple(changes.items()), Edit(kind, caption, changes, told, " ".join(gone), " ".join(come)))
    return list(found.values()) or Rejected("rules", "nothing to edit")
