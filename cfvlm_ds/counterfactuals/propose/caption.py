"""A caption as words and noun phrases, found by closed lists: what is not certain is no phrase."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from cfvlm_ds.counterfactuals.propose.grammar import article, is_finite, is_plural
from cfvlm_ds.counterfactuals.propose.vocabulary import (
    ADJECTIVES,
    ANIMATE,
    CALLED,
    COLOURS,
    DETERMINERS,
    EXPLAINING,
    FOLLOWING,
    KINDS_OF_THINGS,
    MATERIALS,
    NOT_VERBS,
    NOUNS,
    NUMBERS,
    POINTING,
    SIZES,
    TEXTURES,
    UNCOUNTED,
)
from cfvlm_ds.counterfactuals.propose.word_difference import WORD

OF_KIND = {"colour": frozenset(COLOURS), "size": frozenset(SIZES), "material": frozenset(MATERIALS), "texture": frozenset(TEXTURES)}
_MODIFIERS = ADJECTIVES.union(*OF_KIND.values()) | {"short"}
_ONE = ("a", "an", "one", "this", "that", "each", "every", "another")
_MARKS = re.compile(r"[^\w]")
_ENDS = (".", "!", "?", ":", ";")
_QUOTES = re.compile(r"\"[^\"]*\"?|\u201c[^\u201d]*\u201d?|\u00ab[^\u00bb]*\u00bb?")


@dataclass(frozen=True)
class Phrase:
    """A noun with what stands before it: places of words. ``known`` are its category, singular and plural; ``plural`` is None where its
    number is not certain."""

    start: int
    noun: int
    adjectives: tuple[int, ...]
    determiner: int | None
    known: tuple[str, str, str] | None
    plural: bool | None


class Caption:
    """The words of a caption, in lower case too, and its noun phrases."""

    def __init__(self, text: str) -> None:
        self.text = text
        found = list(WORD.finditer(text))
        self.spans = [(word.start(), word.end()) for word in found]
        self._as_written = [word[0] for word in found]
        self.words = [word[0].lower() for word in found]

    @functools.cached_property
    def phrases(self) -> list[Phrase]:
        """In the order of their nouns."""
        return [phrase for place in range(len(self.words)) if (phrase := self._phrase(place)) is not None]

    def word(self, place: int) -> str:
        """The word at a place; empty beyond both ends, and for a mark."""
        word = self.words[place] if 0 <= place < len(self.words) else ""
        return "" if _MARKS.fullmatch(word) else word

    def is_named(self, place: int) -> bool:
        """Whether a word is written as part of a name: with a capital, and not as all are or as the first of a sentence."""
        word, before = self._as_written[place], self._as_written[place - 1] if place else "."
        return word[:1].isupper() and before not in _ENDS and not self.text.isupper()

    def is_aside(self, place: int) -> bool:
        """Whether a mark other than that of a list or a new sentence stands before a word."""
        return place > 0 and bool(_MARKS.fullmatch(self.words[place - 1])) and self.words[place - 1] not in {*_ENDS, ","}

    @functools.cached_property
    def first_sentence(self) -> int:
        """Words and marks of the first sentence; what follows explains, or speaks to somebody."""
        return next((k + 1 for k, word in enumerate(self.words[:-1]) if word in _ENDS and self.word(k + 1)), len(self.words))

    @functools.cached_property
    def lettering(self) -> frozenset[int]:
        """Places of what is written in the picture, or a name: within quotation marks, or after a word such as "titled"."""
        called = next((k for k, word in enumerate(self.words) if word in CALLED), len(self.words))
        quoted = [match.span() for match in _QUOTES.finditer(self.text)]
        return frozenset(k for k, (start, end) in enumerate(self.spans) if k > called or any(a <= start and end <= b for a, b in quoted))

    @functools.cached_property
    def is_definition(self) -> bool:
        """Whether it says what all things of a kind are, and not what a picture shows."""
        if EXPLAINING & set(self.words):
            return True
        if not self.words or self.words[0] in POINTING | FOLLOWING:
            return False  # "this is a dog", "behind the dog is a cat"
        verb = next((k for k, word in enumerate(self.words) if word in ("is", "are")), len(self.words))
        return self.word(verb + 1) in ("a", "an", "the", "one", "any") or bool(KINDS_OF_THINGS & set(self.words[verb + 1 : verb + 4]))

    def ends(self, place: int) -> bool:
        """Whether a noun phrase can end before a place: at a mark, a small word, or a verb that describes it."""
        word = self.word(place)
        if not word or word in FOLLOWING or (word in ("left", "right") and self.word(place + 1) == "of"):
            return True
        return word.endswith(("ing", "ed")) and word not in NOT_VERBS and len(word) > 4

    def said_of(self, phrase: Phrase, kind: str) -> list[int]:
        """The adjectives of a kind."""
        return [place for place in phrase.adjectives if self.words[place] in OF_KIND[kind]]

    def shown(self, phrase: Phrase) -> str:
        """The phrase without its determiner, as it is written."""
        start = phrase.start if phrase.determiner is None else phrase.determiner + 1
        return self.text[self.spans[start][0] : self.spans[phrase.noun][1]]

    def _phrase(self, noun: int) -> Phrase | None:
        word = self.word(noun)
        if not word.replace("-", "").isalpha() or word in FOLLOWING or word in DETERMINERS:
            return None
        known = NOUNS.get(word)
        if known is None and (word in _MODIFIERS or (word.endswith("ing") and word not in NOT_VERBS) or len(word) < 3):
            return None
        if word in OF_KIND["colour"] and self.word(noun + 1) == "and" and self.word(noun + 2) in OF_KIND["colour"]:
            return None
        start = noun
        while self.word(start - 1) in _MODIFIERS:
            start -= 1
        adjectives = tuple(range(start, noun))
        before = self.word(start - 1)
        if before in OF_KIND["colour"] or (before == "and" and self.word(start - 2) in _MODIFIERS):
            return None
        if not self.ends(noun + 1) and not self._acts(word, before, self.word(noun + 1)):
            return None
        if self.is_aside(start) or any(self.is_named(place) for place in range(start, noun + 1)):
            return None
        if before == "the" and start == 2 and self.words[0] not in FOLLOWING | DETERMINERS and not self.words[0].endswith("ing"):
            return None  # George the groper
        determiner = start - 1 if before in DETERMINERS or before.isdecimal() else None
        if determiner is None and not self._begins(start):
            return None
        plural = self._plural(word, before)
        if before in ("a", "an") and plural:
            return None
        return Phrase(start if determiner is None else determiner, noun, adjectives, determiner, known, plural)

    def _begins(self, start: int) -> bool:
        """Whether a phrase without a determiner can begin here: after nothing, a small word or a verb in -ing."""
        before, first = self.word(start - 1), self.word(start - 2)
        if not before or before in FOLLOWING or before == "see":
            return True
        # "a standing lamp", "running water", "a parked touring bus"
        named = not first or first.endswith("ed") or first in DETERMINERS or first in _MODIFIERS or self.is_named(start - 2)
        return before.endswith("ing") and before not in NOT_VERBS and not named

    def _acts(self, noun: str, before: str, after: str) -> bool:
        """Whether a verb in the present follows a noun: of one, "the dog bowls" may be about bowls."""
        return is_finite(after, True) if is_plural(noun) else before in _ONE[:3] and is_finite(after, False)

    def _plural(self, word: str, before: str) -> bool | None:
        if word in NOUNS and word not in UNCOUNTED and before not in _ONE:
            return None if NOUNS[word][2] != word and self._is_of_many(before) else NOUNS[word][2] == word  # "two dog"
        if before in _ONE:
            return not (word not in NOUNS or NOUNS[word][1] == word)
        return True if self._is_of_many(before) else is_plural(word)

    def _is_of_many(self, word: str) -> bool:
        return NUMBERS.get(word, 0) > 1 or word in ("several", "many", "both", "these", "those", "few") or word.isdecimal()

    def is_done_by_somebody(self, place: int) -> bool:
        """Whether an action at a place is said of a person or an animal just before it."""
        before = place - 1
        if self.word(before) in ("is", "are", "was", "were"):
            before -= 1
        return self.word(before) in ANIMATE

    def with_words(self, changes: Mapping[int, str]) -> str:
        """The caption with other words at some places (empty: none), its articles put right."""
        made = dict(changes)
        for place in changes:
            if place and self.words[place - 1] in ("a", "an") and place - 1 not in changes and made[place]:
                made[place - 1] = article(made[place])
        text, end = "", 0
        for place in sorted(made):
            start, stop = self.spans[place]
            between = self.text[end:start]
            text += between if made[place] else between.rstrip(" ")
            text, end = text + like(made[place], self.text[start:stop]), stop
        return (text + self.text[end:]).strip()


def like(word: str, model: str) -> str:
    """A word in capitals as another one is."""
    if len(model) > 1 and model.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if model[:1].isupper() else word
