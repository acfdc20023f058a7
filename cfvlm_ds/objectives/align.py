"""L_align: the NLL of true pairs and, optionally, an InfoNCE loss within the group (CF-VLM, arXiv 2506.17267, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cfvlm_ds.core.groups import Cells
from cfvlm_ds.core.layout import GroupLayout
from cfvlm_ds.core.scores import LengthNorm, Scores, normalised_scores
from cfvlm_ds.objectives.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Align(Objective):
    """NLL of the factual pair + ``counterfactual`` x NLL of the other true pairs + ``infonce`` x in-group InfoNCE.

    Each part is averaged separately. Both NLLs are per token, including end-of-turn tokens. For the second NLL, log-likelihoods and token
    counts are first averaged over each group's other true pairs. The InfoNCE is averaged over the groups that have a negative.

    Args:
        weight: factor of the term in the loss. Without this term, true texts can become less likely (likelihood displacement).
        warmup: fraction of all steps over which the weight rises linearly from 0.
        counterfactual: weight of the NLL of the group's true pairs other than the factual pair.
        infonce: weight of 1/2 [-log softmax_c(S_0c / tau)_0 - log softmax_i(S_i0 / tau)_0], where the texts c answer the factual
            text's prompt.
        temperature: tau of the InfoNCE; it divides the scores after ``len_norm``.
        len_norm: length normalisation of the InfoNCE scores.
        pmi: the blind score times this factor is subtracted from the InfoNCE scores; needs ``--data.scores``.
    """

    weight: float = 1.0
    warmup: float = 0.0
    counterfactual: float = 1.0
    infonce: float = 0.0
    temperature: float = 0.1
    len_norm: LengthNorm = "anchor"
    pmi: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")

    @property
    def cells(self) -> Cells:
        return "star" if self.infonce else "matched" if self.counterfactual else "anchor"

    @property
    def needs_prior(self) -> bool:
        return self.infonce != 0 and self.pmi != 0

    def denominator(self, layout: GroupLayout) -> Tensor:
        tokens = (layout.num_tokens + layout.num_end_tokens).to(layout.weight)
        contrasted = _infonce_mask(layout)[1].any(1).any(1)
        return torch.stack([*_factual_and_rest(tokens, layout), (layout.weight * contrasted).sum()])

    def numerator(self, scores: Scores) -> Tensor:
        layout = scores.layout
        factual, rest = _factual_and_rest(-(scores.logp + scores.end_logp), layout)
        parts = [factual, self.counterfactual * rest, factual.new_zeros(())]
        if self.infonce:
            parts[2] = self.infonce * (layout.weight.to(factual) * self._infonce(scores)).sum()
        return torch.stack(parts)

    def _infonce(self, scores: Scores) -> Tensor:
        """Return the InfoNCE loss [G]. It is 0 for a group without a negative."""
        similarity = normalised_scores(scores, self.len_norm, self.pmi) / self.temperature
        anchor, negative = _infonce_mask(scores.layout)
        hidden = torch.where(anchor | negative, similarity, float("-inf"))
        text_side = torch.logsumexp(hidden[:, 0, :], -1) - similarity[:, 0, 0]
        image_side = torch.logsumexp(hidden[:, :, 0], -1) - similarity[:, 0, 0]
        return (text_side + image_side) / 2


def _factual_and_rest(values: Tensor, layout: GroupLayout) -> tuple[Tensor, Tensor]:
    """Return two weighted sums over groups: that of the factual pair's entry in ``values`` [G, I, C], and that of the mean entry of the
    other true pairs.
    """
    factual = layout.weight.to(values) * torch.where(layout.positive[:, 0, 0], values[:, 0, 0], 0)
    others = layout.positive.clone()
    others[:, 0, 0] = False
    rest = torch.where(others, values, 0).sum((1, 2)) / others.sum((1, 2)).clamp(min=1)
    return factual.sum(), (layout.weight.to(values) * rest).sum()


def _infonce_mask(layout: GroupLayout) -> tuple[Tensor, Tensor]:
    """Return two masks [G, I, C]: the anchors, and the negatives in row 0 (only texts that answer the anchor's prompt) and column 0."""
    anchor = torch.zeros_like(layout.valid)
    anchor[:, 0, 0] = True  # also in a group without scores, because a softmax over no cells would be NaN
    star = torch.zeros_like(layout.valid)
    star[:, 0, :] = layout.same_prompt[:, 0]
    star[:, :, 0] = True
    return anchor, layout.negative & star
