"""Descriptions: the objects that a generated text mentions, and the shares of objects that are invented or covered.

An item has one text for each object that can be recognised, of the form "chair: chair, seat, stool": a label and names of one or two words.
A text is true if the picture shows the object. Its score is the number of mentions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from cfvlm_ds.evaluation.benchmarks.base import Judged, Values

_TOKEN = re.compile(r"[^\W_]+(?:-[^\W_]+)*|[^\w\s]")
_PLURALS = (
    ("men", "man"), ("children", "child"), ("people", "person"), ("mice", "mouse"), ("geese", "goose"), ("ies", "y"), ("ves", "f"),
    ("ves", "fe"), ("es", ""), ("s", ""),
)  # fmt: skip
"""Ending of a plural -> ending of its singular."""


@lru_cache(16)
def names_of(texts: tuple[str, ...]) -> dict[str, int]:
    """Return the index of the text to which each name belongs, keyed by the name in lower case. A name of several texts belongs to the
    last.
    """
    return {name.lower(): number for number, text in enumerate(texts) for name in text.partition(": ")[2].split(", ") if name}


@lru_cache(1 << 16)
def _forms(word: str) -> tuple[str, ...]:
    """Return a word and its possible singulars, most of which are no words and match no name."""
    if word == "leaves":  # as WordNet has it, although AMBER lists the object "leave"
        return word, "leaf"
    return word, *(word.removesuffix(plural) + singular for plural, singular in _PLURALS if word.endswith(plural))


def named(text: str, names: Mapping[str, object]) -> list[str]:
    """Return the ``names`` that a text mentions, in the order of the text, ignoring case and number.

    Words are tokens between spaces and punctuation, so "dog's" mentions a dog. A name of two words comes before a name of one: "hot dogs"
    are not dogs. Other uses of a word, such as "to sink", are mentions too.
    """
    tokens, found, place = [_forms(token) for token in _TOKEN.findall(text.lower())], list[str](), 0
    while place < len(tokens):
        following = tokens[place + 1] if place + 1 < len(tokens) else ()
        pairs = [f"{word} {other}" for word in tokens[place] for other in following]
        name = next((name for name in (*pairs, *tokens[place]) if name in names), None)
        found += [] if name is None else [name]
        place += 2 if name in pairs else 1
    return found


def tally(found: Iterable[str], names: Mapping[str, int], num_texts: int) -> tuple[float, ...]:
    """Return the number of ``found`` names that belong to each text. Names that belong to -1 are left out."""
    counts = Counter(names[name] for name in found)
    return tuple(float(counts[number]) for number in range(num_texts))


class Counts(NamedTuple):
    """Counts over descriptions: mentions, and pairs of a description and an object. ``false`` objects are not in the picture."""

    inventing: float
    """Number of descriptions that mention a false object."""
    mentions: float
    false_mentions: float
    true: float
    true_mentioned: float
    false: float
    false_mentioned: float


@lru_cache(1 << 16)
def _counted(scores: tuple[float, ...], truth: tuple[int, ...]) -> Counts:
    mentioned = [(score, value) for score, value in zip(scores, truth, strict=True) if score > 0]
    false, true = [score for score, value in mentioned if not value], sum(truth)
    every = sum(score for score, _ in mentioned)
    return Counts(bool(false), every, sum(false), true, len(mentioned) - len(false), len(truth) - true, len(false))


def counted(table: Sequence[Judged], num_last: int = 0) -> Counts:
    """Return the counts over all items, without the last ``num_last`` texts of each. ``table`` must not be empty."""
    rows = [(judged.scores[0], judged.item.match[0]) for judged in table]
    if num_last:
        rows = [(scores[:-num_last], truth[:-num_last]) for scores, truth in rows]
    return Counts(*map(sum, zip(*(_counted(scores, truth) for scores, truth in rows), strict=True)))


def share(part: float, whole: float) -> float:
    """Return a share in %, which is 0 for an empty whole."""
    return 100 * part / whole if whole else 0.0


def described(table: Sequence[Judged]) -> Values:
    """Return the metrics of descriptions in %: ``hallucinated``, the share of false objects among those that a description mentions;
    ``covered``, the share of the picture's objects that are mentioned; CHAIR's ``chair_i``, the share of mentions that are false; and its
    ``chair_s``, the share of descriptions with a false object. All objects and mentions count alike, in whichever description they are.
    """
    if not table:
        return {}
    counts = counted(table)
    return {
        "hallucinated": share(counts.false_mentioned, counts.true_mentioned + counts.false_mentioned),
        "covered": share(counts.true_mentioned, counts.true),
        "chair_i": share(counts.false_mentions, counts.mentions),
        "chair_s": share(counts.inventing, len(table)),
    }
