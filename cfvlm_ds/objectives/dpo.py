"""DPO (arXiv 2305.18290) and its image-conditional form (mDPO, arXiv 2406.11839) over the cells of a group: the usual baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cfvlm_ds.core.groups import Cells
from cfvlm_ds.core.layout import GroupLayout
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.objectives.base import Report, comparisons, has_any, mean_over


@dataclass(frozen=True, kw_only=True)
class Dpo:
    """-log sigmoid(beta (r_true - r_false)) with r = log p - log p_reference, reference read from ``--data.scores``.

    Chosen and rejected are the factual text and each counterfactual text of its prompt on the factual image; the image side takes the
    factual text on the factual image and on each counterfactual image. Means over a group's pairs, so a group counts once.

    Args:
        weight: factor of the term in the loss.
        warmup: share of all steps over which the weight rises linearly from 0.
        beta: inverse temperature, per nat of log-ratio.
        text_side: weight of the text pairs (plain DPO).
        image_side: weight of the image pairs (mDPO's conditional term).
        anchor: weight of -log sigmoid(beta r_00) (mDPO's anchor: the chosen answer must not become less likely).
    """

    weight: float = 1.0
    warmup: float = 0.0
    beta: float = 0.1
    text_side: float = 1.0
    image_side: float = 0.0
    anchor: float = 0.0

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, not {self.beta}")

    @property
    def cells(self) -> Cells:
        return "star"

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def needs_prior(self) -> bool:
        return False

    def denominator(self, layout: GroupLayout) -> Tensor:
        ratio = torch.zeros_like(layout.num_tokens, dtype=layout.weight.dtype)
        text, image = self._pairs(ratio, layout)
        groups = torch.stack([has_any(text[1]), has_any(image[1]), layout.positive[:, 0, 0]], 1)
        return (layout.weight.unsqueeze(1) * groups).sum(0)

    def numerator(self, scores: Scores) -> Tensor:
        layout, ratio = scores.layout, self._ratio(scores)
        weight = layout.weight.to(ratio)
        parts = []
        for factor, (violation, mask) in zip((self.text_side, self.image_side), self._pairs(ratio, layout), strict=True):
            parts.append(factor * (weight * mean_over(F.softplus(self.beta * violation), mask)).sum())
        held = torch.where(layout.positive[:, 0, 0], F.softplus(-self.beta * ratio[:, 0, 0]), 0)
        parts.append(self.anchor * (weight * held).sum())
        return torch.stack(parts)

    def report(self, scores: Scores) -> Report:
        violation, mask = self._pairs(self._ratio(scores).detach(), scores.layout)[0]
        return {
            "dpo/accuracy": (((violation < 0) & mask).sum(), mask.sum()),
            "dpo/margin": (torch.where(mask, -self.beta * violation, 0).sum(), mask.sum()),
        }

    def _ratio(self, scores: Scores) -> Tensor:
        if scores.reference is None:
            raise ValueError("dpo needs reference scores: write them with `cfvlm-ds score` and pass --data.scores")
        return scores.logp - scores.reference.detach().to(scores.logp)

    def _pairs(self, ratio: Tensor, layout: GroupLayout) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Text-side comparisons on image 0 and image-side comparisons of text 0, won by the anchor cell."""
        chosen = torch.zeros_like(layout.valid)
        chosen[:, 0, 0] = layout.positive[:, 0, 0]
        text = comparisons(ratio[:, :1, :], chosen[:, :1, :], layout.negative[:, :1, :], layout.same_prompt)
        image = comparisons(ratio.transpose(1, 2)[:, :1], chosen.transpose(1, 2)[:, :1], layout.negative.transpose(1, 2)[:, :1])
        return text, image
