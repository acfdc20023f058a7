"""One optimizer step: its micro-batches, the units that all ranks agree on, one forward and one backward of the engine each, its measures.

What can go wrong within a step is answered here too, and on all ranks alike: groups that cannot be read, a loss that is not finite, memory.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cfvlm_ds import heartbeat
from cfvlm_ds.checkpoint import TrainState
from cfvlm_ds.collate import STAND_IN, Batch, Collator
from cfvlm_ds.config import RunConfig
from cfvlm_ds.data import GroupSampler
from cfvlm_ds.distributed import World, all_reduce_sums, gather_objects, random_state, set_random_state
from cfvlm_ds.groups import CounterfactualGroup, DataError
from cfvlm_ds.likelihood import Scores
from cfvlm_ds.memory import memory_explained
from cfvlm_ds.models import ModelFlops, adapters_off
from cfvlm_ds.objectives import group_units, likelihood_report, weighted_loss
from cfvlm_ds.run_files import append, keep
from cfvlm_ds.stopping import Stop, WorkerLost, reason


@dataclass
class Run:
    """What the loop works with; built once by ``train``."""

    config: RunConfig
    world: World
    engine: Any
    collator: Collator
    sampler: GroupSampler
    groups: list[CounterfactualGroup]
    splits: dict[str, list[CounterfactualGroup]]
    state: TrainState
    total_steps: int
    flops: ModelFlops
    stop: Stop
    pulse: heartbeat.Heartbeat
    saved_at: float = 0.0  # monotonic seconds: the last checkpoint, or the start
    lost_in_a_row: int = 0  # steps left out, up to this one

    @property
    def dir(self) -> Path:
        return Path(self.config.train.output_dir)


class Meter:
    """Sums and counts since the last record; ratios are taken only after adding over ranks.

    ``gathering``, where weights are partitioned, returns the seconds since its last call in which computation waited for them.
    """

    def __init__(self, gathering: Callable[[], float] | None) -> None:
        self.gathering = gathering
        self.reset()

    def reset(self) -> None:
        self._numbers: dict[str, list[float]] = {}  # name -> [sum, count] of what was given as Python's numbers, and of tensors below
        self._tensors: dict[str, list[Tensor | None]] = {}
        self.waited = 0.0
        self.since = time.monotonic()
        if self.gathering is not None:
            self.gathering()

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add to a metric's sum and count, in float64. Tensors stay on their device: fetching one would wait for the GPU."""
        numbers, tensors = self._numbers.setdefault(name, [0.0, 0.0]), self._tensors.setdefault(name, [None, None])
        for place, value in enumerate((total, count)):
            if isinstance(value, Tensor):
                before, value = tensors[place], value.detach().double()
                tensors[place] = value if before is None else before + value
            else:
                numbers[place] += value

    def reduce(self, world: World) -> dict[str, float]:
        """Global means, and rates per second of the wall clock. Collective, and the one fetch of a record; starts the next record."""
        names = list(self._numbers)
        numbers = torch.tensor([self._numbers[name] for name in names], dtype=torch.float64)
        none = torch.zeros((), dtype=torch.float64)
        tensors = torch.stack([(none if part is None else part).to(world.device) for name in names for part in self._tensors[name]])
        local = numbers.to(world.device) + tensors.view_as(numbers)
        both = dict(zip(names, all_reduce_sums({"": local}, world.device)[""].tolist(), strict=True))
        elapsed = time.monotonic() - self.since
        metrics = {name: total / (elapsed if name.startswith("throughput/") else count) for name, (total, count) in both.items() if count}
        metrics["throughput/data_wait_share"] = self.waited / elapsed
        if self.gathering is not None:
            metrics["throughput/all_gather_share"] = self.gathering() / elapsed
        self.reset()
        return metrics


