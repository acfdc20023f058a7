"""One optimizer step: its micro-batches, the global denominators, one forward and backward pass per micro-batch, and the update.

All ranks handle a failure within a step (unreadable groups, a non-finite loss, running out of memory) in the same way.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cfvlm_ds.batching.batch import STAND_IN, Batch, MicroBatch, explain_out_of_memory
from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.cluster.signals import WorkerLost, reason
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.distributed import World, all_reduce_sums, gather_objects
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.engine import drop_prefetch_recording
from cfvlm_ds.models import Routed, adapters_off
from cfvlm_ds.objectives import batch_terms, denominators, weighted_loss
from cfvlm_ds.training.gradient_cache import forward
from cfvlm_ds.training.hard_negatives import Hardest, cut_to_hardest
from cfvlm_ds.training.in_batch_negatives import CrossRankScores, look_ahead
from cfvlm_ds.training.router_balance import RouterBalance
from cfvlm_ds.training.skipped import NonfiniteSteps, SkippedGroups


@dataclass(frozen=True)
class Measured:
    """A micro-batch after its forward pass.

    ``loss`` and ``shares`` are its contributions to the step's loss and to the parts of each loss term. ``has_comparisons`` marks the parts
    for which the step has comparisons. ``routed`` holds the expert routing of each forward pass in a mixture of experts. ``hardest`` is the
    selection made by train.hard_negatives.
    """

    micro_batch: MicroBatch
    scores: Scores
    loss: Tensor
    shares: Mapping[str, Tensor]
    has_comparisons: Mapping[str, Tensor]
    routed: Sequence[Routed] = ()
    hardest: Hardest | None = None


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step: decisions that are the same on all ranks, and this rank's measurements (empty if the step was skipped).

    ``stop`` is the reason to stop after this step, if any. ``save_due`` is True if any rank wants a checkpoint. ``waited_s`` is the time
    spent waiting for data, in seconds.
    """

    stop: str | None
    save_due: bool
    waited_s: float
    measured: Sequence[Measured]


