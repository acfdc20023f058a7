"""Benchmark metrics: pure functions from items with scores to values in %.

On the items' own images, a tie counts as wrong, as in the official rules. A blind table is a control with the same scores for every image.
There, a tie counts as a random guess among the tied texts. If several guesses must be right, their probabilities are multiplied. Metrics
that compare images are not computed for blind tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from math import comb, nan, prod
from typing import Any

import numpy as np

from cfvlm_ds.evaluation.benchmarks.base import Judged, Metrics, Values

Key = Callable[[Judged], str]
_KNOWN = 1 << 16
"""Maximum number of cached results. A bootstrap can draw the same item a thousand times."""


def tag(*names: str) -> Key:
    """Return a function that looks up an item's tag, or joins the values of several tags."""
    first, *others = names
    if not others:
        return lambda judged: judged.item.tags[first]
    return lambda judged: "\0".join(judged.item.tags[name] for name in names)


def grouped(table: Iterable[Judged], key: Key) -> dict[str, list[Judged]]:
    """Group items by key, in order of first occurrence."""
    groups: dict[str, list[Judged]] = {}
    for judged in table:
        groups.setdefault(key(judged), []).append(judged)
    return groups


def sets(table: Iterable[Judged], key: Key) -> list[list[Judged]]:
    """Return the sets of items that share a key, such as pairs. A pair that a bootstrap draws twice forms two sets."""
    return list(grouped(table, lambda judged: f"{judged.draw}\0{key(judged)}").values())


def mean(values: Sequence[float]) -> float:
    """Return the mean of fractions (0 to 1) in %. ``values`` must not be empty."""
    return 100 * sum(values) / len(values)


def text_right(judged: Judged, image: int = 0) -> float:
    """Return 1 if some text is true of an image and all true texts score higher than all false ones, else 0.

    For a blind table, return the probability of this outcome if ties are broken at random.
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
    """Return 1 if ``text_right`` is 1 for every image, else 0. For a blind table, return the product of ``text_right`` over the images."""
    return prod(text_right(judged, image) for image in range(len(judged.scores)))


def image_right(judged: Judged) -> float:
    """Return 1 if every text scores higher on all images for which it is true than on all images for which it is false, else 0."""
    match, scores = judged.item.match, judged.scores
    for c in range(len(judged.item.texts)):
        true = [row[c] for row, truth in zip(scores, match, strict=True) if truth[c]]
        false = [row[c] for row, truth in zip(scores, match, strict=True) if not truth[c]]
        if not all(a > b for a in true for b in false):
            return 0.0
    return 1.0


def accuracy(table: Sequence[Judged]) -> Values:
    """Return ``accuracy``: the share of images whose true texts all score higher than their false texts, in %."""
    values = [text_right(judged, image) for judged in table for image in range(len(judged.scores))]
    return {"accuracy": mean(values)} if values else {}


def macro(table: Sequence[Judged], key: Key, least: int = 1) -> Values:
    """Return the accuracy on each part (the items with the same key) as ``macro/PART``, and the mean over parts as ``macro``. Parts with
    fewer than ``least`` items are left out.
    """
    parts = {f"macro/{name}": accuracy(part)["accuracy"] for name, part in grouped(table, key).items() if len(part) >= least}
    return means(parts, {"macro": "macro/"}) | parts


def by(name: str, metrics: Metrics) -> Metrics:
    """Return a function that computes ``metrics`` over all items and, as METRIC/PART, over the items whose tag ``name`` is PART."""

    def of_all_and_parts(table: Sequence[Judged]) -> Values:
        values = metrics(table)
        for part, members in grouped(table, tag(name)).items():
            values |= {f"{metric}/{part}": value for metric, value in metrics(members).items()}
        return values

    return of_all_and_parts


def macro_by(name: str, least: int = 1) -> Metrics:
    """Return a function that computes the accuracy for each value of the tag ``name``, the mean of these accuracies (see ``macro``), and
    the accuracy over all items.
    """
    return lambda table: macro(table, tag(name), least) | accuracy(table)


def means(values: Values, starts: Mapping[str, str]) -> Values:
    """Return means of metrics. ``starts`` maps the name of each mean to the prefix of the names of the metrics to average. A mean is
    omitted if no metric has its prefix.
    """
    parts = {name: [value for key, value in values.items() if key.startswith(start)] for name, start in starts.items()}
    return {name: sum(matching) / len(matching) for name, matching in parts.items() if matching}


def quads(table: Sequence[Judged]) -> Values:
    """Return Winoground's text, image and group scores, and ``pair``, the share of images on which the true text scores higher than the
    false one.
    """
    if not table:
        return {}
    values = {"text": mean([all_right(judged) for judged in table]), "pair": accuracy(table)["accuracy"]}
    if not any(judged.blind for judged in table):
        values["image"] = mean([image_right(judged) for judged in table])
        values["group"] = mean([all_right(judged) * image_right(judged) for judged in table])
    return values


QUAD_RANDOM = {"text": 25.0, "pair": 50.0, "image": 25.0, "group": 100 / 6}
"""Chance levels for two images and two texts, in %."""


def together(table: Sequence[Judged], key: Key) -> float | None:
    """Group the items by key, and return the share of groups in which every item is right; None if there are no items."""
    products = [prod(map(all_right, members)) for members in sets(table, key)]
    return mean(products) if products else None


# Yes and no --------------------------------------------------------------------------------------------------------------------------


@lru_cache(_KNOWN)
def _answer(judged: Judged) -> tuple[float, ...]:
    """Return an item's row of ``answers``. A tie counts as unanswered, except in a blind table, where each of n tied texts gets 1/n."""
    scores, truth = judged.scores[0], judged.item.match[0]
    tied = scores.count(max(scores))
    said = [0.0 if _nan(scores) or score != max(scores) or (tied > 1 and not judged.blind) else 1 / tied for score in scores]
    return *said, *map(bool, truth), text_right(judged), scores[0] - scores[1]


