"""Table of objectives, and the loss as their weighted sum.

To add an objective, write a file with a frozen dataclass and add a line to OBJECTIVES. The dataclass's fields become options
(``--objective.NAME.FIELD``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cfvlm_ds.core.groups import Cells
from cfvlm_ds.core.layout import GroupLayout
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.objectives.align import Align
from cfvlm_ds.objectives.batch_align import BatchAlign
from cfvlm_ds.objectives.csd import Csd
from cfvlm_ds.objectives.distill import ContrastDistill, Sham
from cfvlm_ds.objectives.dpo import Dpo
from cfvlm_ds.objectives.fcd import Fcd
from cfvlm_ds.objectives.misp import Misp
from cfvlm_ds.objectives.objective import Objective, Report
from cfvlm_ds.objectives.retain import Retain
from cfvlm_ds.objectives.svco import Svco
from cfvlm_ds.objectives.symmpo import SymMPO

OBJECTIVES: dict[str, type[Objective]] = {
    "align": Align,
    "csd": Csd,
    "fcd": Fcd,
    "dpo": Dpo,
    "symmpo": SymMPO,
    "misp": Misp,
    "svco": Svco,
    "batch_align": BatchAlign,
    "retain": Retain,
    "contrast_distill": ContrastDistill,
    "sham": Sham,
}

CELLS: tuple[Cells, ...] = ("anchor", "matched", "star", "full")

Objectives = Mapping[str, Objective]


def required_cells(objectives: Objectives) -> Cells:
    """Return the smallest cell set (anchor, matched, star or full) that contains all cells that the objectives need."""
    own: list[Cells] = ["star" if objective.cells == "batch" else objective.cells for objective in objectives.values()]
    return CELLS[max(map(CELLS.index, own), default=0)]


def scored_besides(objectives: Objectives) -> dict[str, Any]:
    """Return arguments for ``Collator.of_run``: whether to add token scores and the blank picture, and which divergences to compute."""
    terms = objectives.values()
    divergences = tuple(dict.fromkeys(term.divergence for term in terms if term.divergence is not None))
    needed = {"tokens": any(term.needs_tokens for term in terms), "blank": any(term.needs_blank for term in terms)}
    return {**needed, "divergences": divergences}


def batch_terms(objectives: Objectives) -> dict[str, int]:
    """Map each term that uses in-batch negatives to the number of texts from other groups that it needs per image."""
    return {name: int(getattr(objective, "texts", 0)) for name, objective in objectives.items() if objective.cells == "batch"}


def denominators(objectives: Objectives, layout: GroupLayout) -> dict[str, Tensor]:
    """Return each objective's denominators [P] for this layout. The caller must sum them over micro-batches and ranks."""
    visible = {name: layout.seen(objective.cells == "batch", objective.needs_blank) for name, objective in objectives.items()}
    return {name: torch.atleast_1d(objective.denominator(visible[name].of_objective(name))) for name, objective in objectives.items()}


def scores_of(name: str, objective: Objective, scores: Scores) -> Scores:
    """Return the scores that an objective uses. Groups assigned only to other objectives are masked out. In-batch negatives and the blank
    picture are included only if the objective needs them.
    """
    visible = scores.seen(objective.cells == "batch", objective.needs_blank)
    return replace(visible, layout=visible.layout.of_objective(name))


def weighted_loss(
    objectives: Objectives, scores: Scores, global_denominators: Mapping[str, Tensor], world_size: int = 1, progress: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (loss, shares): this micro-batch's share of the step's loss, and for each term its unweighted share [P], one value per part.

    Each numerator is divided by its *global* denominator. Over all micro-batches and ranks of an optimizer step, the shares therefore add
    up to exactly the global means, however groups are distributed over ranks. The loss is multiplied by ``world_size``, because DeepSpeed
    averages gradients over ranks. DeepSpeed must not also average over accumulation steps (``engine.backward(..., scale_wrt_gas=False)``).
    A part with a denominator of 0 contributes nothing. ``progress``, the fraction of all steps completed so far, determines the warm-up of
    the weights.
    """
    loss = scores.logp.sum() * 0  # every rank must run a backward pass, even without any comparison
    shares: dict[str, Tensor] = {}
    for name, objective in objectives.items():
        denominator = global_denominators[name].to(scores.logp)
        numerators = torch.atleast_1d(objective.numerator(scores_of(name, objective, scores)))
        share = torch.where(denominator > 0, numerators / denominator.clamp(min=torch.finfo(denominator.dtype).tiny), 0)
        shares[name] = share.detach()
        ramp = 1.0 if progress >= objective.warmup else progress / objective.warmup
        loss = loss + objective.weight * ramp * share.sum()
    return loss * world_size, shares


def likelihood_report(scores: Scores) -> Report:
    """Return the log-likelihoods of four kinds of cells as (sum in nats, number of tokens). A fall in the mean of true pairs, in nats
    per token, reveals likelihood displacement.

    The kinds are the factual pair (lp_00), the other true pairs (lp_kk), the factual text on images for which it is false (lp_k0), and
    false texts on the factual image (lp_0k).
    """
    layout = scores.layout
    first_image, first_text = torch.zeros_like(layout.valid), torch.zeros_like(layout.valid)
    first_image[:, 0, :] = True
    first_text[:, :, 0] = True
    kinds = {
        "lp_00": layout.positive & first_image & first_text,
        "lp_kk": layout.positive & ~(first_image & first_text),
        "lp_k0": layout.negative & first_text,
        "lp_0k": layout.negative & first_image,
    }
    logp = scores.logp.detach()
    return {
        f"logp/{name}": (torch.where(mask, logp, 0).sum(), torch.where(mask, layout.num_tokens, 0).sum()) for name, mask in kinds.items()
    }
