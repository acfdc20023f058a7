"""Verdicts on candidates: pure functions that compare recorded measurements with thresholds, so thresholds can be changed without rerunning
a model.

A candidate is good if it wins all four comparisons by a margin: each picture scores higher with its own text than with the other, and each
text scores higher with its own picture than with the other. In addition, the fraction of changed pixels must be within the limits for the
edit type, and the changes must be neither scattered nor outside the mask. If an edit accidentally changes a second thing, the new text fits
its picture much worse than the caption fits the original; the threshold ``drop`` rejects such edits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.options import COUNT, SHARE
from cfvlm_ds.core.reading import read_yaml
from cfvlm_ds.core.strict import build
from cfvlm_ds.counterfactuals.options import Rule

GOOD = ""
_CERTAIN = 40.0  # log-odds used for probabilities of exactly 0 and 1


@dataclass(frozen=True)
class Thresholds:
    """Requirements for a good candidate.

    Args:
        rule: scores to use: ``match`` (log-odds of "yes, the picture shows it"), ``likelihood`` (log-likelihood of the texts as captions),
            or ``checks`` (no scores, only pixels). ``likelihood`` compares two texts after subtracting their scores on a blank picture.
        margin: threshold in nats, at least 0. The margin of each of the four comparisons must exceed it.
        changed: minimum and maximum fraction of visibly changed pixels, keyed by edit type; the key "*" covers all other types.
        largest: minimum fraction of the changed pixels that lie in the largest connected component.
        outside: maximum fraction of the pixels outside the mask that differ at all, even invisibly.
        drop: maximum decrease in log-likelihood, in nats, from the caption on the original picture to the new text on the edited picture;
            null for no limit. A large drop suggests a second change, which the four comparisons do not detect.
    """

    rule: Rule = "match"
    margin: float = field(default=0.0, metadata={"within": COUNT})
    changed: dict[str, tuple[float, float]] = field(
        default_factory=lambda: {"*": (0.002, 0.6), "relation": (0.002, 1.0), "swap_object": (0.002, 1.0)}, metadata={"within": SHARE}
    )
    largest: float = field(default=0.05, metadata={"within": SHARE})
    outside: float = field(default=0.0, metadata={"within": SHARE})
    drop: float | None = field(default=None, metadata={"within": COUNT})

    def __post_init__(self) -> None:
        for kind, shares in self.changed.items():
            if len(shares) != 2 or sorted(shares) != list(shares):
                raise ConfigError(f"changed.{kind} must be two shares, the smaller first, not {shares}")

    def bounds(self, kind: str) -> tuple[float, float]:
        """Return the minimum and maximum fraction of changed pixels for an edit type."""
        low, high = self.changed.get(kind, self.changed.get("*", (0.0, 1.0)))
        return low, high


@dataclass(frozen=True)
class Verdict:
    """Verdict on a candidate. ``reason`` explains a rejection and is "" otherwise. ``worst`` is the smallest margin in nats. ``stage`` is
    the last stage that was reached: 0 (picture), 1 (pixel checks) or 2 (scores).
    """

    reason: str
    worst: float
    stage: int


def verdict(record: Mapping[str, Any], thresholds: Thresholds) -> Verdict:
    """Judge a record from the step ``verify``: first its pixel checks, then the scores that the rule requires."""
    if problem := record.get("problem"):
        return Verdict(str(problem)[:200], -math.inf, 0)
    checks = record.get("checks")
    if checks is not None and (reason := _picture_defect(checks, str(record.get("type", "")), thresholds, bool(record.get("mined")))):
        return Verdict(reason, -math.inf, 1)
    if thresholds.rule == "checks":
        return Verdict(GOOD, 0.0, 2)
    named = margins(record, thresholds.rule)
    if not named:
        return Verdict("no scores; run verify with --scorer, or select with the rule checks", -math.inf, 1)
    worst = min(named.values())
    if not math.isfinite(worst):
        return Verdict("scores are not finite", -math.inf, 2)
    reason = next((f"score: {name}" for name, margin in named.items() if margin <= thresholds.margin), GOOD)
    if not reason and thresholds.drop is not None and _drop(record) > thresholds.drop:
        reason = "score: the new text fits worse than the caption did"
    return Verdict(reason, worst, 2)


def label(record: Mapping[str, Any], reason: str) -> str:
    """Return a label for a verdict's ``reason`` that names what was judged."""
    unscored = "not scored (no edited picture)" if record.get("checks") is None else "not scored (pixels passed)"
    return reason or ("good" if "scores" in record else unscored)


def _picture_defect(checks: Mapping[str, Any], kind: str, thresholds: Thresholds, mined: bool) -> str:
    if mined:  # two different photographs with similar captions
        return "picture: both pictures are the same" if checks.get("identical") or checks["hash"] <= 2 else ""
    low, high = thresholds.bounds(kind)
    if checks["identical"] or checks["changed"] < low:
        return "picture: hardly anything changed"
    if checks["changed"] > high:
        return "picture: too much changed"
    if checks.get("largest", 1.0) < thresholds.largest:
        return "picture: the changes are scattered"
    return "picture: changed outside its mask" if checks.get("outside", 0.0) > thresholds.outside else ""


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def margins(record: Mapping[str, Any], rule: str) -> dict[str, float]:
    """Map each comparison's name to its margin in nats. The result is empty if there are no scores."""
    scores = record.get("scores")
    if not isinstance(scores, Mapping):
        return {}
    if rule == "match":
        by_text = by_image = [[log_odds(value) for value in row] for row in scores["match"]]
    else:
        by_image = [list(map(_number, row)) for row in scores["likelihood"]]
        blank = list(map(_number, scores["blank"]))
        by_text = [[value - prior for value, prior in zip(row, blank, strict=True)] for row in by_image]
    result = {"the caption on the original": by_text[0][0] - by_text[0][1]}
    if len(by_text) > 1:
        result |= {
            "the new text on the edited picture": by_text[1][1] - by_text[1][0],
            "the original for the caption": by_image[0][0] - by_image[1][0],
            "the edited picture for the new text": by_image[1][1] - by_image[0][1],
        }
    return result


