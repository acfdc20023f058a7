"""DPO (arXiv 2305.18290) and its image-conditional form (mDPO, arXiv 2406.11839) over the cells of a group: the usual baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cfvlm_ds.core.layout import GroupLayout
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.objectives.base import Report, has_any, mean_over
from cfvlm_ds.objectives.reference import ReferenceTerm, factual_images, factual_texts, no_ratio


@dataclass(frozen=True, kw_only=True)
class Dpo(ReferenceTerm):
    """-log sigmoid(beta (r_true - r_false)) with r = log p - log p_reference, reference read from ``--data.scores``.

    Chosen and rejected are the factual text and each counterfactual text of its prompt on the factual image; the image side takes the
    factual text on the factual image and on each counterfactual image. Means over a group's pairs, so a group counts once.

    Args:
        text_side: weight of the text pairs (plain DPO).
        image_side: weight of the image pairs (mDPO's conditional term).
        anchor: weight of -log sigmoid(beta r_00) (mDPO's anchor: the chosen answer must not become less likely).
    """

    text_side: float = 1.0
    image_side: float = 0.0
    anchor: float = 0.0

    def denominator(self, layout: GroupLayout) -> Tensor:
        none = no_ratio(layout)
        groups = [has_any(factual_texts(none, layout)[1]), has_any(factual_images(none, layout)[1]), layout.positive[:, 0, 0]]
        return (layout.weight.unsqueeze(1) * torch.stack(groups, 1)).sum(0)

    def numerator(self, scores: Scores) -> Tensor:
        layout, ratio = scores.layout, self.ratio(scores)
        weight = layout.weight.to(ratio)
        parts = []
        for factor, (violation, mask) in (
            (self.text_side, factual_texts(ratio, layout)),
            (self.image_side, factual_images(ratio, layout)),
        ):
            parts.append(factor * (weight * mean_over(F.softplus(self.beta * violation), mask)).sum())
        held = torch.where(layout.positive[:, 0, 0], F.softplus(-self.beta * ratio[:, 0, 0]), 0)
        parts.append(self.anchor * (weight * held).sum())
        return torch.stack(parts)

    def report(self, scores: Scores) -> Report:
        return self.compared("dpo", factual_texts(self.ratio(scores).detach(), scores.layout))
