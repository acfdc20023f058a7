"""Retention of the initial model's behaviour on unrelated data (learning without forgetting, arXiv 1606.09282)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cfvlm_ds.core.groups import Cells
from cfvlm_ds.core.layout import GroupLayout
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.objectives.objective import Objective, Report


@dataclass(frozen=True, kw_only=True)
class Retain(Objective):
    """exp(d) - 1 - d, an estimate of KL(reference || model) per token, with d = (log p - log p_reference) / n for a true text of n tokens.

    The term is 0 if the model and the reference agree, and grows as the model's probability of a text moves away from the reference's, in
    either direction. It uses only the scored tokens, not the whole vocabulary. For texts sampled from the reference, the mean of -d is the
    KL per token, and the mean of exp(d) - 1 is not positive. The term's mean is therefore at most the KL, with equality for n = 1. The
    reference comes from ``--data.scores`` or is the model without its adapters.

    Args:
        weight: factor of the term in the loss.
        warmup: fraction of all steps over which the weight rises linearly from 0.
        rows: ``plain`` uses only groups without a cell that is known to be false, such as plain captions; ``all`` uses every group.
    """

    weight: float = 1.0
    warmup: float = 0.0
    rows: Literal["plain", "all"] = "plain"

    @property
    def cells(self) -> Cells:
        return "matched"

    @property
    def needs_reference(self) -> bool:
        return True

    def denominator(self, layout: GroupLayout) -> Tensor:
        return (layout.weight.view(-1, 1, 1) * torch.where(self._selected(layout), layout.num_tokens, 0)).sum()

    def numerator(self, scores: Scores) -> Tensor:
        layout = scores.layout
        ratio, tokens = self._ratio(scores)
        divergence = torch.expm1(ratio) - ratio
        weight = layout.weight.to(ratio).view(-1, 1, 1)
        return (weight * torch.where(self._selected(layout), tokens * divergence, 0)).sum()

    def report(self, scores: Scores) -> Report:
        ratio, tokens = self._ratio(scores)
        selected = self._selected(scores.layout)
        return {"retain/ratio": (torch.where(selected, tokens * ratio.detach(), 0).sum(), torch.where(selected, tokens, 0).sum())}

    def _ratio(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """Return two tensors [G, I, C]: each text's log-ratio divided by its tokens (0 outside the selected pairs), and its tokens."""
        if scores.reference is None:
            raise ValueError("retain needs reference scores: write them with `cfvlm-ds score` and pass --data.scores")
        tokens = scores.layout.num_tokens.clamp(min=1)
        ratio = (scores.logp - scores.reference.detach().to(scores.logp)) / tokens
        return torch.where(self._selected(scores.layout), ratio, 0), tokens

    def _selected(self, layout: GroupLayout) -> Tensor:
        """Return a mask [G, I, C] of the true pairs in the groups that ``rows`` selects."""
        if self.rows == "all":
            return layout.positive
        plain = ~(layout.match == 0).flatten(1).any(1)
        return layout.positive & plain.view(-1, 1, 1)
