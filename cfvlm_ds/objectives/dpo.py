"""DPO (arXiv 2305.18290) and its image-conditional form (mDPO, arXiv 2406.11839) over a group's cells, as a baseline."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cfvlm_ds.core.layout import GroupLayout
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.objectives.objective import Report
from cfvlm_ds.objectives.reference import Part, ReferenceTerm, image_pairs, text_pairs
from cfvlm_ds.objectives.token_credit import credit_report, token_credit


@dataclass(frozen=True, kw_only=True)
class Dpo(ReferenceTerm):
    """-log sigmoid(beta (r_true - r_false)) with r = log p - log p_reference; the reference comes from ``--data.scores``.

    Text side: on every image, a true text is chosen and each false text of the same prompt is rejected. Image side: a text is chosen on its
    own image and rejected on each image for which it is false. Each side is a mean over a group's pairs, so each group counts once.

    Args:
        text_side: weight of the text pairs (plain DPO).
        image_side: weight of the image pairs (mDPO's conditional term).
        anchor: weight of -log sigmoid(beta r) on the true pairs (mDPO's anchor: the chosen answer must not become less likely).
        token_credit: multiply the gradient of each token's log-likelihood by its weight w_t (see ``csd``). r itself stays unweighted,
            because the stored reference is already a sum over tokens. TPO's authors weight r as well; the gradients are equal at r = 0.
    """

    text_side: float = 1.0
    image_side: float = 0.0
    anchor: float = 0.0
    token_credit: bool = False

    @property
    def needs_tokens(self) -> bool:
        return self.token_credit

    def ratio(self, scores: Scores) -> Tensor:
        ratio = super().ratio(scores)
        return ratio + (credit := token_credit(scores)) - credit.detach() if self.token_credit else ratio

    def parts(self, ratio: Tensor, layout: GroupLayout) -> list[Part]:
        return [
            self.preferred(self.text_side, *text_pairs(ratio, layout)),
            self.preferred(self.image_side, *image_pairs(ratio, layout)),
            self.preferred(self.anchor, -ratio, layout.own),
        ]

    def report(self, scores: Scores) -> Report:
        credit = credit_report(scores, "dpo") if self.token_credit else {}
        return credit | self.compared(text_pairs(self.ratio(scores).detach(), scores.layout))
