"""Verdicts: what was measured of a candidate against thresholds. Pure functions, so that other thresholds need no model.

A candidate is good where all four cells are right: each picture prefers its own text, each text its own picture, by a margin; and where the
pictures differ as much as an edit of its type does, in one piece, and nowhere else. A second thing that changed too is told by how much
worse the new text fits than the caption did.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.options import COUNT, SHARE
from cfvlm_ds.core.reading import read_json, read_yaml
from cfvlm_ds.core.strict import build
from cfvlm_ds.counterfactuals.options import Rule

GOOD = ""
_CERTAIN = 40.0  # log-odds of what a float can only call certain


@dataclass(frozen=True)
class Thresholds:
    """What a candidate must reach.

    Args:
        rule: scores that count: match, log-odds of "yes, the picture shows it"; likelihood, of the texts as captions, less that on a blank
            picture where pictures are compared with one text; both; or checks, none.
        margin: nats by which each of the four comparisons must be won; at least 0, where each is won.
        changed: least and most share of visibly changed pixels, by type of edit; "*" for the others.
        largest: least share of the changed pixels that are in one piece.
        outside: most share of the pixels outside of the mask that may differ.
        drop: most nats by which the new text, as a caption of the edited picture, may be less likely than the caption of the original; null
            for it not to count. All four comparisons can be won where something else changed as well; then this is large.
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
        """Least and most share of changed pixels of a type."""
        low, high = self.changed.get(kind, self.changed.get("*", (0.0, 1.0)))
        return low, high


@dataclass(frozen=True)
class Verdict:
    """Why a candidate is none (empty: it is good), the least of its margins in nats, and how far it came: 0 picture, 1 checks, 2 scores."""

    reason: str
    worst: float
    stage: int


def verdict(record: Mapping[str, Any], thresholds: Thresholds) -> Verdict:
    """What is to be said of a record of the step verify."""
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


def _picture_defect(checks: Mapping[str, Any], kind: str, thresholds: Thresholds, mined: bool) -> str:
    if mined:  # two photographs have nothing in common but their captions
        return "picture: it is the same one" if checks.get("identical") or checks["hash"] <= 2 else ""
    if not checks["same_size"]:
        return "picture: another size"
    low, high = thresholds.bounds(kind)
    if checks["identical"] or checks["changed"] < low:
        return "picture: hardly anything changed"
    if checks["changed"] > high:
        return "picture: too much changed"
    if checks.get("largest", 1.0) < thresholds.largest:
        return "picture: changes all over it"
    return "picture: changed outside of its mask" if checks.get("outside", 0.0) > thresholds.outside else ""


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def margins(record: Mapping[str, Any], rule: str) -> dict[str, float]:
    """Name of each comparison -> its margin in nats; empty without scores."""
    scores = record.get("scores")
    if not isinstance(scores, Mapping):
        return {}
    found: dict[str, float] = {}
    if rule in ("match", "both"):
        odds = [[_log_odds(value) for value in row] for row in scores["match"]]
        found |= _four(odds, odds, "")
    if rule in ("likelihood", "both"):
        logp = [[math.nan if value is None else value for value in row] for row in scores["likelihood"]]
        blank = [math.nan if value is None else value for value in scores["blank"]]
        found |= _four([[value - prior for value, prior in zip(row, blank, strict=True)] for row in logp], logp, "likelihood of ")
    return found


def _four(by_text: Sequence[Sequence[float]], by_image: Sequence[Sequence[float]], prefix: str) -> dict[str, float]:
    """Margins of two texts on two pictures; of one picture only that of its texts. ``by_text`` compares texts, ``by_image`` pictures."""
    found = {f"{prefix}the caption on the original": by_text[0][0] - by_text[0][1]}
    if len(by_text) > 1:
        found |= {
            f"{prefix}the new text on the edited picture": by_text[1][1] - by_text[1][0],
            f"{prefix}the original for the caption": by_image[0][0] - by_image[1][0],
            f"{prefix}the edited picture for the new text": by_image[1][1] - by_image[0][1],
        }
    return found


