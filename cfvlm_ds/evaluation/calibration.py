"""Calibration: margins and weights of objectives for a model and a data set, derived from the model's gaps before training.

A gap is the score difference S[true] - S[false] of two texts on one image (for csd), or of two images for one text (for fcd).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import IO, Any

import numpy as np
import torch

from cfvlm_ds.batching.batch_layout import wanted_cells
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.text import in_cell
from cfvlm_ds.evaluation.comparisons import Kind, comparisons
from cfvlm_ds.evaluation.scoring import GroupScores
from cfvlm_ds.objectives.objective import MarginTerm

TERMS = {"text": "csd", "image": "fcd"}
"""Kind of comparison -> term that uses it."""
QUANTILES = (5, 25, 50, 75, 95)
FEW = 50
"""Number of comparisons below which quantiles are unreliable."""
_NATS = (0.5, 5.0)  # smallest and largest useful margin
_MEASURED_TOKENS = 12  # caption length for which the weight 1 was measured together with align
_LEAST_WEIGHT = 0.1
_KNOWN = 10  # minimum number of comparisons for an edit type to count
_LONGER = 1.5  # minimum ratio of text lengths that shows whether gaps grow with length
_LOST = 4  # in units of the margin; equal to MarginTerm.hinge_cap
_MANY_LOST = 0.1
_GUESSED = 75  # percentile of the gaps on a blank image that a margin must cover


@dataclass(frozen=True)
class Gap:
    """Gap of one comparison. ``group`` is the group's id, ``nats`` is S[true] - S[false], and ``tokens`` is the number of tokens in the
    factual text.

    ``prior`` is the number of nats by which the language prior favours the true text; None for a comparison of images.
    """

    side: Kind
    labels: tuple[str, ...]
    nats: float
    tokens: int
    prior: float | None
    group: str = ""


@dataclass(frozen=True)
class Advice:
    """Recommended options for each term, and the reasons as sentences."""

    options: dict[str, dict[str, Any]]
    reasons: list[str]


def gaps(
    groups: Sequence[CounterfactualGroup], scores: Sequence[GroupScores], length: Callable[[CounterfactualGroup], int]
) -> Iterator[Gap]:
    """Yield the gap of every comparison of two texts or two images in which both cells are star cells. In training, csd uses all its
    comparisons, but fcd uses only the hardest in each group.

    Scores must be finite. ``length`` returns the number of tokens in a group's factual text.
    """
    for group, score in zip(groups, scores, strict=True):
        match = torch.tensor([[-1 if truth is None else truth for truth in line] for line in group.match])
        star = wanted_cells([group], match[None], torch.tensor([group.prompt_ids]), "star")[0].tolist()
        logp, blank, tokens = score.logp.tolist(), score.blank.tolist(), length(group)
        for comparison in comparisons(group):
            if comparison.kind in TERMS:
                (i, c), (j, d) = comparison.cells
                prior = blank[c] - blank[d] if comparison.kind == "text" else None
                if star[i][c] and star[j][d]:
                    yield Gap(comparison.kind, comparison.labels, logp[i][c] - logp[j][d], tokens, prior, group.id)


def advise(all_gaps: Sequence[Gap]) -> Advice:
    """Recommend the link, length norm, margin and weight of csd and fcd, from the gaps alone."""
    options: dict[str, dict[str, Any]] = {"align": {}}
    reasons = []
    anchored, why = _length_norm(all_gaps)
    reasons.append(why)
    priors = [abs(gap.prior) / (gap.tokens if anchored else 1) for gap in all_gaps if gap.prior is not None]
    guessed = quantile(priors, _GUESSED) if priors else 0.0  # the picture must change the scores by more than this
    for side, term in TERMS.items():
        of_side = [gap for gap in all_gaps if gap.side == side]
        if not of_side:
            reasons.append(f"{term} is left out: no group has a comparison for it")
            continue
        size = quantile([gap.tokens for gap in of_side], 50)
        per = size if anchored else 1.0  # so that a text of median length has the same link as in nats
        values = [gap.nats / (gap.tokens if anchored else 1) for gap in of_side]
        low, high = (_round(nats / per) for nats in _NATS)
        unit = "nats per token" if anchored else "nats"
        sizes: dict[str, list[float]] = {}
        for gap, value in zip(of_side, values, strict=True):
            for label in gap.labels:
                sizes.setdefault(label, []).append(abs(value))
        known = {in_cell(label): some for label, some in sizes.items() if len(some) >= _KNOWN} or {"all": list(map(abs, values))}
        scale, label = min((quantile(some, 50), label) for label, some in known.items())
        why = f"{label}, the least decided edit type, has a median gap of {scale:.2g} in either direction"
        if guessed > scale:
            scale, of_pairs = guessed, f"in {_GUESSED} % of comparisons, which a picture must outweigh"
            why = f"language alone prefers one of two texts by at most {guessed:.2g} {of_pairs}"
        margin = _round(min(max(scale, low), high))
        bounded = "" if low <= scale <= high else f"; useful margins are between {low:g} and {high:g}"
        reasons.append(f"{term}.margin {margin:g} {unit}: {why}{bounded}")
        beta = _round(MarginTerm.beta * per)
        pull = torch.sigmoid(beta * (margin - torch.tensor(values, dtype=torch.float64))).mean().item()
        weight = _round(per * min(1.0, max(_LEAST_WEIGHT, _MEASURED_TOKENS / size)))
        reasons.append(
            f"{term}.weight {weight:g}: {_why_weight(anchored, size)}; at the start, its comparisons have {100 * pull:.0f} % of their "
            "largest gradient"
        )
        slope = f"; beta {beta:g} corresponds to {MarginTerm.beta:g} per nat for a text of {size:.0f} tokens" if anchored else ""
        lost = sum(value < -_LOST * margin for value in values) / len(values)
        hinge = side == "image" and lost > _MANY_LOST
        observed = (
            f"{term}.link {'hinge' if hinge else 'logsigmoid'}: {100 * lost:.0f} % of its comparisons are lost by more than {_LOST} margins"
        )
        reasons.append(
            f"{observed}; between images, neither length nor prior explains this: inspect these edits; a hinge bounds their loss"
            if hinge
            else f"{observed}, so a smooth link is used, whose gradient fades as a comparison is won{slope}"
        )
        norm = "anchor" if anchored else "none"
        link: dict[str, Any] = {"link": "hinge"} if hinge else {"link": "logsigmoid", "beta": beta}
        options[term] = {"weight": weight, "margin": margin, **link, "len_norm": norm}
    return Advice(options, reasons)


def _why_weight(anchored: bool, size: float) -> str:
    divided = f"; multiplied by the {size:.0f} tokens by which a score is divided" if anchored else ""
    if size <= _MEASURED_TOKENS:
        return f"texts have {size:.0f} tokens, no more than the {_MEASURED_TOKENS} for which the weight 1 was measured{divided}"
    heavier = f"a comparison in total nats would weigh {size / _MEASURED_TOKENS:.1f} times as much as with {_MEASURED_TOKENS} tokens"
    return f"texts have {size:.0f} tokens; align averages over them, so {heavier}{divided}"


def _length_norm(all_gaps: Sequence[Gap]) -> tuple[bool, str]:
    """Return whether score differences grow with text length, and a sentence that explains the result."""
    middle = quantile([gap.tokens for gap in all_gaps], 50)
    parted = [part for with_longer in (False, True) if (part := _parted(all_gaps, middle, with_longer)) is not None]
    if not parted:
        return False, f"len_norm none: fewer than {_KNOWN} comparisons have texts of a length other than the median, {middle:.0f} tokens"
    ratio, short, long = max(parted, key=lambda part: part[0])
    if ratio < _LONGER:
        return False, f"len_norm none: texts have similar lengths (median {middle:.0f} tokens), so total nats are comparable"
    spread = [quantile([abs(gap.nats) for gap in half], 50) for half in (short, long)]
    if not all(spread):
        return (
            False,
            f"len_norm none: half of the gaps of {'longer' if spread[0] else 'shorter'} texts are 0, which says nothing about length",
        )
    grown = spread[1] / spread[0]
    growth = f"texts with {ratio:.1f} times as many tokens have gaps that are {grown:.1f} times as large"
    if grown > math.sqrt(ratio):
        return True, f"len_norm anchor: {growth}, so a margin per token fits both"
    return False, f"len_norm none: {growth}: an edit changes a few words of a text of any length, so a margin in total nats fits both"


def _parted(all_gaps: Sequence[Gap], middle: float, with_longer: bool) -> tuple[float, list[Gap], list[Gap]] | None:
    """Split the gaps at the median text length. Return the ratio of the parts' mean lengths (longer to shorter), the gaps of shorter texts
    and the gaps of longer texts. Return None if a part has too few gaps.

    Texts of exactly the median length, which can be the majority, count as longer if ``with_longer``, else as shorter.
    """
    is_long = [gap.tokens > middle or (with_longer and gap.tokens == middle) for gap in all_gaps]
    short, long = ([gap for gap, longer in zip(all_gaps, is_long, strict=True) if longer == side] for side in (False, True))
    if min(len(short), len(long)) < _KNOWN:
        return None
    return fmean([gap.tokens for gap in long]) / fmean([gap.tokens for gap in short]), short, long


def table(all_gaps: Sequence[Gap]) -> str:
    """Return a Markdown table of the gaps by edit type: win rates on the image and on a blank image, and quantiles of the gaps."""
    head = " | ".join(f"{q} %" for q in QUANTILES)
    lines = [f"| side | edit | comparisons | won | blank image | nats: {head} | nats per token: {head} |"]
    lines.append("|---|---|" + "---:|" * (3 + 2 * len(QUANTILES)))
    for side in TERMS:
        of_side = [gap for gap in all_gaps if gap.side == side]
        labels = sorted({label for gap in of_side for label in gap.labels})
        rows = [(label, [gap for gap in of_side if label in gap.labels]) for label in labels]
        for label, some in [*rows, *[("all", of_side)] * bool(of_side)]:
            blind = [(gap.prior > 0) + (gap.prior == 0) / 2 for gap in some if gap.prior is not None]
            cells = [str(len(some)), f"{100 * fmean([gap.nats > 0 for gap in some]):.1f}", f"{100 * fmean(blind):.1f}" if blind else ""]
            for values, form in (([gap.nats for gap in some], ".2f"), ([gap.nats / gap.tokens for gap in some], ".3f")):
                cells += [format(quantile(values, q), form) for q in QUANTILES]
            lines.append(f"| {side} | {in_cell(label)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def block(advice: Advice) -> str:
    """Return the options as YAML for a run's configuration."""
    lines = ["objective:"]
    for term, options in advice.options.items():
        lines.append(f"  {term}: {{{', '.join(f'{name}: {value}' for name, value in options.items())}}}")
    return "\n".join(lines)


def is_block(file: IO[bytes]) -> bool:
    """Return True if a file contains only the output of ``block``. Other files are the user's own."""
    return re.fullmatch(r"objective:\n(  \w+: \{[^{}\n]*\}\n)+", file.read().decode()) is not None


def quantile(values: Sequence[float], percent: float) -> float:
    """Return a percentile, interpolated linearly between the two nearest values."""
    return float(np.percentile(values, percent))


def _round(value: float) -> float:
    return float(f"{value:.2g}")
