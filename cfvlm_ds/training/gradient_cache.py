"""Computation of a micro-batch's gradients in one or more forward passes, with a gradient cache (arXiv 2101.06983)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cfvlm_ds.batching.batch import Batch, MicroBatch
from cfvlm_ds.core.distributed import random_state, set_random_state
from cfvlm_ds.core.scores import Scores

BesideOf = Callable[[Batch, bool], Tensor | float]
"""(batch of the latest forward pass, flag) -> additional loss of that pass. The flag is False for a padding copy (MicroBatch.padded), whose
additional loss is 0.
"""
ReferenceOf = Callable[[Batch], Tensor | None]
"""Function that returns a batch's reference scores [G, I, C], or None if they are stored or not needed."""
Backward = Callable[[Tensor], None]
"""Function that backpropagates a loss on the scores and accumulates the weights' gradients."""


def forward(
    engine: Any,
    micro_batch: MicroBatch,
    number: int,
    device: torch.device,
    reference_of: ReferenceOf,
    last: bool,
    beside: BesideOf = lambda batch, counts: 0.0,
) -> tuple[Scores, Backward]:
    """Score a micro-batch in ``number`` forward passes (the same number on all ranks). Return the scores [G, I, C] and a function that
    backpropagates a loss on them.

    Only one forward pass's activations are in memory at a time. All scores are computed first, because the loss couples them. Every forward
    pass except the last is then repeated with the same random numbers. The log-probs of each pass, weighted by the loss's derivatives, are
    backpropagated. Passes added only to reach ``number`` have a weight of 0. ``last`` must be True for a step's last micro-batch, after
    which the gradients are complete.
    """
    batches, repeats = micro_batch.padded(number), number - len(micro_batch.forwards)
    references = [reference_of(batch) for batch in batches][repeats:]
    states, logps = [], list[Tensor]()
    for batch in batches:
        states.append(random_state(device))
        with torch.set_grad_enabled(len(logps) == number - 1):
            logps.append(engine(**batch.model_inputs))
    of_last, after = beside(batches[-1], True), random_state(device)
    leaves = [logp.detach().requires_grad_() for logp in logps]
    scores = micro_batch.scores(leaves)
    if computed := [reference for reference in references if reference is not None]:
        scores = replace(scores, reference=torch.stack(computed).sum(0))

    def backward(loss: Tensor) -> None:
        extra = of_last
        weights = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        for k in reversed(range(number)):
            engine.set_gradient_accumulation_boundary(last and k == 0)
            logp = logps.pop()
            if k < number - 1:
                set_random_state(states[k], device)
                logp = engine(**batches[k].model_inputs)
                extra = beside(batches[k], k >= repeats)
            engine.backward((weights[k] * logp).sum() + extra, scale_wrt_gas=False)
        set_random_state(after, device)

    return scores, backward