@dataclass(frozen=True)
class OptimizerStep:
    """Runs optimizer steps and handles failures in the same way on all ranks.

    Args:
        engine: DeepSpeed engine that wraps a Scorer.
        collator: the run's collator. It packs rows again for hard negatives, and makes a stand-in batch if a data worker has died.
        mark: function that records a phase and step number, so that a hang can be located.
    """

    config: RunConfig
    world: World
    engine: Any
    collator: Collator
    skipped: SkippedGroups
    nonfinite: NonfiniteSteps
    mark: Callable[[str, int], None]

    def take(self, number: int, batches: Iterator[MicroBatch], progress: float, votes: Tensor, save_due: bool) -> StepResult:
        """Fetch the micro-batches, agree on the global denominators, compute the gradients, update the weights, and return the result.

        Args:
            number: step number, starting at 1.
            progress: fraction of all steps completed before this one.
            votes: [2], this rank's votes to stop; see cfvlm_ds.cluster.signals.
            save_due: True if this rank wants a checkpoint.

        Raises WorkerLost on all ranks, before anything is computed, if a rank has lost a data worker.
        """
        self.mark("data", number)
        started = time.monotonic()
        micro_batches, lost = self._fetch(batches)
        waited = time.monotonic() - started
        chosen: list[Hardest] = []
        keep, pack = self.config.train.hard_negatives, self.collator.packed_again
        if keep is not None and not all_reduce_sums([torch.tensor(float(lost is not None))], self.world.device)[0]:
            self.mark("computation", number)
            with self._memory_explained(number, micro_batches):
                micro_batches, chosen = cut_to_hardest(
                    self.engine, micro_batches, self._forwards(micro_batches), self.world.device, keep, pack
                )
        self.mark("agreement", number)
        local: dict[str, Tensor] = {}
        for micro_batch in micro_batches:
            for name, denominator in denominators(self.config.objective, micro_batch.layout).items():
                local[name] = local[name] + denominator if name in local else denominator
        flags = torch.tensor([float(save_due), float(lost is not None), float(sum(len(each.dropped) for each in micro_batches))])
        *sums, control = all_reduce_sums([*local.values(), torch.cat([votes, flags])], self.world.device)
        *all_votes, save_due, a_worker_is_lost, dropped = control.tolist()
        if a_worker_is_lost:
            messages = enumerate(gather_objects(lost, self.world))
            raise WorkerLost("; ".join(f"rank {rank}: {message}" for rank, message in messages if message is not None))
        if dropped:
            self.skipped.note(micro_batches)
        measured, finite = self._compute(number, micro_batches, dict(zip(local, sums, strict=True)), progress)
        # fp16 loss scaling skips steps on its own
        if not finite or not (self.engine.was_step_applied() or self.engine.fp16_enabled()):
            losses = [(each.micro_batch, each.loss) for each in measured]
            self.nonfinite.note(number, losses, "gradient" if finite else "loss", self.engine.was_step_applied())
            measured = []
        else:
            self.nonfinite.finite()
        if chosen and measured:
            measured = [replace(each, hardest=hardest) for each, hardest in zip(measured, chosen, strict=True)]
        return StepResult(reason(all_votes), bool(save_due), waited, measured)

    def _fetch(self, batches: Iterator[MicroBatch]) -> tuple[list[MicroBatch], str | None]:
        """Return the step's micro-batches and None. If a data worker has died, return a stand-in micro-batch and the error message."""
        device, count = self.world.device, self.config.train.gradient_accumulation_steps
        try:
            return [next(batches).to(device) for _ in range(count)], None
        except WorkerLost as error:
            return [MicroBatch((self.collator.building("full", None)([STAND_IN]),)).to(device)], str(error)

    def _memory_explained(self, number: int, micro_batches: Sequence[MicroBatch]) -> contextlib.AbstractContextManager[None]:
        everything = [batch for micro_batch in micro_batches for batch in micro_batch.forwards]
        return explain_out_of_memory(f"at step {number} on rank {self.world.rank}", everything, _memory_remedy(self.config))

    def _compute(
        self, number: int, micro_batches: Sequence[MicroBatch], denominators: Mapping[str, Tensor], progress: float
    ) -> tuple[list[Measured], bool]:
        """Compute the micro-batches' gradients and update the weights. Return the measurements, and True if all losses were finite."""
        world, objective, engine = self.world, self.config.objective, self.engine
        measured: list[Measured] = []
        finite = torch.ones((), device=world.device)
        coupled, of_step = bool(batch_terms(objective)), None
        forwards, balance = self._forwards(micro_batches), RouterBalance(engine, self.config.train.router_balance, world)
        with self._memory_explained(number, micro_batches):
            self.mark("computation", number)
            if coupled and len(micro_batches) > 1:
                of_step = CrossRankScores(look_ahead(engine, micro_batches, forwards, world.device), world)
            balance.look_ahead(micro_batches, forwards)
            for remaining, (micro_batch, count) in zip(
                reversed(range(len(forwards))), zip(micro_batches, forwards, strict=True), strict=True
            ):
                self.mark("computation", number)
                last = remaining == 0
                scores, backward = forward(engine, micro_batch, count, world.device, self._reference, last, balance.term)
                if coupled:
                    of_step = of_step or CrossRankScores([scores], world)  # one micro-batch per rank
                    scores = of_step.added_to(scores)
                loss, shares = weighted_loss(objective, scores, denominators, world.size, progress)
                finite.mul_(torch.isfinite(loss.detach()))
                if last:
                    dist.all_reduce(finite, op=dist.ReduceOp.MIN)
                # DeepSpeed skips a step with a non-finite global gradient norm, so the last loss must be finite on all ranks or on none.
                backward(loss * torch.where(finite > 0, 1.0, torch.nan) if last else loss)
                loss, (share, routed) = loss.detach() / world.size, balance.taken()
                compared = {name: denominator > 0 for name, denominator in denominators.items()}
                if share is not None:
                    loss, shares = loss + self.config.train.router_balance * share, {**shares, "router_balance": share.view(1)}
                    compared["router_balance"] = torch.ones(1)
                measured.append(Measured(micro_batch, scores, loss, shares, compared, routed))
            engine.step()
        return measured, bool(finite)

    def _forwards(self, micro_batches: Sequence[MicroBatch]) -> list[int]:
        """Return the number of forward passes per micro-batch. All ranks get the same number, because they gather weights together under
        ZeRO-3.
        """
        forwards = [len(micro_batch.forwards) for micro_batch in micro_batches]
        if self.config.data.max_tokens_per_forward is None:
            return forwards
        most = torch.tensor(forwards, device=self.world.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return most.tolist()

    def _reference(self, batch: Batch) -> Tensor | None:
        """Return a batch's scores [G, I, C] in nats under the model without its adapters. Return None if no objective needs reference
        scores, or if they are stored.
        """
        if batch.reference is not None or not any(term.needs_reference for term in self.config.objective.values()):
            return None
        self.engine.eval()
        with torch.no_grad(), adapters_off(self.engine.module.model):
            logp = batch.scores(self.engine(**batch.model_inputs)).logp
        drop_prefetch_recording(self.engine)  # a training pass starts with the same modules, but continues with a backward pass
        self.engine.train()
        return logp


def _memory_remedy(config: RunConfig) -> str:
    train, data = config.train, config.data
    if data.max_tokens_per_forward is not None:
        setting = f"data.max_tokens_per_forward ({data.max_tokens_per_forward})"
    elif data.max_tokens_per_micro_batch is not None:
        setting = f"data.max_tokens_per_micro_batch ({data.max_tokens_per_micro_batch})"
    else:
        setting = f"train.per_device_train_batch_size ({train.per_device_train_batch_size}), and raise train.gradient_accumulation_steps"
    return (
        f"lower {setting}, set data.max_tokens_per_forward, model.gradient_checkpointing or limits on visual tokens (model.max_pixels, "
        "model.max_tiles)"
    )
