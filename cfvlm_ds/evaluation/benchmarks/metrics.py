"""Metrics of benchmarks: pure functions of judged items, in %.

``seen`` tables follow the official rules, by which a tie is wrong. A blind table has the same scores for every image. In a blind table, a
tie counts as a guess among the tied texts, the probabilities of a conjunction are multiplied, and metrics that compare images are absent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from math import comb, nan, prod
from typing import Any

import numpy as np

from cfvlm_ds.evaluation.benchmarks.base import Judged, Metrics, Values

Key = Callable[[Judged], str]
_KNOWN = 1 << 16
"""Number of items whose results are cached, because a bootstrap draws each of them up to a thousand times."""


def tag(*names: str) -> Key:
    """Return a key function, which returns the value of an item's tag, or the joined values of several tags."""
    return lambda judged: "\0".join(judged.item.tags[name] for name in names)


def grouped(table: Iterable[Judged], key: Key) -> dict[str, list[Judged]]:
    """Group the items by key, in the order of the keys' first occurrence."""
    groups: dict[str, list[Judged]] = {}
    for judged in table:
        groups.setdefault(key(judged), []).append(judged)
    return groups


def sets(table: Iterable[Judged], key: Key) -> list[list[Judged]]:
    """Return the sets of items with the same key, such as pairs, that are judged together. A pair that is drawn twice is two sets."""
    return list(grouped(table, lambda judged: f"{judged.draw}\0{key(judged)}").values())


def mean(values: Sequence[float]) -> float:
    """Return the mean of shares in %; ``values`` must not be empty."""
    return 100 * sum(values) / len(values)


def text_right(judged: Judged, image: int = 0) -> float:
    """Return 1 if every text that is true of an image beats every text that is false of it, else 0.

    In a blind table, return the probability of this when ties are broken at random.
    """
    return _text_right(judged.scores[image], judged.item.match[image], judged.blind)


@lru_cache(_KNOWN)
def _text_right(scores: tuple[float, ...], truth: tuple[int, ...], blind: bool) -> float:
    true = [score for score, value in zip(scores, truth, strict=True) if value]
    false = [score for score, value in zip(scores, truth, strict=True) if not value]
    if not true or not false:
        return float(not false)
    worst, best = min(true), max(false)
    if worst > best and not _nan(scores):
        return 1.0
    if not blind or worst != best or _nan(scores):
        return 0.0
    return 1 / comb(true.count(worst) + false.count(worst), true.count(worst))


def _nan(scores: Sequence[float]) -> bool:
    return any(score != score for score in scores)


def all_right(judged: Judged) -> float:
    """Return 1 if ``text_right`` holds for every image, else 0. In a blind table, return the probability of this."""
    return prod(text_right(judged, image) for image in range(len(judged.scores)))


def image_right(judged: Judged) -> float:
    """Return 1 if every text scores higher on each image that it is true of than on each image that it is false of, else 0."""
    match, scores = judged.item.match, judged.scores
    for c in range(len(judged.item.texts)):
        true = [row[c] for row, truth in zip(scores, match, strict=True) if truth[c]]
        false = [row[c] for row, truth in zip(scores, match, strict=True) if not truth[c]]
        if not all(a > b for a in true for b in false):
            return 0.0
    return 1.0


def accuracy(table: Sequence[Judged]) -> Values:
    """Return the share of images whose true texts beat the false ones."""
    values = [text_right(judged, image) for judged in table for image in range(len(judged.scores))]
    return {"accuracy": mean(values)} if values else {}


def macro(table: Sequence[Judged], key: Key, least: int = 1) -> Values:
    """Return the accuracy of each part as ``macro/PART``, and their mean as ``macro``. Parts of fewer than ``least`` items are left out."""
    parts = {f"macro/{name}": accuracy(part)["accuracy"] for name, part in grouped(table, key).items() if len(part) >= least}
    return means(parts, {"macro": "macro/"}) | parts


def by(name: str, metrics: Metrics) -> Metrics:
    """Return a function that computes ``metrics`` for all items and, as METRIC/PART, for the items with each value of the tag ``name``."""

    def of_all_and_parts(table: Sequence[Judged]) -> Values:
        values = metrics(table)
        for part, members in grouped(table, tag(name)).items():
            values |= {f"{metric}/{part}": value for metric, value in metrics(members).items()}
        return values

    return of_all_and_parts


def macro_by(name: str, least: int = 1) -> Metrics:
    """Return a function that computes the accuracy for each value of the tag ``name``, their mean (see ``macro``), and ``accuracy``."""
    return lambda table: macro(table, tag(name), least) | accuracy(table)


def means(values: Values, starts: Mapping[str, str]) -> Values:
    """Return, for each (name, prefix) of ``starts``, the mean of the values whose names have the prefix. Prefixes without values are
    omitted.
    """
    parts = {name: [value for key, value in values.items() if key.startswith(start)] for name, start in starts.items()}
    return {name: sum(matching) / len(matching) for name, matching in parts.items() if matching}


def quads(table: Sequence[Judged]) -> Values:
    """Return Winoground's text, image and group score, and ``pair``, the share of single text comparisons that are won."""
    if not table:
        return {}
    values = {"text": mean([all_right(judged) for judged in table]), "pair": accuracy(table)["accuracy"]}
    if not any(judged.blind for judged in table):
        values["image"] = mean([image_right(judged) for judged in table])
        values["group"] = mean([all_right(judged) * image_right(judged) for judged in table])
    return values


