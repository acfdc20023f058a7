"""Calibration: the gaps between a model's scores for true and for false texts or images, before training.

A gap is the score difference S[true] - S[false] of two texts on one image (for csd), or of two images for one text (for fcd).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch

from cfvlm_ds.batching.batch_layout import wanted_cells
from cfvlm_ds.core.groups import CounterfactualGroup, Groups
from cfvlm_ds.core.text import in_cell
from cfvlm_ds.evaluation.comparisons import Kind, comparisons
from cfvlm_ds.evaluation.scoring import GroupScores

TERMS = {"text": "csd", "image": "fcd"}
"""Kind of comparison -> term that uses it."""
QUANTILES = (5, 25, 50, 75, 95)
FEW = 50
"""Minimum number of comparisons for reliable quantiles."""
_LOST = 20  # nats
_MANY_LOST = 0.1


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


def gaps(groups: Groups, scores: Sequence[GroupScores], length: Callable[[CounterfactualGroup], int]) -> Iterator[Gap]:
    """Yield the gap of every comparison of two texts or two images in which both cells are star cells (see docs/glossary.md).

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


def warning(all_gaps: Sequence[Gap]) -> str:
    """Return a warning if many images contradict their labels, otherwise ""."""
    images = [gap.nats for gap in all_gaps if gap.side == "image"]
    lost = sum(nats < -_LOST for nats in images)
    return (
        f"warning: {lost} of {len(images)} comparisons of images are lost by more than {_LOST} nats, which neither the texts' length nor "
        "their prior explains; inspect these edits"
        if lost > _MANY_LOST * len(images)
        else ""
    )


def advice(all_gaps: Sequence[Gap]) -> str:
    """Return how often true texts win against the prior, beside the rates at which csd and fcd did and did not improve on NLL
    (benchmarks/RESULTS.md). Returns "" if the prior favours no false text.
    """
    if not (won := _against_prior(all_gaps)):
        return ""
    return (
        f"true texts win {100 * fmean(won):.1f} % of the comparisons against the prior. In our experiments, csd and fcd improved on NLL "
        "(align alone) where this was below 50 %, but not where it was 83 %"
    )


def table(all_gaps: Sequence[Gap]) -> str:
    """Return a Markdown table of the gaps by edit type: win rates on the image and on a blank image, and quantiles of the gaps.

    *against the prior* is the win rate on the image where the blank image favours the false text.
    """
    head = " | ".join(f"{q} %" for q in QUANTILES)
    lines = [f"| side | edit | comparisons | won | blank image | against the prior | nats: {head} | nats per token: {head} |"]
    lines.append("|---|---|" + "---:|" * (4 + 2 * len(QUANTILES)))
    for side in TERMS:
        of_side = [gap for gap in all_gaps if gap.side == side]
        labels = sorted({label for gap in of_side for label in gap.labels})
        rows = [(label, [gap for gap in of_side if label in gap.labels]) for label in labels]
        for label, some in [*rows, *[("all", of_side)] * bool(of_side)]:
            blind = [(gap.prior > 0) + (gap.prior == 0) / 2 for gap in some if gap.prior is not None]
            rates = [gap.nats > 0 for gap in some], blind, _against_prior(some)
            cells = [str(len(some)), *(f"{100 * fmean(rate):.1f}" if rate else "" for rate in rates)]
            for values, form in (([gap.nats for gap in some], ".2f"), ([gap.nats / gap.tokens for gap in some], ".3f")):
                cells += [format(quantile(values, q), form) for q in QUANTILES]
            lines.append(f"| {side} | {in_cell(label)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _against_prior(some: Sequence[Gap]) -> list[bool]:
    return [gap.nats > 0 for gap in some if gap.prior is not None and gap.prior < 0]


def quantile(values: Sequence[float], percent: float) -> float:
    """Return a percentile, interpolated linearly between the two nearest values."""
    return float(np.percentile(values, percent))