def answers(table: Sequence[Judged]) -> Any:
    """Return an array [items, 6] for items with the texts yes and no.

    The first five columns are indicators, 0 or 1 (1/2 for a tie in a blind table): answer is yes, answer is no, yes is correct, no is
    correct, answer is correct. The last column contains the score of yes minus the score of no: log-odds in nats, unless the answers were
    generated.
    """
    return np.fromiter(chain.from_iterable(map(_answer, table)), float).reshape(-1, 6)


def auc(margins: Any, truth: Any) -> float | None:
    """Return the area under the ROC curve in %: the share of pairs (yes item, no item) in which the yes item has the larger margin. A tie
    counts as one half. ``margins`` [items] holds the score of yes minus that of no. ``truth`` [items] is 1 where yes is correct.

    Return None if yes or no is never correct, or if a score is NaN.
    """
    yes, no = margins[truth == 1], np.sort(margins[truth != 1])
    if not len(yes) or not len(no) or np.isnan(margins).any():
        return None
    won = np.searchsorted(no, yes, "left") + np.searchsorted(no, yes, "right")
    return float(100 * (won.sum() / 2) / (len(yes) * len(no)))


def yes_no(table: Sequence[Judged], positive: int = 0) -> Values:
    """Return accuracy, the share of yes answers, the area under the ROC curve, and precision, recall and F1 for the answer ``positive`` (0:
    yes, 1: no).

    Items have the texts yes and no, in this order. An item without an answer (a tie) counts as wrong, but not as a prediction. If
    ``positive`` is never correct, precision, recall and F1 are left out. If the model never gives this answer, precision and F1 are NaN.
    """
    if not table:
        return {}
    found = answers(table)
    predicted, gold = found[:, positive], found[:, 2 + positive]
    values = {"accuracy": 100 * float(found[:, 4].sum()) / len(found), "yes_ratio": 100 * float(found[:, 0].sum()) / len(found)}
    hit, predictions, positives = float(predicted @ gold), float(predicted.sum()), float(gold.sum())
    if positives:
        precision, f1 = (hit / predictions, 2 * hit / (predictions + positives)) if predictions else (nan, nan)
        values |= {"precision": 100 * precision, "recall": 100 * hit / positives, "f1": 100 * f1}
    if (area := auc(found[:, 5], found[:, 2])) is not None:
        values["auc"] = area
    return values
