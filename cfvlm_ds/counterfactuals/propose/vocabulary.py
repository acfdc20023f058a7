"""Vocabulary of the edit rules: the lists of `words.yaml` as sets and tables."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import yaml

LISTS: Mapping[str, Any] = yaml.safe_load(files(__package__).joinpath("words.yaml").read_text("utf-8"))


@functools.cache
def word_set(name: str) -> frozenset[str]:
    """Return the set of words in the list ``name`` of words.yaml."""
    return frozenset(LISTS[name].split())


@functools.cache
def by_word(name: str) -> dict[str, tuple[str, ...]]:
    """Return the table ``name`` from words.yaml. A key that lists several words is split into one key per word."""
    return {word: tuple(listed.split()) for words, listed in LISTS[name].items() for word in words.split()}


def _plural(one: str) -> str:
    if one.endswith(("s", "x", "z", "ch", "sh")):
        return f"{one}es"
    return f"{one[:-1]}ies" if one.endswith("y") and one[-2] not in "aeiou" else f"{one}s"


COLOURS, MATERIALS, TEXTURES = (tuple(LISTS[name].split()) for name in ("colours", "materials", "textures"))
SIZES, ACTIONS = by_word("sizes"), by_word("actions")
NUMBERS = {word: number for number, word in enumerate(LISTS["numbers"].split(), 1)}
NOUNS: dict[str, tuple[str, str, str]] = {}
"""Singular or plural of a noun -> (category, singular, plural)."""
for _category, _listed in LISTS["nouns"].items():
    for _one, _, _irregular in (_forms.partition("/") for _forms in _listed.split()):
        _many = _irregular or _plural(_one)
        NOUNS[_one] = NOUNS[_many] = (_category, _one, _many)
LETTERING = word_set("lettering")
