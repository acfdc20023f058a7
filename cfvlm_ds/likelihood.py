"""From logits to the score matrix, in fp32 whatever the compute dtype.

S[g, i, c] = sum over response tokens t of log p(y_t | y_<t, image i, prompt), in nats. Shapes: N scored tokens, V vocabulary, G groups,
I images, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from cfvlm_ds.groups import GroupLayout

LengthNorm = Literal["anchor", "own", "none"]


@dataclass(frozen=True)
class Scores:
    """Log-likelihoods of every scored cell of a batch of groups, in nats; 0 where ``layout.valid`` is false.

    ``logp`` [G, I, C] sums over the text's tokens; ``end_logp`` [G, I, C] over its end-of-turn tokens; ``reference`` [G, I, C] is ``logp``
    under the reference model; ``prior`` [G, C] is log p(text | blank image) under the reference model. The last two are stored data: they
    never carry a gradient.
    """

    layout: GroupLayout
    logp: Tensor
    end_logp: Tensor
    reference: Tensor | None = None
    prior: Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """The scores of batches that have one layout and different cells of it."""
        logp, end_logp = (torch.stack([getattr(part, name) for part in parts]).sum(0) for name in ("logp", "end_logp"))
        return replace(parts[0], logp=logp, end_logp=end_logp)


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log p(target) per row: logits [N, V] of any floating dtype, targets [N] -> [N] in nats.

    The upcast comes before the softmax: a bfloat16 log-softmax over 152k entries shifts a 64-token sum by 0.1 nat, and margins are 0.25.
    float64 stays float64.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return chosen - torch.logsumexp(logits, dim=-1)


def head_logprobs(hidden: Tensor, weight: Tensor, predicted_by: Tensor, targets: Tensor) -> Tensor:
    """``token_logprobs`` of an output head's logits, without all logits at once: [N] in nats, fp32.

    ``hidden`` [P, d] are the states that predict something, ``weight`` [V, d] the head, and ``targets`` [N] is predicted by the state
    ``predicted_by`` [N]. Logits exist for as many states as ``LOGITS`` allows; where that is not all of them, each part's are computed
    again in the backward pass, and add to one gradient of the head.
    """
    logp: Tensor = _HeadLogProbs.apply(hidden, weight, predicted_by, targets)
    return logp


LOGITS = 1 << 26
"""Logits in memory at a time."""


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, predicted_by: Tensor, targets: Tensor) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        normaliser, logp = hidden.new_empty(len(hidden), dtype=wide), hidden.new_empty(len(targets), dtype=wide)
        parts, kept = _parts(hidden, weight, predicted_by), None
        for part, mine in parts:
            kept = hidden[part] @ weight.T
            logits = kept.to(wide)
            normaliser[part] = logits.logsumexp(-1)
            logp[mine] = logits[predicted_by[mine] - part.start, targets[mine]] - normaliser[predicted_by[mine]]
        ctx.save_for_backward(hidden, weight, predicted_by, targets, normaliser, kept if len(parts) == 1 else None)
        return logp

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden, weight, predicted_by, targets, normaliser, kept = ctx.saved_tensors
        of_state = torch.zeros_like(normaliser).index_add(0, predicted_by, grad)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = None
        for part, mine in _parts(hidden, weight, predicted_by):
            logits = (hidden[part] @ weight.T if kept is None else kept).to(normaliser.dtype)
            # d log p(y) / d logits = [y] - softmax
            pull = (logits - normaliser[part].unsqueeze(1)).exp_().mul_(-of_state[part].unsqueeze(1))
            pull = pull.index_put_((predicted_by[mine] - part.start, targets[mine]), grad[mine], accumulate=True).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = pull @ weight
            if ctx.needs_input_grad[1]:
                grad_weight = pull.T @ hidden[part] if grad_weight is None else grad_weight.addmm_(pull.T, hidden[part])
        return grad_hidden, grad_weight, None, None


def _parts(hidden: Tensor, weight: Tensor, predicted_by: Tensor) -> list[tuple[slice, Tensor | slice]]:
    """States whose logits are in memory together, and the targets they predict."""
    rows = max(1, LOGITS // len(weight))
    if len(hidden) <= rows:
        return [(slice(0, len(hidden)), slice(None))]
    starts = range(0, len(hidden), rows)
    return [
        (slice(start, start + rows), ((predicted_by >= start) & (predicted_by < start + rows)).nonzero().squeeze(1)) for start in starts
    ]


def score_matrix(token_logp: Tensor, cell: Tensor, is_end: Tensor, layout: GroupLayout) -> tuple[Tensor, Tensor]:
    """Sum token log-probs into (logp, end_logp), each [G, I, C].

    ``token_logp`` [N] nats; ``cell`` [N] flat index of the token's cell in [G, I, C]; ``is_end`` [N] bool marks end-of-turn tokens.
    """
    shape = layout.valid.shape
    flat = token_logp.new_zeros(2, layout.valid.numel())
    flat = flat.view(-1).index_add(0, cell + is_end.to(cell.dtype) * layout.valid.numel(), token_logp).view_as(flat)
    return flat[0].view(shape), flat[1].view(shape)


def token_counts(layout: GroupLayout, len_norm: LengthNorm) -> Tensor:
    """The divisor of each cell, [G, I, C]: the anchor text's tokens for the whole group, the cell's own, or 1.

    One normaliser per group is the default, because own-length means put a spurious gradient on the words two captions share.
    """
    if len_norm == "none":
        return torch.ones_like(layout.num_tokens)
    tokens = layout.num_tokens[:, :1, :1].expand_as(layout.num_tokens) if len_norm == "anchor" else layout.num_tokens
    return tokens.clamp(min=1)


def normalised_scores(scores: Scores, len_norm: LengthNorm, pmi: float = 0.0) -> Tensor:
    """S = (log p(text | image) - pmi * log p(text | blank)) / tokens, [G, I, C].

    With ``pmi`` = 1 this is pointwise mutual information per token; the prior cancels wherever one text is compared on two images.

    Raises ValueError when ``pmi`` is not 0 and the scores carry no prior.
    """
    logp = scores.logp
    if pmi:
        if scores.prior is None:
            raise ValueError("pmi needs stored blind scores: write them with `cfvlm-ds score` and pass --data.scores")
        logp = logp - pmi * scores.prior.detach().to(logp).unsqueeze(1)
    return logp / token_counts(scores.layout, len_norm)
