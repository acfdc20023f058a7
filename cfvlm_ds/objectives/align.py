"""L_align: the NLL of true pairs (CF-VLM, arXiv 2506.17267, section 3). ``batch_align`` corresponds to the paper's contrastive loss over
the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cfvlm_ds.core.groups import Cells
from cfvlm_ds.core.layout import GroupLayout
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.objectives.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Align(Objective):
    """NLL of the factual pair + ``counterfactual`` x NLL of the other true pairs.

    The two NLLs are averaged separately, both per token, including end-of-turn tokens. For the second NLL, log-likelihoods and token
    counts are first averaged over each group's other true pairs.

    Args:
        weight: factor of the term in the loss. Without this term, true texts can become less likely (likelihood displacement).
        warmup: fraction of all steps over which the weight rises linearly from 0.
        counterfactual: weight of the NLL of the group's true pairs other than the factual pair.
    """

    weight: float = 1.0
    warmup: float = 0.0
    counterfactual: float = 1.0

    @property
    def cells(self) -> Cells:
        return "matched" if self.counterfactual else "anchor"

    def denominator(self, layout: GroupLayout) -> Tensor:
        parts = _factual_and_rest((layout.num_tokens + layout.num_end_tokens).to(layout.weight), layout)
        return torch.stack(parts if self.counterfactual else parts[:1])

    def numerator(self, scores: Scores) -> Tensor:
        factual, rest = _factual_and_rest(-(scores.logp + scores.end_logp), scores.layout)
        return torch.stack([factual, self.counterfactual * rest] if self.counterfactual else [factual])


def _factual_and_rest(values: Tensor, layout: GroupLayout) -> tuple[Tensor, Tensor]:
    """Sum ``values`` [G, I, C] over groups, weighted by ``layout.weight``. Return two scalars: the sum for the factual pairs, and the sum
    of each group's mean over its other true pairs.
    """
    factual = layout.weight.to(values) * torch.where(layout.positive[:, 0, 0], values[:, 0, 0], 0)
    others = layout.positive.clone()
    others[:, 0, 0] = False
    rest = torch.where(others, values, 0).sum((1, 2)) / others.sum((1, 2)).clamp(min=1)
    return factual.sum(), (layout.weight.to(values) * rest).sum()
