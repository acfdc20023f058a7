"""Divergences between a text's next-token distributions on two images: contrastive self-distillation, and consistency between the factual
image and its sham.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from cfvlm_ds.core.groups import Cells
from cfvlm_ds.core.layout import Divergence, GroupLayout
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.objectives.objective import Objective, has_any, mean_over


@dataclass(frozen=True, kw_only=True)
class DivergenceTerm(Objective):
    """A divergence in nats per token, averaged over each group's comparisons and then over the groups that have a comparison.

    Args:
        weight: factor of the term in the loss.
        warmup: fraction of all steps over which the weight rises linearly from 0.
    """

    weight: float = 1.0
    warmup: float = 0.0

    @property
    def cells(self) -> Cells:
        return "matched"

    @property
    def divergence(self) -> Divergence:
        raise NotImplementedError

    def denominator(self, layout: GroupLayout) -> Tensor:
        return (layout.weight * has_any(self._compared(layout))).sum()

    def numerator(self, scores: Scores) -> Tensor:
        layout = scores.layout
        if (kind := self.divergence) not in scores.divergences:
            raise ValueError(f"{type(self).__name__} needs {kind}; collate the groups with divergences=(...) (Collator.of_run)")
        per_group = mean_over(scores.divergences[kind] / layout.num_tokens.clamp(min=1), self._compared(layout))
        return (layout.weight.to(per_group) * per_group).sum()

    def _compared(self, layout: GroupLayout) -> Tensor:
        return layout.compared(self.divergence.against)


@dataclass(frozen=True, kw_only=True)
class ContrastDistill(DivergenceTerm):
    """KL(t || p) at a true text's tokens, where t is VCSD's target (arXiv 2607.21556) and p is the distribution on the text's own image.

    t is proportional to p (p / q)^alpha on the tokens with p >= beta max p, where q is the distribution on the image that ``contrast``
    selects. The target favours tokens that are more likely on the text's own image. In t, p and q are detached, so the teacher is
    the current model. In the paper, the teacher's weights are an exponential moving average, the texts are sampled from the model instead
    of taken from the data, and the temperature is 2 instead of 1.

    Args:
        contrast: ``edited`` compares with every image for which the text is false; ``blank`` compares with the blank picture (the paper's
            form).
        alpha: exponent of p / q.
        beta: minimum probability of a token in the target, as a fraction of the most likely token's probability.
    """

    contrast: Literal["edited", "blank"] = "edited"
    alpha: float = 1.0
    beta: float = 0.1

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ValueError(f"alpha must not be negative, but is {self.alpha}")
        if not 0 < self.beta <= 1:
            raise ValueError(f"beta must be above 0 and at most 1, not {self.beta}")

    @property
    def cells(self) -> Cells:
        return "star" if self.contrast == "edited" else "matched"

    @property
    def needs_blank(self) -> bool:
        return self.contrast == "blank"

    @property
    def divergence(self) -> Divergence:
        return Divergence("false" if self.contrast == "edited" else "blank", (self.alpha, self.beta))


@dataclass(frozen=True, kw_only=True)
class Sham(DivergenceTerm):
    """KL(p || q) at a true text's tokens, between the distributions p on the factual image and q on a sham (DVRP, arXiv 2601.06801).

    Both distributions receive gradients; it could not be determined whether the paper stops the gradient of one of them. In the paper,
    which uses reinforcement learning, q is the distribution on a perturbed picture, and the texts are sampled from the model. A group
    without a sham has no comparison.
    """

    @property
    def divergence(self) -> Divergence:
        return Divergence("sham")
