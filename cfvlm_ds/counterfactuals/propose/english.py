"""Dependency parses of captions by spaCy's small English pipeline, and queries about their nouns, verbs and phrases."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.versions import version
from cfvlm_ds.counterfactuals.propose.vocabulary import word_set

_PIPELINE = "en_core_web_sm"
_ONE_AT_A_TIME = threading.Lock()  # other back ends use threads
_SOUNDS_LIKE_A = ("uni", "use", "usu", "eu", "one", "once", "ubi")
_SOUNDS_LIKE_AN = ("hour", "honest", "honor", "honour", "heir")


@functools.cache
def parser() -> Any:
    """Return the parser, which is loaded on the first call. Raises ConfigError if spaCy or its pipeline is missing."""
    try:
        import spacy
    except ImportError as error:
        raise ConfigError("--with rules: spaCy is not installed; run pip install 'cfvlm-ds[counterfactuals]'") from error
    name = next((name for name in sorted(spacy.util.get_installed_models()) if name.startswith(_PIPELINE)), None)
    if name is None:
        raise ConfigError(f"--with rules: spaCy has no English pipeline; run python -m spacy download {_PIPELINE}")
    return spacy.load(name, exclude=["ner", "senter"])


@functools.lru_cache(1 << 11)  # 30 KiB per entry; a small set is parsed once for both prices and edits
def _parsed(text: str) -> Any:
    with _ONE_AT_A_TIME:
        return parser()(text)


def versions() -> dict[str, str]:
    """Return the versions of the packages that the proposals depend on."""
    return {"spacy": version("spacy"), _PIPELINE: parser().meta["version"]}


def article(following: str) -> str:
    """Return ``a`` or ``an``, depending on the sound of the following word."""
    word = following.lower()
    if word.startswith(_SOUNDS_LIKE_A):
        return "a"
    return "an" if word[:1] in "aeiou" or word.startswith(_SOUNDS_LIKE_AN) or word in ("8", "11", "18") else "a"


def like(word: str, model: str) -> str:
    """Return a word with the capitalisation of ``model``."""
    if len(model) > 1 and model.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if model[:1].isupper() else word


class Caption:
    """A caption with its parse. ``doc`` holds spaCy's tokens, and ``distinct`` is the set of its words in lower case."""

    def __init__(self, text: str) -> None:
        self.text, self.doc = text, _parsed(text)
        self.words = [token.lower_ for token in self.doc]
        self.distinct = frozenset(self.words)
        first = next(self.doc.sents).end if len(self.words) else 0
        lettering = next((place for place, word in enumerate(self.words) if word in word_set("lettering_after")), len(self.words))
        names = {token.i for token in self.doc if token.pos_ == "PROPN" and token.text[0].isupper()}
        compound = {token.i + side for token in self.doc if token.text == "-" for side in (-1, 1)}
        self.fixed = names | compound | {*range(min(first, lettering), len(self.words))}
        """Indices of words that must not change: names, hyphenated words, lettering in the picture, and sentences after the first."""

    @property
    def is_definition(self) -> bool:
        """True if the caption defines a term instead of describing a picture."""
        verbs = [token.head for token in self.doc if token.dep_ == "attr"]
        return any(child.dep_ == "nsubj" and child.pos_ != "PRON" for verb in verbs for child in verb.children)

    def word(self, place: int) -> str:
        """Return the word at an index, or "" if the index is outside the caption."""
        return self.words[place] if 0 <= place < len(self.words) else ""

    def places(self, start: int, end: int) -> list[int]:
        """Return the indices of the words between two character offsets."""
        return [token.i for token in self.doc if start <= token.idx < end]

    def nouns(self) -> Iterator[Any]:
        """Yield all nouns except modifiers of another noun, such as "fire" in "fire truck"."""
        return (token for token in self.doc if token.pos_ == "NOUN" and token.dep_ not in ("compound", "nmod", "poss"))

    def with_words(self, changes: Mapping[int, str]) -> str:
        """Replace the words at the given indices, adjust a/an, and return the new caption. An empty replacement deletes the word."""
        replacements = dict(changes)
        for place, new in changes.items():
            if new and self.word(place - 1) in ("a", "an"):
                replacements.setdefault(place - 1, article(new))
        text = ""
        for token in self.doc:
            new = like(replacements[token.i], token.text) if token.i in replacements else token.text
            text += new + token.whitespace_ if new else ""
        return text.strip()


def described(token: Any) -> Any:
    """Return the noun that an adjective describes, or None. Several adjectives can describe one noun, as in "a red and blue hat"."""
    head = token.head
    while token.dep_ == "conj" and head.dep_ in ("conj", "amod", "nmod", "compound"):
        token, head = head, head.head
    return head if token.dep_ in ("amod", "nmod", "compound") and head.pos_ in ("NOUN", "PROPN") and head.i > token.i else None


def modifiers(noun: Any) -> set[str]:
    """Return the words that precede a noun and describe it or belong to its name, such as "fire" in "fire truck"."""
    return {child.lower_ for child in noun.lefts}


def doer(verb: Any) -> Any:
    """Return the subject of a verb. If it has none, return the noun that it modifies ("man" in "a man riding a horse"), or None."""
    subject = next((child for child in verb.children if child.dep_ == "nsubj"), None)
    return verb.head if subject is None and verb.dep_ in ("acl", "relcl") else subject


def objects(token: Any) -> list[Any]:
    """Return the objects of a preposition or verb."""
    nouns = [child for child in token.children if child.dep_ in ("pobj", "dobj")]
    return nouns + [conjunct for noun in nouns for conjunct in noun.conjuncts if conjunct not in nouns]


def governor(noun: Any) -> str:
    """Return the preposition or verb that governs a noun, or "of_a_sentence" for a subject and for the head noun of a verbless caption."""
    while noun.dep_ == "conj":
        noun = noun.head
    if noun.dep_ in ("pobj", "dobj"):
        return "in_front" if noun.head.lower_ == "of" and noun.head.head.lower_ == "front" else str(noun.head.lemma_)
    return "of_a_sentence" if noun.dep_ in ("nsubj", "nsubjpass", "ROOT", "attr", "appos") else ""
