"""InfoNCE over an optimizer step's texts and images: CF-VLM's alignment loss (arXiv 2506.17267) with likelihoods instead of cosine
similarities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cfvlm_ds.core.groups import Cells
from cfvlm_ds.core.layout import GroupLayout
from cfvlm_ds.core.scores import Scores, normalised_scores, token_counts
from cfvlm_ds.objectives.objective import Objective, Report, comparisons, mean_over


@dataclass(frozen=True, kw_only=True)
class BatchAlign(Objective):
    """InfoNCE across groups: an image's own text must beat texts from the whole step, and each text must prefer its own image.

    A group's in-batch negatives are texts of other groups that answer the same prompt as the group's factual text. They are assumed to be
    false; no other objective uses unknown cells as negatives. A text is excluded if it

    - equals one of the group's texts or has its ``key``;
    - is listed in the group's ``exclude`` (by text or key);
    - is marked in its own group as true of one of this group's images.

    Text side, for a true text c: log(1 + sum_d exp(s_d - s_c)), where d runs over the group's false texts and the texts of other groups,
    and s = (log p(text | image) - ``pmi`` x log p(text | blank)) / ``temperature``. Image side: the same formula for one text, where d runs
    over images; the prior is left out because it cancels. Each side has a weight of 1/2. The text side is averaged over a group's true
    pairs, and the image side over its texts, so each group counts once.

    Args:
        weight: factor of the term in the loss.
        warmup: fraction of all steps over which the weight rises linearly from 0.
        texts: number of texts from other groups that are scored on each image.
        temperature: divisor of the scores after ``len_norm``.
        len_norm: ``own`` divides each text's log-likelihood by its own token count; ``none`` does not divide.
        pmi: weight of the blind score, which is subtracted on the text side; needs ``--data.scores`` unless it is 0.
    """

    weight: float = 1.0
    warmup: float = 0.05
    texts: int = 16
    temperature: float = 1.0
    len_norm: Literal["own", "none"] = "none"
    pmi: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")
        if self.texts < 1:
            raise ValueError(f"texts must be at least 1, not {self.texts}; to disable the term, set its weight to 0")

    @property
    def cells(self) -> Cells:
        return "batch"

    @property
    def needs_prior(self) -> bool:
        return self.pmi != 0

    def denominator(self, layout: GroupLayout) -> Tensor:
        return (layout.weight * layout.positive[:, 0, 0]).sum()

    def numerator(self, scores: Scores) -> Tensor:
        layout = scores.layout
        text, image = self._text_side(scores), self._image_side(scores)
        return ((layout.weight.to(text) * (text + image)).sum() + self._hosted(scores)) / 2

    def report(self, scores: Scores) -> Report:
        layout = scores.layout
        similarity = normalised_scores(scores, self.len_norm, self.pmi).detach()
        same_prompt = layout.same_prompt[:, :1]
        violation, mask = comparisons(similarity, layout.positive & same_prompt, self._false_texts(layout))
        return {
            "violated/batch_align": (((violation >= 0) & mask).sum(), mask.sum()),
            "batch_align/texts": (_in_batch(layout).sum(), layout.valid.any(2).sum()),
        }

    def _text_side(self, scores: Scores) -> Tensor:
        """Return the text side's loss [G], a mean over each group's true pairs."""
        layout = scores.layout
        similarity = normalised_scores(scores, self.len_norm, self.pmi) / self.temperature
        lost = _against(similarity, similarity, self._false_texts(layout), 2)
        return mean_over(lost, layout.positive & layout.same_prompt[:, :1])

    def _false_texts(self, layout: GroupLayout) -> Tensor:
        return (layout.negative & layout.same_prompt[:, :1]) | _in_batch(layout)

    def _image_side(self, scores: Scores) -> Tensor:
        """Return the image side's loss [G], a mean over each group's texts that are true of at least one image."""
        layout = scores.layout
        similarity, cross_group = self._between_images(scores)
        own = own_images(layout)
        others = torch.cat([similarity, cross_group], 1)
        false = torch.cat([layout.negative, cross_group > float("-inf")], 1)
        own_score = torch.where(own, similarity, 0).sum(1, keepdim=True)
        return mean_over(_against(others, own_score, false, 1).squeeze(1), own.any(1))

    def _hosted(self, scores: Scores) -> Tensor:
        """Return a scalar of value 0 whose gradient is that of other groups' image-side losses with respect to the scores of their texts on
        this batch's images.
        """
        layout = scores.layout
        similarity, cross_group = self._between_images(scores)
        outside = cross_group > float("-inf")
        counted = torch.cat([_in_batch(layout) & outside.any(1, keepdim=True), outside], 1)
        total = torch.logsumexp(torch.where(counted, torch.cat([similarity, cross_group], 1), _LEAST), 1)[:, layout.num_own :]
        share = torch.zeros_like(total) if layout.in_batch is None else layout.in_batch.share.to(total)
        return (share * (total - total.detach())).sum()

    def _between_images(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """Return each text's scores on its own group's images [G, I, C] and on R images of other groups [G, R, C]. Both are
        length-normalised and divided by the temperature.
        """
        layout = scores.layout
        tokens = token_counts(layout, self.len_norm)
        similarity = scores.logp / tokens / self.temperature
        if scores.cross_group is None:
            return similarity, similarity.new_zeros(len(similarity), 0, similarity.shape[2])
        cross_group = scores.cross_group.detach().to(similarity).transpose(1, 2)
        return similarity, cross_group / tokens.amax(1, keepdim=True) / self.temperature


_LEAST = -1e30
"""Value that excludes an entry from a logsumexp. If all entries were -inf instead, gradients would be NaN."""


def own_images(layout: GroupLayout) -> Tensor:
    """Return a mask [G, I, C] of each text's own image, for texts that answer the factual text's prompt."""
    return layout.own & layout.same_prompt[:, :1]


def _in_batch(layout: GroupLayout) -> Tensor:
    """Return a mask [G, I, C] of the scored cells whose text belongs to another group."""
    foreign = torch.zeros_like(layout.valid)
    foreign[:, :, layout.num_own :] = True
    return layout.valid & foreign


def _against(values: Tensor, true: Tensor, false: Tensor, dim: int) -> Tensor:
    """Return log(1 + sum exp(values - true)), in the shape of ``true``. The sum is over the ``false`` entries along ``dim``."""
    others = torch.logsumexp(torch.where(false, values, _LEAST), dim, keepdim=True)
    return torch.where(false.any(dim, keepdim=True), F.softplus(others - true), 0)