def optimizer_step(run: Run, batches: Iterator[list[Batch]], meter: Meter) -> tuple[str | None, bool]:
    """One optimizer step: fetch its micro-batches, agree on the global units, then one forward and one backward of the engine each.

    Returns what the ranks have agreed on: why the run is to stop after this step, or None; and whether a checkpoint is due by
    train.save_minutes. Raises WorkerLost on all of them, before anything is computed, when one of them has no batches any more.
    """
    world, objectives, number = run.world, run.config.objective, run.state.step + 1
    run.pulse.mark("data", number)
    asked = time.monotonic()
    micro_batches, lost = _fetched(run, batches)
    meter.waited += time.monotonic() - asked
    run.pulse.mark("agreement", number)
    local: dict[str, Tensor] = {}
    for parts in micro_batches:
        for name, units in group_units(objectives, parts[0].layout).items():
            local[name] = local[name] + units if name in local else units
    minutes = run.config.train.save_minutes
    local[_STOP] = run.stop.votes()
    local[_SAVE_DUE] = torch.tensor(float(world.is_main and 0 < minutes * 60 <= time.monotonic() - run.saved_at))
    local[_WORKER] = torch.tensor(float(lost is not None))
    local[_DROPPED] = torch.tensor(sum(len(parts[0].dropped) for parts in micro_batches))
    global_units = all_reduce_sums(local, world.device)
    agreed = [global_units.pop(name).reshape(-1) for name in (_STOP, _SAVE_DUE, _WORKER, _DROPPED)]
    *votes, save_due, dead, dropped = torch.cat(agreed).tolist()
    if dead:
        found = ((rank, said) for rank, said in enumerate(gather_objects(lost, world)) if said is not None)
        raise WorkerLost("; ".join(f"rank {rank}: {said}" for rank, said in found))
    if dropped:
        _drop(run, [parts[0] for parts in micro_batches])
    measured: list[tuple[Scores, Tensor, dict[str, Tensor]]] = []
    all_finite = torch.ones((), device=world.device)
    finite = True

    def loss_of(scores: Scores) -> Tensor:
        nonlocal finite
        loss, shares = weighted_loss(objectives, scores, global_units, world.size, run.state.step / run.total_steps)
        measured.append((scores, loss.detach(), shares))
        all_finite.mul_(torch.isfinite(loss.detach()))
        if len(measured) == len(micro_batches):
            dist.all_reduce(all_finite, op=dist.ReduceOp.MIN)
            finite = bool(all_finite)
            if not finite:
                return loss * torch.nan  # on every rank: DeepSpeed takes no step whose gradient's global norm is not finite
        return loss

    parts_of_all = [part for parts in micro_batches for part in parts]
    with memory_explained(f"at step {number} on rank {world.rank}", parts_of_all, _memory_remedy(run)):
        for parts, forwards in zip(micro_batches, _forwards(run, micro_batches), strict=True):
            run.pulse.mark("computation", number)
            last = parts is micro_batches[-1]
            if forwards == 1:
                one_pass(run, parts[0], loss_of, last)
            else:
                two_passes(run, parts, forwards, loss_of, last)
        run.engine.step()
    if not finite or not (run.engine.was_step_applied() or run.engine.fp16_enabled()):  # fp16's loss scaling leaves steps out by itself
        losses = [(parts[0], loss) for parts, (_, loss, _) in zip(micro_batches, measured, strict=True)]
        _lost(run, losses, "gradient" if finite else "loss")
    else:
        run.lost_in_a_row = 0
        for parts, (scores, loss, shares) in zip(micro_batches, measured, strict=True):
            _measure(run, parts, scores, loss / world.size, shares, meter)
    return reason(votes), bool(save_due)


_STOP, _SAVE_DUE, _WORKER, _DROPPED = "stop", "save due", "worker", "dropped"  # they travel with the units of the objectives


def _fetched(run: Run, batches: Iterator[list[Batch]]) -> tuple[list[list[Batch]], str | None]:
    """The step's micro-batches; where a data worker has died, a stand-in of which only the form matters, and what became of it."""
    try:
        return [[part.to(run.world.device) for part in next(batches)] for _ in range(run.config.train.gradient_accumulation_steps)], None
    except WorkerLost as error:
        return [[run.collator.scoring_everything()([STAND_IN]).to(run.world.device)]], str(error)


_MOST_LOST = 10  # steps in a row that may be left out


def _memory_remedy(run: Run) -> str:
    train, data = run.config.train, run.config.data
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


def _drop(run: Run, batches: Sequence[Batch]) -> None:
    """Note the groups that are left out of this step because they cannot be read; all ranks call it.

    Raises DataError on all of them where data.on_error and data.max_skipped do not allow it.
    """
    data, skipped = run.config.data, run.state.skipped
    found = dict(
        entry for entries in gather_objects([entry for batch in batches for entry in batch.dropped], run.world) for entry in entries
    )
    if data.on_error == "error":
        first, *more = found.values()
        raise DataError(first + (f" ({len(more)} more groups of this step cannot be read)" if more else ""))
    skipped.update(found)
    if len(skipped) > data.max_skipped:
        raise DataError(
            f"{len(skipped)} groups cannot be read, over data.max_skipped ({data.max_skipped}), such as {next(iter(found.values()))}"
        )
    for name, why in found.items():
        run.world.say(f"warning: group {name!r} is left out: {why}")
    if run.world.is_main:
        keep(run.dir / "skipped.json", json.dumps(skipped, indent=1), run.world.say)


def _lost(run: Run, losses: Sequence[tuple[Batch, Tensor]], what: str) -> None:
    """Note the groups of a step that was not taken, because its loss or its gradient was not finite; all ranks call it.

    Of a loss they are the groups of the micro-batches where it was not finite; a gradient is known as the sum over all ranks only, and they
    are all of the step's. Raises FloatingPointError where train.on_nonfinite does not skip it.
    """
    mine = [name for batch, loss in losses if what == "gradient" or not torch.isfinite(loss) for name in batch.layout.ids]
    by_rank = {rank: names for rank, names in enumerate(gather_objects(mine, run.world)) if names}
    run.lost_in_a_row += 1
    step, listed = run.state.step + 1, run.dir / "nonfinite.jsonl"
    if run.world.is_main:
        append(listed, json.dumps({"step": step, "what": what, "groups": by_rank}), run.world.say)
    shown = "; ".join(f"rank {rank}: {', '.join(names[:8])}{', ...' * (len(names) > 8)}" for rank, names in by_rank.items())
    message = f"the {what} is not finite at step {step}; groups of {shown}; {listed} lists them"
    if run.config.train.on_nonfinite == "stop" or run.engine.was_step_applied():
        raise FloatingPointError(message)
    if run.lost_in_a_row > _MOST_LOST:
        raise FloatingPointError(f"{message}; it is the {run.lost_in_a_row}th step in a row, and a lower learning rate may help")
    run.world.say(f"warning: {message}; the step is left out on all ranks")


