"""Log-ratios to a reference model and comparisons of them within a group, for objectives that need a reference.

A preference data set has one row per chosen text. Accordingly, each true pair of a group (factual or counterfactual) serves once as the
chosen pair, and the group's loss is the mean over these pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cfvlm_ds.core.groups import Cells
from cfvlm_ds.core.layout import GroupLayout
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.objectives.objective import Objective, Report, comparisons, has_any, mean_over, no_scores

Compared = tuple[Tensor, Tensor]
"""(violation, mask) of comparisons. Violations are differences of log-ratios, in nats."""
Part = tuple[Tensor, Tensor]
"""One part of a term as two tensors [G]: each group's loss, and a mask of the groups that have a comparison."""


@dataclass(frozen=True, kw_only=True)
class ReferenceTerm(Objective):
    """A term that depends on the log-ratio r = log p - log p_reference; the reference comes from ``--data.scores``.

    Args:
        weight: factor of the term in the loss.
        warmup: fraction of all steps over which the weight rises linearly from 0.
        beta: inverse temperature, per nat of log-ratio.
    """

    weight: float = 1.0
    warmup: float = 0.0
    beta: float = 0.1

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, not {self.beta}")

    @property
    def cells(self) -> Cells:
        return "star"

    @property
    def needs_reference(self) -> bool:
        return True

    def ratio(self, scores: Scores) -> Tensor:
        """Return r [G, I, C] in nats. Raises ValueError if the scores have no reference."""
        if scores.reference is None:
            name = type(self).__name__.lower()
            raise ValueError(f"{name} needs reference scores: write them with `cfvlm-ds score` and pass --data.scores")
        return scores.logp - scores.reference.detach().to(scores.logp)

    def parts(self, ratio: Tensor, layout: GroupLayout) -> list[Part]:
        """Return the term's parts, computed from the log-ratios r [G, I, C]."""
        raise NotImplementedError

    def denominator(self, layout: GroupLayout) -> Tensor:
        counted = [counts for _, counts in self.parts(no_scores(layout), layout)]
        return (layout.weight.unsqueeze(1) * torch.stack(counted, 1)).sum(0)

    def numerator(self, scores: Scores) -> Tensor:
        losses = torch.stack([loss for loss, _ in self.parts(self.ratio(scores), scores.layout)], 1)
        return (scores.layout.weight.to(losses).unsqueeze(1) * losses).sum(0)

    def preferred(self, weight: float, violation: Tensor, mask: Tensor) -> Part:
        """Return a part of the loss: ``weight`` times the mean of -log sigmoid(-beta * violation) over each group's comparisons."""
        return weight * mean_over(F.softplus(self.beta * violation), mask), has_any(mask)

    def compared(self, *pairs: Compared) -> Report:
        """Return the fraction of comparisons won and the mean of beta (r_true - r_false), each as (sum, number of comparisons)."""
        won = torch.stack([((violation < 0) & mask).sum() for violation, mask in pairs]).sum()
        margin = torch.stack([torch.where(mask, -self.beta * violation, 0).sum() for violation, mask in pairs]).sum()
        count = torch.stack([mask.sum() for _, mask in pairs]).sum()
        name = type(self).__name__.lower()
        return {f"{name}/accuracy": (won, count), f"{name}/margin": (margin, count)}


def text_pairs(ratio: Tensor, layout: GroupLayout) -> Compared:
    """On every image, compare each true text with each false text of the same prompt. Results have shape [G, I, C true, C false]."""
    return comparisons(ratio, layout.positive, layout.negative, layout.same_prompt)


def image_pairs(ratio: Tensor, layout: GroupLayout) -> Compared:
    """Compare each text's own image with each image for which the text is false. Results have shape [G, C, I true, I false]."""
    return comparisons(*(each.transpose(1, 2) for each in (ratio, layout.own, layout.negative)))
