"""Metrics of benchmarks: pure functions of judged items, in %.

``seen`` tables follow the official rules: a tie is wrong. A blind table says the same of every image, and a tie counts there what a guess
among the tied texts is worth; parts of a conjunction multiply. A metric that compares images is absent from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from math import comb, prod

import numpy as np

from cfvlm_ds.evaluation.benchmarks.base import Judged, Values

Key = Callable[[Judged], str]
_KNOWN = 1 << 16
"""Items of which is kept what was found: a bootstrap draws each a thousand times."""


def tag(*names: str) -> Key:
    """The value of a tag of an item, or of several together."""
    return lambda judged: "\0".join(judged.item.tags[name] for name in names)


def grouped(table: Iterable[Judged], key: Key) -> dict[str, list[Judged]]:
    """Items by a key, in the order of their first appearance."""
    found: dict[str, list[Judged]] = {}
    for each in table:
        found.setdefault(key(each), []).append(each)
    return found


def sets(table: Iterable[Judged], key: Key) -> list[list[Judged]]:
    """Items that are judged together, such as a pair, by a key; those that a bootstrap has drawn twice are two sets."""
    return list(grouped(table, lambda judged: f"{judged.draw}\0{key(judged)}").values())


def mean(values: Sequence[float]) -> float:
    """In %. The caller knows that there is one."""
    return 100 * sum(values) / len(values)


def text_right(judged: Judged, image: int = 0) -> float:
    """Whether every text that is true of an image beats every one that is false.

    In a blind table, the probability that it does when ties are broken at random.
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
    """Whether the texts of every image are right."""
    return prod(text_right(judged, image) for image in range(len(judged.scores)))


def image_right(judged: Judged) -> float:
    """Whether every text prefers each image that it is true of to each that it is false of."""
    match, scores = judged.item.match, judged.scores
    for c in range(len(judged.item.texts)):
        true = [line[c] for line, truth in zip(scores, match, strict=True) if truth[c]]
        false = [line[c] for line, truth in zip(scores, match, strict=True) if not truth[c]]
        if not all(a > b for a in true for b in false):
            return 0.0
    return 1.0


def accuracy(table: Sequence[Judged]) -> Values:
    """Share of images whose true texts beat the false ones."""
    values = [text_right(each, image) for each in table for image in range(len(each.scores))]
    return {"accuracy": mean(values)} if values else {}


def macro(table: Sequence[Judged], key: Key, least: int = 1) -> Values:
    """Accuracy of each part, ``macro/PART``, and their mean; a part of fewer than ``least`` items does not count."""
    parts = {f"macro/{name}": accuracy(part)["accuracy"] for name, part in grouped(table, key).items() if len(part) >= least}
    return means(parts, {"macro": "macro/"}) | parts


def sliced(table: Sequence[Judged], key: Key, metrics: Callable[[Sequence[Judged]], Values]) -> Values:
    """A metric of everything, and as METRIC/PART of each part."""
    found = metrics(table)
    for name, part in grouped(table, key).items():
        found |= {f"{metric}/{name}": value for metric, value in metrics(part).items()}
    return found


def by(name: str, metrics: Callable[[Sequence[Judged]], Values]) -> Callable[[Sequence[Judged]], Values]:
    """Return a metric of all items and, as METRIC/PART, of the items of each tag."""
    return lambda table: sliced(table, tag(name), metrics)


def macro_by(name: str, least: int = 1) -> Callable[[Sequence[Judged]], Values]:
    """Return a metric with the accuracy of each tag, their mean (see ``macro``), and the accuracy of all items."""
    return lambda table: macro(table, tag(name), least) | accuracy(table)


def means(values: Values, starts: Mapping[str, str]) -> Values:
    """For each name the mean of those ``values`` whose names begin so; none where there is no such value."""
    parts = {name: [value for key, value in values.items() if key.startswith(start)] for name, start in starts.items()}
    return {name: sum(found) / len(found) for name, found in parts.items() if found}


def quads(table: Sequence[Judged]) -> Values:
    """Winoground's text, image and group score, and ``pair``, the share of single text comparisons that are won."""
    if not table:
        return {}
    found = {"text": mean([all_right(each) for each in table]), "pair": accuracy(table)["accuracy"]}
    if not any(each.blind for each in table):
        found["image"] = mean([image_right(each) for each in table])
        found["group"] = mean([all_right(each) * image_right(each) for each in table])
    return found


