"""L_fcd, fine-grained causal discrimination (CF-VLM, arXiv 2506.17267): one text on two images, so the text's prior and length cancel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cfvlm_ds.core.groups import Cells
from cfvlm_ds.core.layout import GroupLayout
from cfvlm_ds.objectives.objective import MarginTerm, comparisons, masked_max


@dataclass(frozen=True, kw_only=True)
class Fcd(MarginTerm):
    """Margin between images: the factual text must prefer its own image to the hardest counterfactual image.

    The loss is h(m + max_k S_k0 - S_00), with margin m and link h.

    Args:
        symmetric: add h(m + max_k (S_0k - S_kk)), so that each counterfactual text must prefer its own image to images for which it is
            false. Each half has a weight of 1/2, or of 1 if the group has only that half. Without the second half, a counterfactual image
            is never a positive, and a model that merely detects edits minimises the term. ``false`` is the paper's form.
    """

    symmetric: bool = True

    @property
    def cells(self) -> Cells:
        return "star"

    def violations(self, similarity: Tensor, layout: GroupLayout) -> tuple[Tensor, Tensor]:
        """Return (violation, mask), each [G, 1 or 2]: the hardest comparison of the factual text, and that of the other texts."""
        violation, mask = comparisons(*(each.transpose(1, 2) for each in (similarity, layout.own, layout.negative)))
        violation, mask = violation.flatten(2), mask.flatten(2)
        per_text, some = masked_max(violation, mask, 2), mask.any(2)
        halves, present = [per_text[:, 0]], [some[:, 0]]
        if self.symmetric and per_text.shape[1] > 1:
            halves.append(masked_max(per_text[:, 1:], some[:, 1:], 1))
            present.append(some[:, 1:].any(1))
        return torch.stack(halves, 1), torch.stack(present, 1)
