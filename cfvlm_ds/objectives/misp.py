"""MISP-DPO (arXiv 2509.25717), a baseline for the default loss: a text's own image against all images that contradict the text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cfvlm_ds.core.layout import GroupLayout
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.objectives.objective import Report, has_any, mean_over
from cfvlm_ds.objectives.reference import Part, ReferenceTerm, image_pairs, text_pairs


@dataclass(frozen=True, kw_only=True)
class Misp(ReferenceTerm):
    """DPO between texts, plus a Plackett-Luce loss for ranking a text's own image first: log(1 + sum_k exp(beta (r_k - r))).

    r = log p - log p_reference on the text's own image, and r_k is this log-ratio on an image for which the text is false. The reference
    comes from ``--data.scores``. With only one such image, the Plackett-Luce loss is mDPO's image term. The paper's search for negative
    images (CLIP, a sparse autoencoder, importance sampling) is not included; all negatives are images of the same group.

    Args:
        text_side: weight of the text pairs (plain DPO).
        image_side: weight of the Plackett-Luce term over images.
    """

    text_side: float = 1.0
    image_side: float = 1.0

    def parts(self, ratio: Tensor, layout: GroupLayout) -> list[Part]:
        others, known = image_pairs(ratio, layout)
        lost = torch.where(known, self.beta * others, float("-inf")).flatten(2)
        chosen = torch.logsumexp(F.pad(lost, (1, 0)), 2)  # the prepended 0 is the text's own image
        images = self.image_side * mean_over(chosen, known.flatten(2).any(2)), has_any(known)
        return [self.preferred(self.text_side, *text_pairs(ratio, layout)), images]

    def report(self, scores: Scores) -> Report:
        return self.compared(image_pairs(self.ratio(scores).detach(), scores.layout))
