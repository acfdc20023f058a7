"""L_csd, counterfactual scenario discrimination (CF-VLM, arXiv 2506.17267), over sequence likelihoods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from cfvlm_ds.core.groups import Cells
from cfvlm_ds.core.layout import GroupLayout
from cfvlm_ds.objectives.objective import MarginTerm, comparisons


@dataclass(frozen=True, kw_only=True)
class Csd(MarginTerm):
    """Margin between texts: on each image, a true text must beat a false text. The loss is the mean over a group's comparisons.

    Texts are compared only if they answer the same prompt. In a group with two yes/no questions, each question has its own comparison on
    every image.

    Args:
        mode: ``cross`` (default) compares a true and a false text on one image. With K counterfactual pairs, star cells, margin m and link
            h, the loss is 1/(2K) sum_k {h(m + S_0k - S_00) + h(m + S_k0 - S_kk)}. ``matched`` is the paper's form, 1/K sum_k h(m + S_kk -
            S_00). It lowers the likelihood of the counterfactual images' true captions, so two scenes that are counterfactuals of each
            other can never both satisfy it. It omits pairs whose text does not answer the factual text's prompt. ``matched_sg`` is
            ``matched`` with S_kk detached, so it only raises S_00.
    """

    mode: Literal["cross", "matched", "matched_sg"] = "cross"

    @property
    def cells(self) -> Cells:
        return "star" if self.mode == "cross" or self.token_credit else "matched"

    def violations(self, similarity: Tensor, layout: GroupLayout) -> tuple[Tensor, Tensor]:
        if self.mode == "cross":
            return comparisons(similarity, layout.positive, layout.negative, layout.same_prompt)
        others = layout.positive & layout.same_prompt[:, :1]
        others[:, 0, :] = False
        others[:, :, 0] = False  # a sham is a true pair of the factual text, not a counterfactual
        matched = similarity.detach() if self.mode == "matched_sg" else similarity
        return matched - similarity[:, :1, :1], others
