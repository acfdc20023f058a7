"""Shortcuts: classifiers that recognise counterfactual texts by their words or length, or edited pictures by their grain (low-level
statistics). They never compare texts with pictures.

The classifiers that use words or grain are fitted on one half of the groups and evaluated on the other. Groups with the same picture are in
the same half.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cfvlm_ds.counterfactuals.propose.word_difference import words
from cfvlm_ds.evaluation.benchmarks import metrics

Array = npt.NDArray[Any]
_TELLING = 12
_RIDGE = 1.0
LIMIT_AUC = 0.6
_FEWEST = 10
"""Minimum number of pairs, both for fitting and for evaluation. The interval of an AUC from 10 pairs is about 0.5 wide."""


@dataclass(frozen=True)
class Shortcut:
    """Result of a classifier: area under the ROC curve with its 95 % confidence interval (None if not measured), and the number of
    evaluated pairs. ``telling`` lists the strongest features, or the reason why nothing was measured.
    """

    name: str
    auc: float | None
    low: float | None
    high: float | None
    pairs: int
    telling: tuple[str, ...] = ()

    @property
    def exceeds(self) -> bool:
        """True if the AUC is above ``LIMIT_AUC`` and its interval excludes 0.5."""
        return self.auc is not None and self.low is not None and self.low > 0.5 and self.auc > LIMIT_AUC

    def __str__(self) -> str:
        if self.auc is None:
            return "not measured"
        doubt = ", above the limit, but the interval includes 0.5: too few pairs to tell" * (self.auc > LIMIT_AUC and not self.exceeds)
        return f"AUC {self.auc:.3f} ({self.low:.3f} to {self.high:.3f}){doubt}"


def _not_measured(name: str) -> Shortcut:
    return Shortcut(name, None, None, None, 0, (f"fewer than {_FEWEST} pairs for fitting or for evaluation",))


def auc(positive: Sequence[float], negative: Sequence[float]) -> tuple[float, float, float]:
    """Compute the area under the ROC curve and its 95 % confidence interval (Hanley and McNeil 1982). A tie counts as one half."""
    n, m = len(positive), len(negative)
    area = (metrics.auc(np.array([*positive, *negative]), np.arange(n + m) < n) or 0.0) / 100
    first, second = area / (2 - area), 2 * area * area / (1 + area)
    spread = (area * (1 - area) + (n - 1) * (first - area * area) + (m - 1) * (second - area * area)) / (n * m)
    half = 1.96 * math.sqrt(max(spread, 0.25 / (n * m) if area in (0.0, 1.0) else 0.0))
    return area, max(0.0, area - half), min(1.0, area + half)


def by_length(pairs: Sequence[tuple[str, str]]) -> Shortcut:
    """Classify texts by length in characters. Nothing is fitted except the direction (longer or shorter)."""
    if len(pairs) < _FEWEST:
        return _not_measured("texts by length")
    longer = [len(new) for _, new in pairs], [len(old) for old, _ in pairs]
    area, low, high = auc(*longer)
    if area < 0.5:
        area, low, high = 1 - area, 1 - high, 1 - low
    more = sum(len(new) > len(old) for old, new in pairs)
    description = (
        f"counterfactuals are longer in {more}, shorter in {sum(len(new) < len(old) for old, new in pairs)} of {len(pairs)} pairs",
    )
    return Shortcut("texts by length", area, low, high, len(pairs), description)


def _log_odds(pairs: Sequence[tuple[str, str]]) -> tuple[list[Counter[str]], dict[str, float]]:
    """Count the original and the counterfactual texts that contain each word, and return the counts and the words' log-odds."""
    counts = [Counter(word for pair in pairs for word in set(words(pair[side]))) for side in (0, 1)]
    return counts, {word: math.log((counts[1][word] + 0.5) / (counts[0][word] + 0.5)) for word in {*counts[0], *counts[1]}}


