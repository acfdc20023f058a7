"""Word-by-word comparison of two captions, and a check that a counterfactual changes exactly one visible thing."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cfvlm_ds.core.conversation import normalised
from cfvlm_ds.core.sequences import differing
from cfvlm_ds.core.text import printable
from cfvlm_ds.counterfactuals.propose.vocabulary import NOUNS, NUMBERS

WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*|\d+|[^\w\s]|_")
"""A word with its apostrophes and hyphens, a number, or a punctuation mark."""
MOST_CHANGED = 6
"""Maximum number of words in one change."""
MOST_CHARACTERS = 2000

_SAME = """grey gray silver, purple violet, cyan turquoise aqua, beige tan, sofa couch, tv television, bike bicycle
    plane airplane aeroplane, big large huge giant, small little tiny, phone cellphone telephone smartphone, photo picture image photograph
    kid child, kids children, man guy gentleman, woman lady, men guys, women ladies, road street, sea ocean, stone rock, boat ship
    rabbit bunny, dog puppy, cat kitten, below under underneath beneath, above over, beside by near, 1 one, 2 two, 3 three, 4 four, 5 five
    6 six, 7 seven, 8 eight, 9 nine, 10 ten, car automobile, laptop notebook, trousers pants, jumper sweater, lorry truck, wood wooden
    taxi cab, mug cup, sitting seated, donut doughnut, donuts doughnuts"""
SYNONYMS = {word: number for number, group in enumerate(_SAME.replace("\n", ",").split(",")) for word in group.split()}
"""Word -> index of its synonym group. Replacing a word with a synonym does not count as a change."""

_EMPTY = """a an the some of to is are was were be being been that this these those there it its and also very quite just really
    has have with i we you he she they which who"""
EMPTY_WORDS = frozenset(_EMPTY.split())
"""Function words. Changing only these words makes no visible difference."""


@functools.lru_cache(256)
def words(text: str) -> tuple[str, ...]:
    """Split a text into words and punctuation marks, in lower case."""
    return tuple(word.lower() for word in WORD.findall(text))


@dataclass(frozen=True)
class Difference:
    """The words of two texts between their common prefix and common suffix. ``first`` is the length of the prefix in words. ``swap`` is
    true if both texts have the same words, possibly in a different order.
    """

    before: tuple[str, ...]
    after: tuple[str, ...]
    first: int
    swap: bool


@functools.lru_cache(16)
def difference(caption: str, text: str) -> Difference:
    """Compare two texts word by word, ignoring case (see ``Difference``)."""
    old, new = words(caption), words(text)
    of_old, of_new = differing(old, new)
    return Difference(old[of_old], new[of_new], of_old.start, sorted(old) == sorted(new))


def defect(caption: str, text: str, kind: str) -> str | None:
    """Return why a text is not a counterfactual of a caption, or None if it is one. Only the words are compared."""
    if not text.strip():
        return "no text"
    if printable(text) != text or len(text) > MOST_CHARACTERS:
        return "not one printable line"
    if normalised(caption) == normalised(text):
        return "nothing changed"
    differs = difference(caption, text)
    old, new = (tuple(word for word in side if word.isalnum() or "-" in word or "'" in word) for side in (differs.before, differs.after))
    if not old and not new:
        return "only punctuation changed"
    if differs.swap:
        return None if kind.startswith("swap") or kind == "relation" else "only the word order changed"
    if kind.startswith("swap"):
        return "not a swap: the words differ"
    if not (set(old) | set(new)) - EMPTY_WORDS or set(old) - EMPTY_WORDS == set(new) - EMPTY_WORDS:
        return "nothing visible changed"
    meanings = [{SYNONYMS.get(word, word) for word in set(side) - EMPTY_WORDS} for side in (old, new)]
    if meanings[0] == meanings[1]:
        return "a paraphrase"
    if kind == "count":
        return None if _uncounted(old) == _uncounted(new) else "more than one thing changed"
    if max(len(old), len(new)) > MOST_CHANGED or _kept_between(differs) > 0:
        return "more than one thing changed"
    if any("n't" in word or word in ("no", "not", "without", "never", "none") for word in set(new) ^ set(old)):
        return "a negation"
    return None


def _uncounted(side: Sequence[str]) -> list[str]:
    """Remove numbers and function words, and return the base form of each remaining word."""
    kept = [
        word
        for word in side
        if word not in EMPTY_WORDS and word not in NUMBERS and not word.isdecimal() and word not in ("single", "pair", "several", "group")
    ]
    return [NOUNS[word][1] if word in NOUNS else _stem(word) for word in kept]


def _stem(word: str) -> str:
    """Strip the ending of a plural noun or a third-person verb: "flies" becomes "fly", and "passes" becomes "pass"."""
    if word.endswith("ies") and len(word) > 4:
        return f"{word[:-3]}y"
    return re.sub(r"(?<=[a-z]{2})(?:(?<=[sxzh])es|(?<!s)s)$", "", word)


def _kept_between(differs: Difference) -> int:
    """Count the unchanged content words between two changed words, such as "big" in "red big dog" and "blue big cat"."""
    common = Counter(differs.before) & Counter(differs.after)
    return sum(count for word, count in common.items() if word not in EMPTY_WORDS and word.isalnum())