def _drop(record: Mapping[str, Any]) -> float:
    """By how many nats the new text is less likely on the edited picture than the caption on the original; without a picture below all,
    without a likelihood above all."""
    rows = record["scores"]["likelihood"]
    if len(rows) < 2:
        return -math.inf
    drop = _number(rows[0][0]) - _number(rows[1][1])
    return drop if math.isfinite(drop) else math.inf


def _log_odds(log_share: float | None) -> float:
    if log_share is None or not log_share < 0:
        return _CERTAIN if log_share == 0 else math.nan
    return max(-_CERTAIN, min(_CERTAIN, log_share - math.log(-math.expm1(log_share))))


def read_thresholds(file: str | Path, rule: Rule | None = None, margin: float | None = None) -> Thresholds:
    """Thresholds of a JSON or YAML file, if one is named, the defaults for what it does not say. Raises ConfigError."""
    given = {name: value for name, value in (("rule", rule), ("margin", margin)) if value is not None}
    try:
        value = {} if not file else read_json(file) if str(file).endswith(".json") else read_yaml(file)
        if not isinstance(value, dict):
            raise ValueError("it holds no thresholds; write them as `cfvlm-ds data verify --calibrate` does")
        found: Thresholds = build(Thresholds, value | given)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--thresholds {file}: {error}") from error
    if found.rule == "checks" and margin is not None:
        raise ConfigError("--margin is of scores, and the rule checks compares pixels alone; run verify with --scorer, or leave it out")
    return found


@dataclass(frozen=True)
class Calibrated:
    """Thresholds that labelled candidates call for, and what they give there."""

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

    def as_json(self) -> str:
        return json.dumps(asdict(self.thresholds), indent=1) + "\n"


def calibrated(labelled: Iterable[tuple[Mapping[str, Any], bool]], start: Thresholds, precision: float) -> Calibrated:
    """The margin and the drop with which most labelled records are kept at a precision. The margin is never below 0; no drop is set where
    the margin alone keeps as many.

    Raises ConfigError where none do.
    """
    start = replace(start, margin=0.0, drop=None)
    judged = [(record, verdict(record, start), good) for record, good in labelled]
    good = sum(each for _, _, each in judged)
    passing = sorted(
        (_Labelled(found.worst, _drop(record), each) for record, found, each in judged if found.reason == GOOD),
        key=lambda each: -each.worst,
    )
    limits = [None, *sorted({each.drop for each in passing if 0 <= each.drop < math.inf}, reverse=True)]
    limits = limits[:: -(-len(limits) // _LIMITS)]
    ways = [(found, limit) for limit in limits if (found := _most_kept(_within(passing, limit), precision)) is not None]
    if not ways:
        raise ConfigError(
            f"no margin reaches a precision of {precision:g} on {len(judged)} labelled candidates, of which {good} are good and "
            f"{len(passing)} pass the checks and have all four cells right; label more, take another scorer or rule, or lower --precision"
        )
    (kept, right), limit = max(ways, key=lambda way: way[0][0])
    ranked = _within(passing, limit)
    margin, drop = 0.0, limit
    if kept < len(ranked):
        margin = _between(ranked[kept].worst, ranked[kept - 1].worst)
    if limit is not None:
        drop = _between(limit, min(each.drop for each in passing if each.drop > limit))
    return Calibrated(replace(start, margin=margin, drop=drop), kept, right, good, len(judged))


def _between(low: float, high: float) -> float:
    """A short number from ``low`` up to ``high``, which it does not reach."""
    return middle if low <= (middle := round((low + high) / 2, 4)) < high else low


@dataclass(frozen=True)
class _Labelled:
    worst: float
    drop: float
    good: bool


_LIMITS = 256
"""Drops that are tried at most."""


def _within(ranked: Sequence[_Labelled], limit: float | None) -> Sequence[_Labelled]:
    return ranked if limit is None else [each for each in ranked if each.drop <= limit]


def _most_kept(ranked: Sequence[_Labelled], precision: float) -> tuple[int, int] | None:
    """How many of the first, and how many good ones among them, can be kept at a precision; equal ones stay together."""
    best, right = None, 0
    for number, each in enumerate(ranked, 1):
        right += each.good
        if (number == len(ranked) or ranked[number].worst < each.worst) and right / number >= precision:
            best = number, right
    return best
