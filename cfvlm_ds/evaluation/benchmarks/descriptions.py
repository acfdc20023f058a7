"""Metrics for descriptions: the share of mentioned objects that are hallucinated, and the share of a picture's objects that are mentioned.

An item has one text per recognisable object, such as "chair: chair, seat, stool": a label, then names of one or two words. The text is true
if the picture shows the object. A text's score is the number of times the description mentions the object.
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
    ("ves", "fe"), ("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("oes", "o"),
)  # fmt: skip
"""(plural ending, singular ending)."""


@lru_cache(16)
def names_of(texts: tuple[str, ...]) -> dict[str, int]:
    """Return lower-case name -> index of its text. A name that occurs in several texts belongs to the last of them."""
    return {name.lower(): number for number, text in enumerate(texts) for name in text.partition(": ")[2].split(", ") if name}


@lru_cache(1 << 16)
def _forms(word: str) -> tuple[str, ...]:
    """Return a word and its possible singulars. Most candidates are not real words, so they match no name."""
    if word == "leaves":  # WordNet's singular, although AMBER lists an object "leave"
        return word, "leaf"
    return word, *(word.removesuffix(plural) + singular for plural, singular in _PLURALS if word.endswith(plural))


def named(text: str, names: Mapping[str, object]) -> list[str]:
    """Return the ``names`` that a text mentions, in order of occurrence. Case is ignored, and plurals match their singulars.

    The text is split into words at spaces and at punctuation other than hyphens, so "dog's" mentions a dog. Two-word names take precedence:
    "hot dogs" are not dogs. Any use of a word counts, even the verb "to sink".
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
    """Count the mentions of each text. ``found`` lists the mentioned names, and ``names`` maps each name to its text index, or to -1 if it
    is to be ignored.
    """
    counts = Counter(names[name] for name in found)
    return tuple(float(counts[number]) for number in range(num_texts))


class Counts(NamedTuple):
    """Counts over descriptions. The last four fields count pairs of a description and an object. An object is false if it is not in the
    picture.
    """

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
    """Return the counts over all items. The last ``num_last`` texts of each item are ignored. ``table`` must not be empty."""
    rows = [(judged.scores[0], judged.item.match[0]) for judged in table]
    if num_last:
        rows = [(scores[:-num_last], truth[:-num_last]) for scores, truth in rows]
    return Counts(*map(sum, zip(*(_counted(scores, truth) for scores, truth in rows), strict=True)))


def share(part: float, whole: float) -> float:
    """Return ``part / whole`` in %, or 0 if ``whole`` is 0."""
    return 100 * part / whole if whole else 0.0


def described(table: Sequence[Judged]) -> Values:
    """Return four metrics in %, pooled over all descriptions. An object is hallucinated if it is mentioned but not in the picture.

    ``hallucinated``: share of distinct mentioned objects that are hallucinated. ``covered``: share of the pictures' objects that are
    mentioned. ``chair_i`` (CHAIR): share of all mentions, including repetitions, that name a hallucinated object. ``chair_s`` (CHAIR):
    share of descriptions that mention a hallucinated object.
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