def _forwards(run: Run, micro_batches: Sequence[Sequence[Batch]]) -> list[int]:
    """How many forwards each micro-batch takes: as many on every rank, because ZeRO-3 gathers weights on all of them together."""
    forwards = [len(parts) for parts in micro_batches]
    if run.config.data.max_tokens_per_forward is None:
        return forwards
    most = torch.tensor(forwards, device=run.world.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most.tolist()


def one_pass(run: Run, batch: Batch, loss_of: Callable[[Scores], Tensor], last: bool) -> None:
    """Add the gradients of a micro-batch; the ``last`` of a step completes them."""
    run.engine.set_gradient_accumulation_boundary(last)
    reference = _reference(run, batch)
    scores = batch.scores(run.engine(**batch.model_inputs))
    scores = scores if reference is None else replace(scores, reference=reference)
    run.engine.backward(loss_of(scores), scale_wrt_gas=False)


def two_passes(run: Run, parts: Sequence[Batch], forwards: int, loss_of: Callable[[Scores], Tensor], last: bool) -> None:
    """As ``one_pass``, for a micro-batch in parts, with the activations of one of them in memory (gradient cache, arXiv 2101.06983).

    The first pass finds the scores, which the loss couples; its derivatives by the log-probs are their weights in the second, whose random
    numbers are those of the first. The last part's activations serve both. A rank with fewer parts than others begins with repeats of its
    first one, which count nothing.
    """
    repeats = forwards - len(parts)
    repeated = [*[parts[0]] * repeats, *parts]
    references = [_reference(run, part) for part in repeated][repeats:]
    states, found = [], list[Tensor]()
    for part in repeated:
        states.append(random_state(run.world.device))
        with torch.set_grad_enabled(len(found) == forwards - 1):
            found.append(run.engine(**part.model_inputs))
    after = random_state(run.world.device)
    leaves = [logp.detach().requires_grad_() for logp in found]
    scores = Scores.joined([part.scores(logp) for part, logp in zip(parts, leaves[repeats:], strict=True)])
    if own := [reference for reference in references if reference is not None]:
        scores = replace(scores, reference=torch.stack(own).sum(0))
    weights = torch.autograd.grad(loss_of(scores), leaves, allow_unused=True, materialize_grads=True)
    for k in reversed(range(forwards)):
        run.engine.set_gradient_accumulation_boundary(last and k == 0)
        logp = found.pop()
        if k < forwards - 1:
            set_random_state(states[k], run.world.device)
            logp = run.engine(**repeated[k].model_inputs)
        run.engine.backward((weights[k] * logp).sum(), scale_wrt_gas=False)
    set_random_state(after, run.world.device)


def _reference(run: Run, batch: Batch) -> Tensor | None:
    """Log-likelihoods under the model without its adapters, where an objective needs a reference and none is stored."""
    if batch.reference is not None or not any(term.needs_reference for term in run.config.objective.values()):
        return None
    run.engine.eval()
    with torch.no_grad(), adapters_off(run.engine.module.model):
        logp = batch.scores(run.engine(**batch.model_inputs)).logp
    run.engine.train()
    return logp


def _measure(run: Run, parts: Sequence[Batch], scores: Scores, loss: Tensor, shares: Mapping[str, Tensor], meter: Meter) -> None:
    # Shares add up over micro-batches and ranks to the step's loss, so each counts as one part of the step.
    part = 1 / (run.world.size * run.config.train.gradient_accumulation_steps)
    real = float(len(scores.layout.ids) > 0)  # a stand-in for groups that cannot be read is not measured
    meter.add("loss", loss, part)
    for name, share in shares.items():
        meter.add(f"loss/{name}", share, part)
    for objective in run.config.objective.values():
        for key, (total, count) in objective.report(scores).items():
            meter.add(key, total * real, count * real)
    for key, (total, count) in likelihood_report(scores).items():
        meter.add(key, total * real, count * real)
    meter.add("throughput/groups_per_s", len(scores.layout.ids), 1)
    meter.add("throughput/candidates_per_s", scores.layout.valid.sum() * real, 1)
    for batch in parts:
        meter.add("throughput/tokens_per_s", batch.num_tokens, 1)
        meter.add("throughput/images_per_s", batch.num_images, 1)
        meter.add("throughput/model_tflop_per_s", run.flops.of(batch.model_inputs, batch.num_scored) / 1e12, 1)