def by_words(pairs: Sequence[tuple[str, str]], halves: Sequence[bool]) -> Shortcut:
    """Classify texts by a bag of words. A text's score is the sum of its words' log-odds (counterfactual against original), estimated on
    one half of the groups. The words in ``telling`` are chosen and counted over all pairs.
    """
    if min(map(halves.count, (True, False))) < _FEWEST:
        return _not_measured("texts by their words")
    _, weight = _log_odds([pair for pair, fitted in zip(pairs, halves, strict=True) if fitted])
    judged = [pair for pair, fitted in zip(pairs, halves, strict=True) if not fitted]
    scores = [[math.fsum(weight.get(word, 0.0) for word in set(words(pair[side]))) for pair in judged] for side in (1, 0)]
    counts, weight = _log_odds(pairs)  # what a reader of the data sees
    most = sorted(weight, key=lambda word: (-abs(weight[word]) * math.sqrt(counts[0][word] + counts[1][word]), word))[:_TELLING]
    telling = tuple(f"{word} ({counts[0][word]} original, {counts[1][word]} counterfactual)" for word in most)
    return Shortcut("texts by their words", *auc(*scores), len(judged), telling)


FEATURES = (
    "brightness", "contrast", "saturation", "fine grain", "medium grain", "flat blocks", "block edges", "darkest", "brightest", "red",
    "green", "blue", "largest flat run",
)  # fmt: skip


def grain(image: Image.Image) -> Array:
    """Compute a picture's low-level statistics (listed in FEATURES), which reveal how it was made rather than what it shows."""
    image = image.copy()
    image.thumbnail((256, 256), Image.Resampling.BOX)
    pixels = np.asarray(image.convert("RGB"), np.float64)
    grey = pixels.mean(2)
    across, down = np.abs(np.diff(grey, axis=1)), np.abs(np.diff(grey, axis=0))
    fine = across.mean() + down.mean()
    medium = np.abs(grey[2:] - grey[:-2]).mean() + np.abs(grey[:, 2:] - grey[:, :-2]).mean() if min(grey.shape) > 2 else fine
    height, width = (side // 4 * 4 for side in grey.shape)
    blocks = grey[:height, :width].reshape(height // 4, 4, width // 4, 4) if height and width else grey.reshape(1, *grey.shape, 1)
    flat = blocks.max((1, 3)) - blocks.min((1, 3)) < 1
    edges = across[:, 7::8].mean() / (across.mean() + 1e-6) if across.shape[1] > 8 else 1.0
    runs = max((len(run) for row in flat for run in "".join("1" if is_flat else "0" for is_flat in row).split("0")), default=0)
    low, high = np.percentile(grey, (1, 99))
    return np.array(
        [
            grey.mean(),
            grey.std(),
            (pixels.max(2) - pixels.min(2)).mean(),
            fine,
            medium,
            flat.mean(),
            edges,
            low,
            high,
            *pixels.mean((0, 1)),
            runs,
        ]
    )


def by_grain(originals: Sequence[Array], edited: Sequence[Array], halves: Sequence[bool]) -> Shortcut:
    """Classify pictures by a linear function of FEATURES, fitted by ridge regression on one half of the groups. Both pictures of a pair
    show the same scene, so a feature that separates them reveals how they were made.
    """
    if min(map(halves.count, (True, False))) < _FEWEST:
        return _not_measured("pictures by their grain")
    first, second, chosen = np.stack(originals), np.stack(edited), np.asarray(halves)
    every = np.concatenate([first[chosen], second[chosen]])
    mean, scale = every.mean(0), every.std(0) + 1e-9
    differences = ((second - first) / scale)[chosen]
    normal = differences.T @ differences + _RIDGE * np.eye(differences.shape[1])
    weight = np.linalg.solve(normal, differences.sum(0))
    scores = [((side[~chosen] - mean) / scale) @ weight for side in (second, first)]
    order = np.argsort(-np.abs(weight * differences.std(0)))[:4]
    measured = auc(scores[0].tolist(), scores[1].tolist())
    return Shortcut("pictures by their grain", *measured, int((~chosen).sum()), tuple(FEATURES[k] for k in order))
