"""Calibration: margins and weights of objectives for a model and a data set, derived from the model's gaps before training.

A gap is the score difference S[true] - S[false] of two texts on one image (for csd), or of two images for one text (for fcd).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import IO, Any

import numpy as np
import torch

from cfvlm_ds.batching.batch_layout import wanted_cells
from cfvlm_ds.core.groups import CounterfactualGroup, Groups
from cfvlm_ds.core.text import in_cell
from cfvlm_ds.evaluation.comparisons import Kind, comparisons
from cfvlm_ds.evaluation.scoring import GroupScores
from cfvlm_ds.objectives.objective import MarginTerm

TERMS = {"text": "csd", "image": "fcd"}
"""Kind of comparison -> term that uses it."""
QUANTILES = (5, 25, 50, 75, 95)
FEW = 50
"""Minimum number of comparisons for reliable quantiles."""
_NATS = (0.5, 5.0)  # smallest and largest useful margin
_MEASURED_TOKENS = 12  # caption length for which the weight 1 was measured together with align
_LEAST_WEIGHT = 0.1
_KNOWN = 10  # minimum number of comparisons for an edit type to count
_LOST = 4  # in units of the margin; equal to MarginTerm.hinge_cap
_MANY_LOST = 0.1
_GUESSED = 75  # percentile of the gaps on a blank image that a margin must cover


@dataclass(frozen=True)
class Gap:
    """Gap of one comparison. ``nats`` is S[true] - S[false], ``group`` is the group's id, and ``tokens`` is the number of tokens in its
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


def gaps(groups: Groups, scores: Sequence[GroupScores], length: Callable[[CounterfactualGroup], int]) -> Iterator[Gap]:
    """Yield the gap of every comparison of two texts or two images in which both cells are star cells.

    In training, csd uses all of its comparisons, but fcd uses only the hardest one in each group. Scores must be finite. ``length`` returns
    the number of tokens in a group's factual text.
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
    """Recommend the link, margin and weight of csd and fcd, based on the gaps alone. Margins are in nats per text (``len_norm: none``)."""
    options: dict[str, dict[str, Any]] = {"align": {}}
    reasons = []
    priors = [abs(gap.prior) for gap in all_gaps if gap.prior is not None]
    guessed = quantile(priors, _GUESSED) if priors else 0.0  # the picture must change the scores by more than this
    for side, term in TERMS.items():
        of_side = [gap for gap in all_gaps if gap.side == side]
        if not of_side:
            reasons.append(f"{term} is left out: no group has a comparison for it")
            continue
        size = quantile([gap.tokens for gap in of_side], 50)
        values, (low, high) = [gap.nats for gap in of_side], _NATS
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
        reasons.append(f"{term}.margin {margin:g} nats: {why}{bounded}")
        pull = torch.sigmoid(MarginTerm.beta * (margin - torch.tensor(values, dtype=torch.float64))).mean().item()
        weight = _round(min(1.0, max(_LEAST_WEIGHT, _MEASURED_TOKENS / size)))
        compared = f"no more than the {_MEASURED_TOKENS} for which the weight 1 was measured"
        if (times := size / _MEASURED_TOKENS) > 1:
            compared = f"over which align averages, so a comparison would weigh {times:.1f} times as much as with {_MEASURED_TOKENS}"
        reasons.append(
            f"{term}.weight {weight:g}: texts have {size:.0f} tokens, {compared}; at the start, its comparisons have {100 * pull:.0f} % of "
            "their largest gradient"
        )
        lost = sum(value < -_LOST * margin for value in values) / len(values)
        hinge = side == "image" and lost > _MANY_LOST
        observed = (
            f"{term}.link {'hinge' if hinge else 'logsigmoid'}: {100 * lost:.0f} % of its comparisons are lost by more than {_LOST} margins"
        )
        reasons.append(
            f"{observed}; between images, neither length nor prior explains this: inspect these edits; a hinge bounds their loss"
            if hinge
            else f"{observed}, so a smooth link is used, whose gradient fades as a comparison is won"
        )
        options[term] = {"weight": weight, "margin": margin, "link": "hinge" if hinge else "logsigmoid"}
    return Advice(options, reasons)


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
    """Return True if a file contains only the output of ``block``, so that it can be overwritten."""
    return re.fullmatch(r"objective:\n(  \w+: \{[^{}\n]*\}\n)+", file.read().decode()) is not None


def quantile(values: Sequence[float], percent: float) -> float:
    """Return a percentile, interpolated linearly between the two nearest values."""
    return float(np.percentile(values, percent))


def _round(value: float) -> float:
    return float(f"{value:.2g}")
