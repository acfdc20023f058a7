"""Load-balancing loss for mixture-of-experts routers (arXiv 2101.03961, equation 4, as in transformers), computed over an optimizer step.

The loss is E * sum_e f_e * P_e, where f_e is the fraction of (token, layer) pairs that are routed to expert e, and P_e is the mean
probability of e. Both are means over the pairs of all ranks and accumulation steps. A shared prefix counts once per text, so the loss does
not depend on how groups are packed. The f_e have no gradient, but the first backward pass needs them. A step with several forward passes
therefore first runs all of them without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cfvlm_ds.batching.batch import Batch, MicroBatch
from cfvlm_ds.core.distributed import World, all_reduce_sums, preserve_rng
from cfvlm_ds.models import Routed


@dataclass
class RouterBalance:
    """A step's load-balancing loss and the routing statistics of its forward passes.

    Args:
        engine: DeepSpeed engine that wraps a Scorer, whose ``routed`` holds the last forward pass's routing.
        weight: weight of the loss. If it is 0, the experts' loads are recorded, but there is no loss.
    """

    engine: Any
    weight: float
    world: World
    _of_step: tuple[Tensor, Tensor] | None = None  # rows per expert [E] and total number of rows, over all ranks
    _since: list[Routed] = field(default_factory=list)

    def look_ahead(self, micro_batches: Sequence[MicroBatch], forwards: Sequence[int]) -> None:
        """Run all forward passes of a step without gradients to determine the f_e, unless there is only one pass. ``forwards`` holds the
        number of passes per micro-batch.
        """
        if not self.weight or sum(forwards) == 1:
            return
        routings: list[Routed | None] = []
        with torch.no_grad(), preserve_rng(self.world.device):
            for micro_batch, number in zip(micro_batches, forwards, strict=True):
                for k, batch in enumerate(micro_batch.padded(number), len(micro_batch.forwards) - number):
                    self.engine(**batch.model_inputs)
                    routings.append(self._last(batch, k >= 0))
        self._agree([routed for routed in routings if routed is not None])

    def term(self, batch: Batch, counts: bool) -> Tensor | float:
        """Return the load-balancing loss to add to the loss of the last forward pass, whose input was ``batch``. It is 0 if ``counts`` is
        False (for a pass added as padding).
        """
        routed = self._last(batch, counts)
        if routed is None:
            return 0.0
        self._since.append(Routed(routed.taken, routed.probability.detach(), routed.rows))
        if not self.weight:
            return 0.0
        if self._of_step is None:
            self._agree([routed])
        return self.weight * self._share(routed) * self.world.size  # DeepSpeed averages gradients over ranks

    def taken(self) -> tuple[Tensor | None, list[Routed]]:
        """Return this rank's unweighted share of the load-balancing loss, and its routing statistics, since the last call."""
        since, self._since = self._since, []
        return torch.stack([self._share(routed) for routed in since]).sum() if since and self.weight else None, since

    def _last(self, batch: Batch, counts: bool) -> Routed | None:
        """Return the last forward pass's routing, or zeros if its input was padding or a stand-in for unreadable groups."""
        routed: Routed | None = self.engine.module.routed
        if routed is None or (counts and batch.layout.ids):
            return routed
        return Routed(0 * routed.taken, 0 * routed.probability, 0 * routed.rows)

    def _agree(self, routings: Sequence[Routed]) -> None:
        if routings:
            local = [torch.stack(values).sum(0) for values in zip(*((routed.taken, routed.rows) for routed in routings), strict=True)]
            taken, rows = all_reduce_sums(local, self.world.device)
            self._of_step = taken.float(), rows.float().clamp(min=1)

    def _share(self, routed: Routed) -> Tensor:
        assert self._of_step is not None
        taken, rows = self._of_step
        return len(taken) * (taken / rows * routed.probability / rows).sum()
