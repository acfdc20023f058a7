"""S-VCO (arXiv 2502.13928): for each text, its own image is preferred to a blank one, and the blank one to an image that contradicts the
text.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cfvlm_ds.core.layout import GroupLayout
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.objectives.objective import Report
from cfvlm_ds.objectives.reference import Compared, Part, ReferenceTerm


@dataclass(frozen=True, kw_only=True)
class Svco(ReferenceTerm):
    """-log sigmoid(beta (r_ic - r_bc)) for text c's own image i, and -log sigmoid(beta (r_bc - r_kc)) for each image k that contradicts c.

    r = log p - log p_reference, and b is the blank picture. The reference comes from ``--data.scores``. Both directions count: T_0 prefers
    I_0 to I_k, and T_k prefers I_k to I_0. Each part is a mean over a group's pairs, so for one counterfactual pair, the loss is half the
    authors' sum of four terms. The authors leave the image out of the prompt instead of showing a blank one.

    Args:
        attend: weight of the comparisons between a text's own image and the blank picture.
        reject: weight of the comparisons between the blank picture and each image for which the text is false.
    """

    attend: float = 1.0
    reject: float = 1.0

    @property
    def needs_blank(self) -> bool:
        return True

    def parts(self, ratio: Tensor, layout: GroupLayout) -> list[Part]:
        own, others = _with_blank(ratio, layout)
        return [self.preferred(self.attend, *own), self.preferred(self.reject, *others)]

    def report(self, scores: Scores) -> Report:
        return self.compared(*_with_blank(self.ratio(scores).detach(), scores.layout))


def _with_blank(ratio: Tensor, layout: GroupLayout) -> tuple[Compared, Compared]:
    """Compare each text's own image with the blank picture, and the blank picture with each image for which the text is false.

    Texts that are not true of any image are left out. All tensors are [G, I, C].
    """
    if not layout.blank:
        raise ValueError("svco needs scores of the blank picture; collate the groups with blank=True (Collator.of_run)")
    own, blank = layout.own, ratio[:, -1:]
    counted = layout.valid[:, -1:] & own.any(1, keepdim=True)
    return (blank - ratio, own & counted), (ratio - blank, layout.negative & counted)
