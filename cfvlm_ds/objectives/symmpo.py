"""SymMPO (arXiv 2506.11712), a baseline for the default loss: preferences between texts on both images of a counterfactual pair."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from cfvlm_ds.core.layout import GroupLayout
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.objectives.objective import Report, has_any, mean_over
from cfvlm_ds.objectives.reference import Part, ReferenceTerm, text_pairs


@dataclass(frozen=True, kw_only=True)
class SymMPO(ReferenceTerm):
    """DPO between texts on every image, plus a symmetric loss over both images of each counterfactual pair.

    Let r_ic = log p - log p_reference for text c on image i; the reference comes from ``--data.scores``. The gap between two texts is
    d_k = r_00 - r_0k on the factual image and e_k = r_kk - r_k0 on the counterfactual image. The parts are

    - text pairs: -log sigmoid(beta d_k) and -log sigmoid(beta e_k), over every false text of each image;
    - complete pairs: -log sigmoid(beta d_k) - log sigmoid(beta e_k), and (d_k - e_k)^2;
    - anchors: -log sigmoid(beta r_00) and -log sigmoid(beta r_kk).

    Each part is a mean over a group's pairs, so each group counts once. Texts are always compared on the same image, so the partition
    functions in DPO's derivation cancel.

    Args:
        text_side: weight of the text pairs (plain DPO).
        symmetric: weight of the two log-sigmoids of complete pairs.
        consistency: weight of the squared difference between the two gaps, per square nat.
        anchor: weight of the anchors, which keep both true texts from becoming less likely.
    """

    text_side: float = 1.0
    symmetric: float = 0.5
    consistency: float = 1e-4
    anchor: float = 1.0

    def parts(self, ratio: Tensor, layout: GroupLayout) -> list[Part]:
        on_factual, on_other, pairs = _pairs(ratio, layout)
        both = F.softplus(self.beta * on_factual) + F.softplus(self.beta * on_other)
        unequal = self.consistency * mean_over((on_factual - on_other) ** 2, pairs)
        return [
            self.preferred(self.text_side, *text_pairs(ratio, layout)),
            (self.symmetric * mean_over(both, pairs) + unequal, has_any(pairs)),
            self.preferred(self.anchor, -ratio[:, :1, :1], layout.positive[:, :1, :1]),
            self.preferred(self.anchor, -ratio, pairs),
        ]

    def report(self, scores: Scores) -> Report:
        on_factual, on_other, pairs = _pairs(self.ratio(scores).detach(), scores.layout)
        return self.compared((on_factual, pairs), (on_other, pairs))


def _pairs(ratio: Tensor, layout: GroupLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Return three tensors [G, I, C]: the violations -d_k on the factual image, the violations -e_k on the counterfactual image, and a mask
    of the complete pairs.

    A pair (i, c) is complete if text c answers the factual text's prompt, (0, 0) and (i, c) are true, and (0, c) and (i, 0) are false.
    """
    negative, positive = layout.negative, layout.positive
    complete = positive & positive[:, :1, :1] & negative[:, :1, :] & negative[:, :, :1] & layout.same_prompt[:, :1]
    return (ratio[:, :1, :] - ratio[:, :1, :1]).expand_as(ratio), ratio[:, :, :1] - ratio, complete
