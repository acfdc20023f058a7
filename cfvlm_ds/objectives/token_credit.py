"""Token credit: weights of a text's tokens by the difference that the picture makes to them (TPO, arXiv 2412.14487).

Shapes: G groups, I images, C candidates, T tokens of the longest text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfvlm_ds.core.scores import Scores


def token_weights(scores: Scores) -> Tensor:
    """Return the weight of each token, [G, I, C, T], without a gradient: 1/2 + sigmoid(s) in a true text, 3/2 - sigmoid(s) in a false one.

    s = log p(token | image) - the mean of log p(token | I_k) over the group's scored images I_k for which the truth of the text is the
    opposite, in nats. The authors use noise on the image instead of I_k. Without such an image, the weight is 1. Of one text on two images,
    s and the truth change together, so both cells have the same weights and the text's prior still cancels. Raises ValueError if the scores
    have no tokens.
    """
    if scores.tokens is None:
        raise ValueError("token_credit needs scores of tokens; collate the groups with tokens=True (Collator.of_run)")
    tokens, true = scores.tokens.detach(), scores.layout.positive.unsqueeze(-1)
    false = scores.layout.negative.unsqueeze(-1)

    def difference(images: Tensor) -> Tensor:
        count = images.sum(1, keepdim=True)
        mean = torch.where(images, tokens, 0).sum(1, keepdim=True) / count.clamp(min=1)
        return torch.where(count > 0, tokens - mean, 0).sigmoid() - 0.5

    return 1 + torch.where(true, difference(false), 0) - torch.where(false, difference(true), 0)


def token_credit(scores: Scores) -> Tensor:
    """Return sum_t (w_t - 1) log p(token t), [G, I, C]: the difference between a weighted score and ``logp``, in nats."""
    weights = token_weights(scores)
    assert scores.tokens is not None
    return ((weights - 1) * scores.tokens).sum(-1)


def credit_report(scores: Scores, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return, as a sum and a count, the mean weight of the tokens in which texts differ; above 1 if the pictures decide these tokens."""
    layout = scores.layout
    assert layout.changed is not None
    counted = layout.changed.unsqueeze(1) & (layout.positive | layout.negative).unsqueeze(-1)
    return {f"credit/{name}": (torch.where(counted, token_weights(scores), 0).sum(), counted.sum())}