QUAD_CHANCE = {"text": 25.0, "pair": 50.0, "image": 25.0, "group": 100 / 6}
"""Of two images and two texts."""


def together(table: Sequence[Judged], key: Key) -> float | None:
    """Share of the sets of items that a key puts together whose items are all right; None without any."""
    found = [prod(map(all_right, members)) for members in sets(table, key)]
    return mean(found) if found else None


# Yes and no --------------------------------------------------------------------------------------------------------------------------


def said(judged: Judged, text: int) -> float:
    """Whether the answer is this text: it beats all others. In a blind table a tie is a share of each; otherwise nothing was said."""
    return _said(judged.scores[0], text, judged.blind)


@lru_cache(_KNOWN)
def _said(scores: tuple[float, ...], text: int, blind: bool) -> float:
    tied = scores.count(max(scores))
    return 0.0 if _nan(scores) or scores[text] != max(scores) or (tied > 1 and not blind) else 1 / tied


def binary(table: Sequence[Judged], positive: int = 0) -> Values:
    """Accuracy, precision, recall and F1 of the answer ``positive`` (0: yes), and the share of yes among all predictions.

    An item has the texts yes and no, in this order. An answer that is neither is wrong and not predicted. Where nothing is positive there
    is nothing to find, and only accuracy and share remain.
    """
    if not table:
        return {}
    gold = [bool(each.item.match[0][positive]) for each in table]
    predicted = [said(each, positive) for each in table]
    hit = sum(value for value, true in zip(predicted, gold, strict=True) if true)
    found = {**accuracy(table), "yes_ratio": mean([said(each, 0) for each in table])}
    if not any(gold):
        return found
    precision = hit / sum(predicted) if sum(predicted) else 0.0
    recall = hit / sum(gold)
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return found | {"precision": 100 * precision, "recall": 100 * recall, "f1": 100 * f1}


def margins(table: Sequence[Judged]) -> list[tuple[float, bool]]:
    """How much likelier yes is than no, and whether it is true."""
    return [(each.scores[0][0] - each.scores[0][1], bool(each.item.match[0][0])) for each in table]


def auc(pairs: Sequence[tuple[float, bool]]) -> float | None:
    """Share of pairs of a yes and a no in which the yes has the larger margin, a tie one half; in %.

    None where one of the two answers never occurs, or a score is no number.
    """
    yes, no = (np.sort([margin for margin, true in pairs if true is answer]) for answer in (True, False))
    if not len(yes) or not len(no) or np.isnan([*yes, *no]).any():
        return None
    won = np.searchsorted(no, yes, "left") + np.searchsorted(no, yes, "right")
    return float(100 * (won.sum() / 2) / (len(yes) * len(no)))


def threshold(pairs: Sequence[tuple[float, bool]]) -> float:
    """The margin above which to say yes so that the most of ``pairs`` are right; of several the one nearest to 0, then the smaller."""
    yes, no = (np.sort([margin for margin, true in pairs if true is answer]) for answer in (True, False))
    values = np.unique([margin for margin, _ in pairs])
    cuts = np.concatenate([[0.0, values[0] - 1, values[-1] + 1], (values[1:] + values[:-1]) / 2])
    right = len(yes) - np.searchsorted(yes, cuts, "right") + np.searchsorted(no, cuts, "right")
    return float(cuts[np.lexsort((cuts, np.abs(cuts), -right))[0]])


def calibrated(table: Sequence[Judged]) -> float | None:
    """Accuracy with a threshold on the margin that was found on the other half of the clusters, halves by a hash of the cluster; in %.

    None where a half is empty. A model that says yes to everything but knows the answers has a high one.
    """
    halves: tuple[list[tuple[float, bool]], list[tuple[float, bool]]] = ([], [])
    for each, pair in zip(table, margins(table), strict=True):
        if pair[0] != pair[0] or abs(pair[0]) == float("inf"):
            return None
        halves[_half(each.item.cluster)].append(pair)
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
    """``binary``, and for what was seen or shuffled the area under the ROC curve and the accuracy with a calibrated threshold."""
    found = binary(table, positive)
    if (area := auc(margins(table))) is not None:
        found["auc"] = area
    if not any(each.blind for each in table) and (value := calibrated(table)) is not None:
        found["calibrated"] = value
    return found
