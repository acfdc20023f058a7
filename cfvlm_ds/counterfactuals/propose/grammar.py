"""Number and articles. Forms of listed words are stated; others come from inflect and lemminflect where those are installed."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from cfvlm_ds.core.versions import version
from cfvlm_ds.counterfactuals.propose.vocabulary import NOUNS, UNCOUNTED

LIBRARIES = ("inflect", "lemminflect")
_SOUNDS_LIKE_A = ("uni", "use", "usu", "eu", "one", "once", "ubi")
_SOUNDS_LIKE_AN = ("hour", "honest", "honor", "honour", "heir")
_OF_ONE = {"is": "are", "was": "were", "has": "have", "lies": "lie"} | {
    f"{verb}s": verb for verb in ("sit", "stand", "run", "walk", "sleep", "eat", "play", "look", "jump", "rest", "wait", "ride", "hold")
}
"""Verbs in the present, of one and of many."""


def article(following: str) -> str:
    """``a`` or ``an`` before a word, by its sound."""
    word = following.lower()
    if word.startswith(_SOUNDS_LIKE_A):
        return "a"
    return "an" if word[:1] in "aeiou" or word.startswith(_SOUNDS_LIKE_AN) or word in ("8", "11", "18") else "a"


def versions() -> dict[str, str]:
    """The libraries that proposals depend on; ``none`` where one is absent."""
    return {name: version(name) if _library(name) is not None else "none" for name in LIBRARIES}


def absent() -> str:
    """What is not proposed because a library is absent, in one sentence; empty where all are there."""
    missing = [name for name in LIBRARIES if _library(name) is None]
    if not missing:
        return ""
    return (
        f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: of the nouns and verbs that are not listed few are "
        "known, so fewer edits are proposed; pip install 'cfvlm-ds[counterfactuals]'"
    )


@functools.lru_cache(1 << 16)
def is_plural(noun: str) -> bool | None:
    """Whether a noun is for many; None where that is not known."""
    word = noun.lower()
    if word in UNCOUNTED:
        return None
    if word in NOUNS:
        return NOUNS[word][2] == word
    if (forms := _inflect()) is not None:
        return bool(forms.singular_noun(word))
    return True if word.endswith("s") and not word.endswith(("ss", "us", "is")) else None


@functools.lru_cache(1 << 16)
def is_finite(word: str, plural: bool) -> bool:
    """Whether a word is a verb in the present, as it follows one or many; False where that is not known for certain."""
    if word in _OF_ONE or word in _OF_ONE.values():
        return (word in _OF_ONE.values()) if plural else word in _OF_ONE
    lemminflect = _lemminflect()
    if lemminflect is None or not word.isalpha():
        return False
    lemmas = lemminflect.getAllLemmas(word)  # of its dictionary alone: what it does not know it does not guess
    if plural:
        return word in lemmas.get("VERB", ()) and word in lemmas.get("NOUN", (word,))
    return any(word in lemminflect.getInflection(lemma, tag="VBZ") for lemma in lemmas.get("VERB", ()))


@functools.cache
def _library(name: str) -> Any:
    """A module; None where it, or what it needs, is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


@functools.cache
def _inflect() -> Any:
    library = _library("inflect")
    return None if library is None else library.engine()


def _lemminflect() -> Any:
    return _library("lemminflect")