QUAD_RANDOM = {"text": 25.0, "pair": 50.0, "image": 25.0, "group": 100 / 6}
"""Values of random scores for two images and two texts, in %."""


def together(table: Sequence[Judged], key: Key) -> float | None:
    """Group the items by key, and return the share of groups in which all items are right; None without items."""
    products = [prod(map(all_right, members)) for members in sets(table, key)]
    return mean(products) if products else None


# Yes and no --------------------------------------------------------------------------------------------------------------------------


def said(judged: Judged, text: int) -> float:
    """Return 1 if the answer is this text, that is, if it beats all others, else 0. With a tie there is no answer, except in a blind table,
    where each of n tied texts gets 1/n.
    """
    return _said(judged.scores[0], text, judged.blind)


@lru_cache(_KNOWN)
def _said(scores: tuple[float, ...], text: int, blind: bool) -> float:
    tied = scores.count(max(scores))
    return 0.0 if _nan(scores) or scores[text] != max(scores) or (tied > 1 and not blind) else 1 / tied


def binary(table: Sequence[Judged], positive: int = 0) -> Values:
    """Return accuracy, precision, recall and F1 of the answer ``positive`` (0: yes, 1: no), and the share of items answered with yes.

    An item has the texts yes and no, in this order. An item without an answer is wrong, and is not a prediction in precision. If no item is
    positive, only accuracy and the share of yes are returned. If no answer is positive, precision and F1 are not defined (NaN).
    """
    if not table:
        return {}
    gold = [bool(judged.item.match[0][positive]) for judged in table]
    predicted = [said(judged, positive) for judged in table]
    hit = sum(value for value, true in zip(predicted, gold, strict=True) if true)
    values = {**accuracy(table), "yes_ratio": mean([said(judged, 0) for judged in table])}
    if not any(gold):
        return values
    precision, f1 = (hit / sum(predicted), 2 * hit / (sum(predicted) + sum(gold))) if sum(predicted) else (nan, nan)
    return values | {"precision": 100 * precision, "recall": 100 * hit / sum(gold), "f1": 100 * f1}


def margins(table: Sequence[Judged]) -> list[tuple[float, bool]]:
    """Return, for each item, the log-odds of yes over no in nats, and True if yes is correct."""
    return [(judged.scores[0][0] - judged.scores[0][1], bool(judged.item.match[0][0])) for judged in table]


def _by_answer(pairs: Sequence[tuple[float, bool]]) -> tuple[Any, Any]:
    """Return the sorted margins of items whose answer is yes, and those of the other items."""
    yes, no = (np.sort([margin for margin, true in pairs if true is answer]) for answer in (True, False))
    return yes, no


def auc(pairs: Sequence[tuple[float, bool]]) -> float | None:
    """Return the area under the ROC curve in %: the share of pairs (a yes item, a no item) in which the yes item has the larger margin. A
    tie counts as one half.

    Return None if one of the two answers never occurs or a score is not a number.
    """
    yes, no = _by_answer(pairs)
    if not len(yes) or not len(no) or np.isnan([*yes, *no]).any():
        return None
    won = np.searchsorted(no, yes, "left") + np.searchsorted(no, yes, "right")
    return float(100 * (won.sum() / 2) / (len(yes) * len(no)))


def threshold(pairs: Sequence[tuple[float, bool]]) -> float:
    """Return the margin threshold for yes that classifies the most ``pairs`` correctly. Of several such thresholds, return the one nearest
    to 0, and of two equally near the smaller one.
    """
    yes, no = _by_answer(pairs)
    values = np.unique([margin for margin, _ in pairs])
    cuts = np.concatenate([[0.0, values[0] - 1, values[-1] + 1], (values[1:] + values[:-1]) / 2])
    right = len(yes) - np.searchsorted(yes, cuts, "right") + np.searchsorted(no, cuts, "right")
    return float(cuts[np.lexsort((cuts, np.abs(cuts), -right))[0]])


def calibrated(table: Sequence[Judged]) -> float | None:
    """Return the accuracy in % with a threshold that is fitted on the other half of the clusters. A hash of the cluster selects its half.

    Return None if a half is empty or a margin is not finite. A model that always answers yes but separates the classes scores high.
    """
    halves: tuple[list[tuple[float, bool]], list[tuple[float, bool]]] = ([], [])
    for judged, pair in zip(table, margins(table), strict=True):
        if pair[0] != pair[0] or abs(pair[0]) == float("inf"):
            return None
        halves[_half(judged.item.cluster)].append(pair)
    if not all(halves):
        return None
    right = 0
    for half, other in (halves, halves[::-1]):
        cut = threshold(other)
        right += sum((margin > cut) is true for margin, true in half)
    return 100 * right / len(table)


@lru_cache(_KNOWN)
def _half(cluster: str) -> int:
    return hashlib.sha256(cluster.encode("utf-8", "surrogatepass")).digest()[0] % 2


def yes_no(table: Sequence[Judged], positive: int = 0) -> Values:
    """Return the metrics of ``binary``, the area under the ROC curve and, unless a table is blind, the accuracy of ``calibrated``."""
    values = binary(table, positive)
    if (area := auc(margins(table))) is not None:
        values["auc"] = area
    if not any(judged.blind for judged in table) and (value := calibrated(table)) is not None:
        values["calibrated"] = value
    return values
