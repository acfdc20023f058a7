"""The gradients of one micro-batch: in one pass, or in parts by a gradient cache (arXiv 2101.06983)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cfvlm_ds.batching.batch import Batch
from cfvlm_ds.core.distributed import random_state, set_random_state
from cfvlm_ds.core.scores import Scores

LossOf = Callable[[Scores], Tensor]
BesideOf = Callable[[Batch, bool], Tensor | float]
"""What the last forward, of a batch, adds to the loss beside the objective; nothing for a repeat, whose flag is False."""
ReferenceOf = Callable[[Batch], Tensor | None]
"""Computes the reference scores [G, I, C] of a batch; None if they are stored or not needed."""


def nothing(batch: Batch, counts: bool) -> float:
    """There is no loss beside the objective."""
    return 0.0


def one_pass(engine: Any, batch: Batch, loss_of: LossOf, reference_of: ReferenceOf, last: bool, beside: BesideOf = nothing) -> None:
    """Add the gradients of a micro-batch; the ``last`` of a step completes them."""
    engine.set_gradient_accumulation_boundary(last)
    reference = reference_of(batch)
    scores = batch.scores(engine(**batch.model_inputs))
    scores = scores if reference is None else replace(scores, reference=reference)
    extra = beside(batch, True)
    engine.backward(loss_of(scores) + extra, scale_wrt_gas=False)


def two_passes(
    engine: Any,
    parts: Sequence[Batch],
    forwards: int,
    loss_of: LossOf,
    reference_of: ReferenceOf,
    last: bool,
    device: torch.device,
    beside: BesideOf = nothing,
) -> None:
    """As ``one_pass``, for a micro-batch in parts, with the activations of only one part in memory.

    The first pass computes the scores, which the loss couples. The loss's derivatives by the log-probs weight them in the second pass,
    which uses the same random numbers. The last part's activations serve both passes. All ranks make ``forwards`` forwards: a rank with
    fewer parts begins with repeats of its first one, with weight 0.
    """
    repeats = forwards - len(parts)
    repeated = [*[parts[0]] * repeats, *parts]
    references = [reference_of(part) for part in repeated][repeats:]
    states, found = [], list[Tensor]()
    for part in repeated:
        states.append(random_state(device))
        with torch.set_grad_enabled(len(found) == forwards - 1):
            found.append(engine(**part.model_inputs))
    extra, after = beside(repeated[-1], True), random_state(device)
    leaves = [logp.detach().requires_grad_() for logp in found]
    scores = Scores.joined([part.scores(logp) for part, logp in zip(parts, leaves[repeats:], strict=True)])
    if own := [reference for reference in references if reference is not None]:
        scores = replace(scores, reference=torch.stack(own).sum(0))
    weights = torch.autograd.grad(loss_of(scores), leaves, allow_unused=True, materialize_grads=True)
    for k in reversed(range(forwards)):
        engine.set_gradient_accumulation_boundary(last and k == 0)
        logp = found.pop()
        if k < forwards - 1:
            set_random_state(states[k], device)
            logp = engine(**repeated[k].model_inputs)
            extra = beside(repeated[k], k >= repeats)
        engine.backward((weights[k] * logp).sum() + extra, scale_wrt_gas=False)
    set_random_state(after, device)
