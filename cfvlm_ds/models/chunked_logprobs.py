"""Log-probs of target tokens, computed from hidden states and the output head with only part of the logits in memory at a time.

Shapes: P states that predict a target, N scored tokens, V vocabulary size, d hidden size, D pairs of states whose distributions are
compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from cfvlm_ds.core.layout import Divergence


def head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    predicted_by: Tensor,
    targets: Tensor,
    cap: float | None = None,
    compared: Mapping[Divergence, Tensor] | None = None,
) -> Tensor:
    """Return the log-probs [N] of ``targets`` in nats and fp32. They equal those of ``token_logprobs``, but at most ``LOGITS`` logits are
    in memory at once.

    ``hidden`` [P, d] holds the states that predict targets, ``weight`` [V, d] is the output head, and ``predicted_by`` [N] holds, for each
    of ``targets`` [N], the index of the state that predicts it. The states are processed in parts of at most ``LOGITS`` logits. If there
    are several parts, the backward pass recomputes the logits of each part and accumulates the gradient of the head. If ``cap`` is given,
    the logits are soft-capped: cap * tanh(logit / cap).

    ``compared`` maps each divergence to indices [3, D] of states to compare: row 0 lists the states given a text's own image, and row 1 the
    states given another image (see ``Divergence``). Row 2 is not used here. The divergences [D] are appended to the log-probs.
    """
    logp: Tensor = _HeadLogProbs.apply(hidden, weight, predicted_by, targets, cap, compared or {})
    return logp


LOGITS = 1 << 26
"""Largest number of logits in memory at a time."""


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        predicted_by: Tensor,
        targets: Tensor,
        cap: float | None,
        compared: Mapping[Divergence, Tensor],
    ) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        normaliser, logp = hidden.new_empty(len(hidden), dtype=wide), hidden.new_empty(len(targets), dtype=wide)
        parts, product = _parts(hidden, weight), None
        for part in parts:
            product = _product(hidden[part], weight)
            logits = _capped(product, cap)
            normaliser[part] = logits.logsumexp(-1)
            mine, row = _of_part(predicted_by, part)
            logp = torch.where(mine, logits[row, targets] - normaliser[predicted_by], logp)
        ctx.save_for_backward(hidden, weight, predicted_by, targets, normaliser, product if len(parts) == 1 else None)
        ctx.cap, ctx.compared = cap, compared
        pairs = _pairs(hidden, weight, cap, compared)
        return torch.cat([logp, *(_divergence(kind, own, other)[0] for kind, _, own, other in pairs)]) if compared else logp

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden, weight, predicted_by, targets, normaliser, product = ctx.saved_tensors
        grad, of_pairs = grad.split([len(targets), len(grad) - len(targets)])
        of_state = torch.zeros_like(normaliser).index_add(0, predicted_by, grad)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = None
        for part in _parts(hidden, weight):
            logits = _capped(_product(hidden[part], weight) if product is None else product, ctx.cap)
            # d log p(y) / d logits = [y] - softmax
            pull = (logits - normaliser[part].unsqueeze(1)).exp_().mul_(-of_state[part].unsqueeze(1))
            mine, row = _of_part(predicted_by, part)
            pull = pull.index_put_((row, targets), grad.where(mine, 0), accumulate=True)
            pull = (pull if ctx.cap is None else pull * (1 - (logits / ctx.cap).square())).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = pull @ weight
            if ctx.needs_input_grad[1]:
                grad_weight = pull.T @ hidden[part] if grad_weight is None else grad_weight.addmm_(pull.T, hidden[part])
        for kind, states, *of_pair in _pairs(hidden, weight, ctx.cap, ctx.compared):
            value, *pulls = _divergence(kind, *of_pair)
            grad, of_pairs = of_pairs.split([len(value), len(of_pairs) - len(value)])
            for rows, pull, of_rows in zip(states, pulls, of_pair, strict=False):
                pull = pull.mul_(grad.unsqueeze(1))
                pull = (pull if ctx.cap is None else pull * (1 - (of_rows / ctx.cap).square())).to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden.index_add_(0, rows, pull @ weight)
                if grad_weight is not None:
                    grad_weight.addmm_(pull.T, hidden[rows])
        return grad_hidden, grad_weight, None, None, None, None


def _pairs(
    hidden: Tensor, weight: Tensor, cap: float | None, compared: Mapping[Divergence, Tensor]
) -> Iterator[tuple[Divergence, Tensor, Tensor, Tensor]]:
    """Split each divergence's pairs of states into parts that fit in memory. For each part, yield the divergence, the indices [2, D'] of
    its states, and two tensors of logits [D', V]: given the text's own image, and given another image.

    The size of a part leaves room for the tensors computed from it.
    """
    for kind, states in compared.items():
        for part in states[:2].split(max(1, LOGITS // (4 * len(weight))), 1):
            own, other = (_capped(_product(hidden[rows], weight), cap) for rows in part)
            yield kind, part, own, other


def _divergence(kind: Divergence, own: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    """Return a divergence [D] and its derivatives [D, V] with respect to the logits ``own`` and ``other``. The derivative for ``other`` is
    omitted if it is 0.
    """
    own, other = own.log_softmax(-1), other.log_softmax(-1)
    if kind.sharpened is None:
        lost = own - other
        value = (own.exp() * lost).sum(-1)
        return value, own.exp() * (lost - value.unsqueeze(1)), other.exp() - own.exp()
    alpha, beta = kind.sharpened
    implausible = own < own.amax(-1, keepdim=True) + math.log(beta)
    target = (own + alpha * (own - other)).masked_fill_(implausible, -torch.inf).log_softmax(-1)
    value = (target.exp() * (target - own).masked_fill_(implausible, 0)).sum(-1)
    return value, own.exp() - target.exp()


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return the logits of the ``hidden`` states, in float32 if the states are in half precision. In bfloat16, rounding a logit between 16
    and 32 would cause an error of up to 0.0625 nats.
    """
    if hidden.dtype not in (torch.bfloat16, torch.float16):
        return hidden @ weight.T
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.T.float()


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _parts(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Return slices of the states, each with at most ``LOGITS`` logits (or a single state)."""
    rows = max(1, LOGITS // len(weight))
    return [slice(start, min(start + rows, len(hidden))) for start in range(0, max(1, len(hidden)), rows)]


def _of_part(predicted_by: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Return two tensors [N]: a mask of the targets that this part predicts, and the row of the part that predicts each target (valid only
    where the mask is True).

    Selecting the targets by index instead would synchronise with the device.
    """
    row = predicted_by - part.start
    return (row >= 0) & (predicted_by < part.stop), row.clamp(0, part.stop - part.start - 1)