def _drop(record: Mapping[str, Any]) -> float:
    """Return the drop in log-likelihood, in nats, from the caption on the original picture to the new text on the edited picture.

    The result is -inf if there is no edited picture, and inf if a likelihood is not finite.
    """
    rows = record["scores"]["likelihood"]
    if len(rows) < 2:
        return -math.inf
    drop = _number(rows[0][0]) - _number(rows[1][1])
    return drop if math.isfinite(drop) else math.inf


def log_odds(log_share: float | None) -> float:
    """Return the log-odds, in nats, of a log-probability, limited to +-40. The result is NaN if there is none."""
    if log_share is None or not log_share < 0:
        return _CERTAIN if log_share == 0 else math.nan
    return max(-_CERTAIN, min(_CERTAIN, log_share - math.log(-math.expm1(log_share))))


def read_thresholds(file: str | Path, rule: Rule | None = None, margin: float | None = None) -> Thresholds:
    """Read thresholds from a YAML or JSON file, or use the defaults if ``file`` is empty. ``rule`` and ``margin`` take precedence over the
    file. Raises ConfigError for invalid thresholds.
    """
    given = {name: value for name, value in (("rule", rule), ("margin", margin)) if value is not None}
    try:
        value = read_yaml(file) if file else {}
        if not isinstance(value, dict):
            raise ValueError("it does not contain thresholds; write them as `cfvlm-ds data verify --calibrate` does")
        thresholds: Thresholds = build(Thresholds, value | given)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--thresholds {file}: {error}") from error
    if thresholds.rule == "checks" and margin is not None:
        raise ConfigError(
            "--margin applies to scores, but the rule checks only compares pixels; run verify with --scorer, or leave out --margin"
        )
    return thresholds


@dataclass(frozen=True)
class Calibrated:
    """Thresholds fitted to labelled candidates, and their results on these candidates."""

    thresholds: Thresholds
    kept: int
    good_kept: int
    good: int
    labelled: int

    def __str__(self) -> str:
        from scipy.stats import binomtest

        share, recall = self.good_kept / self.kept, self.good_kept / self.good
        low, high = binomtest(self.good_kept, self.kept).proportion_ci(method="wilson")
        drop = f", drop {self.thresholds.drop:.3f} nats" if self.thresholds.drop is not None else ""
        return (
            f"margin {self.thresholds.margin:.3f} nats{drop}, rule {self.thresholds.rule}: precision {100 * share:.1f} % "
            f"(95 % interval {100 * low:.1f} to {100 * high:.1f}), recall {100 * recall:.1f} %, "
            f"yield {self.kept} of {self.labelled} labelled candidates"
        )


def calibrated(labelled: Iterable[tuple[Mapping[str, Any], bool]], start: Thresholds, precision: float) -> Calibrated:
    """Find the ``margin`` and ``drop`` that keep as many labelled candidates as possible at a precision of at least ``precision``.

    ``margin`` is at least 0. ``drop`` is set only if it allows more candidates to be kept than ``margin`` alone. Raises ConfigError if no
    thresholds reach the precision.
    """
    start = replace(start, margin=0.0, drop=None)
    judged = [(record, verdict(record, start), good) for record, good in labelled]
    good = sum(is_good for _, _, is_good in judged)
    passing = [(judgement.worst, _drop(record), is_good) for record, judgement, is_good in judged if judgement.reason == GOOD]
    passing.sort(key=lambda candidate: -candidate[0])
    limits = [math.inf, *sorted({drop for _, drop, _ in passing if 0 <= drop < math.inf}, reverse=True)]
    most, fitted = (0, 0), start
    for limit in limits[:: -(-len(limits) // _LIMITS)]:
        ranked, right = [candidate for candidate in passing if candidate[1] <= limit], 0
        for kept, (worst, _, is_good) in enumerate(ranked, 1):
            right += is_good
            following = ranked[kept][0] if kept < len(ranked) else -math.inf  # keep or reject tied candidates together
            if kept > most[0] and following < worst and right / kept >= precision:
                drop = None if limit == math.inf else _between(limit, min(other for _, other, _ in passing if other > limit))
                margin = 0.0 if kept == len(ranked) else _between(following, worst)
                most, fitted = (kept, right), replace(start, margin=margin, drop=drop)
    if most == (0, 0):
        raise ConfigError(
            f"no margin reaches a precision of {precision:g} on {len(judged)} labelled candidates ({good} are good; "
            f"{len(passing)} pass the checks with four correct cells); label more, use another scorer or rule, or lower --precision"
        )
    return Calibrated(fitted, *most, good, len(judged))


def _between(low: float, high: float) -> float:
    """Return a number in [``low``, ``high``), with at most four decimal places if possible."""
    return middle if low <= (middle := round((low + high) / 2, 4)) < high else low


_LIMITS = 256
"""Maximum number of values to try for the threshold ``drop``."""
