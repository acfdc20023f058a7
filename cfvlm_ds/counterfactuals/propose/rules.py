"""Back end ``rules``: edits based on a caption's parse and on closed word lists."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.files import replace
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.reading import parse_json
from cfvlm_ds.core.text import printable
from cfvlm_ds.counterfactuals.propose import vocabulary as v
from cfvlm_ds.counterfactuals.propose.balance import Prices, drawn, prices_of
from cfvlm_ds.counterfactuals.propose.base import Context, Found, Proposal, Rejected, Source, made_once, sources
from cfvlm_ds.counterfactuals.propose.edit_rules import MAKERS, Edit
from cfvlm_ds.counterfactuals.propose.english import Caption, versions
from cfvlm_ds.counterfactuals.propose.word_difference import MOST_CHARACTERS, SYNONYMS

VERSION = 8
"""Version of the rules. Increment it if the edits of any caption change."""
_LOOKED_AT = 10_000
"""Maximum number of rows used to compute the prices."""
_KINDS = ("colour", "size", "material", "texture", "count", "object", "action")
"""Edit types whose new words can be restricted with ``--words``."""


class Rules:
    """Back end ``rules`` for English. Words are balanced over the data set, so the proposals for one caption depend on other captions."""

    threads = 1

    def __init__(self, context: Context) -> None:
        options = context.options
        self._types, self._per_type, self._seed, self._words = options.wanted, options.per_type, options.seed, context.words
        for kind, words in self._words.items():
            if kind not in _KINDS:
                raise ConfigError(f"--words: {kind!r} is not a type with a list of words; the types are {', '.join(_KINDS)}")
            if kind == "object" and (unknown := [word for word in words if word not in v.NOUNS]):
                raise ConfigError(f"--words: {unknown[0]!r} is not a noun of the built-in list; use only nouns of that list")
        self._prices = self._read(context)

    def settings(self) -> Mapping[str, Any]:
        return {"version": VERSION, "words": {kind: list(words) for kind, words in self._words.items()}, **versions()}

    def propose(self, source: Source) -> Found:
        """Return the proposals for each edit type, or a rejection of the caption if there are none."""
        edits = edits_of(source.caption, self._types, self._words)
        if isinstance(edits, Rejected):
            return [edits]
        proposals: list[Proposal] = []
        for kind in self._types:
            same = [edit for edit in edits if edit.type == kind]
            kept = drawn(same, self._prices, self._per_type, self._seed, source.id, kind)
            proposals += [proposal for edit in kept if (proposal := edit.proposal()) is not None]
        return proposals or [Rejected("rules", "every possible new word is already introduced more often than removed")]

    def _read(self, context: Context) -> Prices:
        """Read the prices of words. The first shard to run in a work folder computes them for all shards, from at most _LOOKED_AT evenly
        spaced rows.
        """
        path, store = context.work.path / "prices.json", context.store
        settings = {"per_type": self._per_type, "types": list(self._types), **self.settings()}

        def write() -> None:
            count = min(len(store), _LOOKED_AT)
            progress = Progress(context.say, "rules: balancing words", count, "rows")
            edits = (
                [] if isinstance(result := edits_of(source.caption, self._types, self._words), Rejected) else result
                for source in progress.over(sources(store, [k * len(store) // count for k in range(count)]))
                if not isinstance(source, DataError)
            )
            prices = prices_of(edits, [kind for kind in self._types if kind not in self._words], self._per_type)
            replace(path, json.dumps({"settings": settings, "prices": prices}, indent=1).encode(), shared=True)

        return parse_json(made_once(path, write, lambda file: parse_json(file.read_text())["settings"] == settings).read_text())["prices"]


def edits_of(text: str, types: Sequence[str], words: Mapping[str, Sequence[str]] = MappingProxyType({})) -> list[Edit] | Rejected:
    """Return all edits that the rules allow for a caption, ordered by type, or a rejection if there are none. ``words`` limits the words
    that edits of a type can introduce.
    """
    if len(text) > MOST_CHARACTERS or printable(text) != text:
        return Rejected("rules", "the caption is not one printable line")
    caption = Caption(text)
    if caption.distinct & v.word_set("no_edit") or caption.is_definition:
        return Rejected("rules", "a negation, an alternative, a question or a definition")
    meanings = {SYNONYMS.get(word, word) for word in caption.words}
    edits: dict[tuple[tuple[int, str], ...], Edit] = {}
    for kind in (kind for kind in types if kind in MAKERS):
        for changes, instruction in MAKERS[kind](caption):
            gone, come = [caption.words[place] for place in changes], [word for word in changes.values() if word]
            if sorted(gone) == sorted(come):
                gone, come = [], []
            elif kind != "relation" and any(SYNONYMS.get(word, word) in meanings or word not in words.get(kind, come) for word in come):
                continue
            if not changes.keys() & caption.fixed:
                edits.setdefault(tuple(changes.items()), Edit(kind, caption, changes, instruction, " ".join(gone), " ".join(come)))
    return list(edits.values()) or Rejected("rules", "nothing to edit")
