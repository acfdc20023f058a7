"""The router balance loss of a mixture of experts (arXiv 2101.03961, equation 4, as transformers computes it), over an optimizer step.

It is E * sum_e f_e * P_e: f_e is the share of rows (a token in a layer) that expert e takes, P_e its mean probability. Both are means over
the rows of all ranks and accumulation steps, in which a prefix counts once for each of its texts, wherever it is computed: how groups are
spread does not matter. The f_e have no gradient, and must be known before the first backward: where a step has several forwards, all of
them are first made without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cfvlm_ds.batching.batch import Batch, MicroBatch
from cfvlm_ds.core.distributed import World, all_reduce_sums, random_state, set_random_state
from cfvlm_ds.models import Routed


class RouterBalance:
    """The loss of one step, and what its forwards have routed.

    Args:
        engine: drives a Scorer, whose ``routed`` is what the routers did in its last forward.
        weight: of the loss; 0 only counts.
    """

    def __init__(self, engine: Any, weight: float, world: World) -> None:
        self._engine, self._weight, self._world = engine, weight, world
        self._of_step: tuple[Tensor, Tensor] | None = None  # how many rows each expert takes on all ranks [E], and how many there are
        self._since: list[Routed] = []

    def look_ahead(self, micro_batches: Sequence[MicroBatch], forwards: Sequence[int]) -> None:
        """Make the step's forwards once without gradients, if there are several; ``forwards`` is their number for each micro-batch."""
        if not self._weight or sum(forwards) == 1:
            return
        before = random_state(self._world.device)
        found: list[Routed | None] = []
        with torch.no_grad():
            for micro_batch, number in zip(micro_batches, forwards, strict=True):
                for k, batch in enumerate(micro_batch.padded(number), len(micro_batch.forwards) - number):
                    self._engine(**batch.model_inputs)
                    found.append(self._last(batch, k >= 0))
        set_random_state(before, self._world.device)
        self._agree([routed for routed in found if routed is not None])

    def term(self, batch: Batch, counts: bool) -> Tensor | float:
        """What the last forward, which was of ``batch``, adds to the loss to call backward on; nothing unless it ``counts``."""
        routed = self._last(batch, counts)
        if routed is None:
            return 0.0
        self._since.append(Routed(routed.taken, routed.probability.detach(), routed.rows))
        if not self._weight:
            return 0.0
        if self._of_step is None:
            self._agree([routed])
        return self._weight * self._share(routed) * self._world.size  # DeepSpeed averages gradients over ranks

    def taken(self) -> tuple[Tensor | None, list[Routed]]:
        """This rank's share of the step's loss, without its weight, and what was routed, since the last call."""
        since, self._since = self._since, []
        return torch.stack([self._share(routed) for routed in since]).sum() if since and self._weight else None, since

    def _last(self, batch: Batch, counts: bool) -> Routed | None:
        """What was routed: nothing in a repeat, and in a batch that stands in for groups that cannot be read."""
        routed: Routed | None = self._engine.module.routed
        if routed is None or (counts and batch.layout.ids):
            return routed
        return Routed(0 * routed.taken, 0 * routed.probability, 0 * routed.rows)

    def _agree(self, found: Sequence[Routed]) -> None:
        if found:
            local = [torch.stack(each).sum(0) for each in zip(*((routed.taken, routed.rows) for routed in found), strict=True)]
            taken, rows = all_reduce_sums(local, self._world.device)
            self._of_step = taken.float(), rows.float().clamp(min=1)

    def _share(self, routed: Routed) -> Tensor:
        assert self._of_step is not None
        taken, rows = self._of_step
        return len(taken) * (taken / rows * routed.probability / rows).sum()
