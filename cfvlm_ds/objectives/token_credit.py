"""Token credit: a token's weight depends on how much the image changes its likelihood (TPO, arXiv 2412.14487).

Shapes: G groups, I images, C candidates, T tokens of the longest text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfvlm_ds.core.scores import Scores


def token_weights(scores: Scores) -> Tensor:
    """Return token weights [G, I, C, T] without a gradient: 1/2 + sigmoid(s) in a true text, and 3/2 - sigmoid(s) in a false text.

    s = log p(token | image) - mean_k log p(token | I_k), in nats, where I_k are the group's scored images on which the text has the
    opposite truth value. The authors use a noisy version of the image instead of I_k. If there is no I_k, the weight is 1. If there are two
    images and the text is true of one of them, s has opposite signs on them, so both cells have the same weights and the text's prior still
    cancels. Raises ValueError if ``scores`` has no token scores.
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
    """Return the weighted score minus ``logp``, sum_t (w_t - 1) log p(token t), [G, I, C] in nats."""
    weights = token_weights(scores)
    assert scores.tokens is not None
    return ((weights - 1) * scores.tokens).sum(-1)


def credit_report(scores: Scores, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the mean weight of the tokens in which texts differ, as (sum, count). It exceeds 1 if these tokens depend on the image."""
    layout = scores.layout
    assert layout.changed is not None
    counted = layout.changed.unsqueeze(1) & (layout.positive | layout.negative).unsqueeze(-1)
    return {f"credit/{name}": (torch.where(counted, token_weights(scores), 0).sum(), counted.sum())}
