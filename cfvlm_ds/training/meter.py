"""Metrics of training steps: sums that stay on the device until they are recorded, and rates."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cfvlm_ds.core.distributed import World, all_reduce_sums
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.models import ModelFlops
from cfvlm_ds.objectives import Objectives, likelihood_report, scores_of
from cfvlm_ds.training.step import Measured


class Meter:
    """Sums and counts since the last record; ratios are taken only after adding over ranks.

    ``gathering``, where weights are partitioned, returns the seconds for which computation waited for them since its last call.
    """

    def __init__(self, gathering: Callable[[], float] | None) -> None:
        self.gathering = gathering
        self.reset()

    def reset(self) -> None:
        self._numbers: dict[str, list[float]] = {}  # name -> [sum, count] of what was given as Python's numbers, and of tensors below
        self._tensors: dict[str, list[Tensor | None]] = {}
        self._waited = 0.0
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

    def wait(self, seconds: float) -> None:
        """Count seconds that a step has waited for its data."""
        self._waited += seconds

    def reduce(self, world: World) -> dict[str, float]:
        """Global means, and rates per second of the wall clock. A collective, and the only fetch from the device for a record; starts the
        next record."""
        names = list(self._numbers)
        numbers = torch.tensor([self._numbers[name] for name in names], dtype=torch.float64)
        none = torch.zeros((), dtype=torch.float64)
        tensors = torch.stack([(none if part is None else part).to(world.device) for name in names for part in self._tensors[name]])
        local = numbers.to(world.device) + tensors.view_as(numbers)
        both = dict(zip(names, all_reduce_sums([local], world.device)[0].tolist(), strict=True))
        elapsed = time.monotonic() - self.since
        metrics: dict[str, float] = {}
        for name, (total, count) in both.items():
            if count:  # a term's parts have denominators of their own, and its loss is the sum of their means
                metric = name.partition(_PART)[0]
                metrics[metric] = metrics.get(metric, 0.0) + total / (elapsed if name.startswith("throughput/") else count)
        metrics["throughput/data_wait_share"] = self._waited / elapsed
        if self.gathering is not None:
            metrics["throughput/all_gather_share"] = self.gathering() / elapsed
        self.reset()
        return metrics


_PART = "#"


def measure(
    meter: Meter, measured: Measured, objectives: Objectives, part_of_step: float, flops: ModelFlops, sources: Sequence[str] = ()
) -> None:
    """Add what a micro-batch has measured. Shares add up over the micro-batches and ranks of a step to its loss, so each counts as
    ``part_of_step`` of one; ``flops`` counts the model's own operations; ``sources`` are those of a mixture, measured one by one too."""
    scores = measured.scores
    real = float(len(scores.layout.ids) > 0)  # a stand-in for groups that cannot be read is not measured
    meter.add("loss", measured.loss, part_of_step)
    for name, share in measured.shares.items():
        meter.add(f"loss/{name}", share, part_of_step)
    for name, objective in objectives.items():
        for key, (total, count) in objective.report(scores_of(name, objective, scores)).items():
            meter.add(key, total * real, count * real)
    for key, (total, count) in likelihood_report(scores).items():
        meter.add(key, total * real, count * real)
    meter.add("throughput/groups_per_s", len(scores.layout.ids), 1)
    meter.add("throughput/candidates_per_s", scores.layout.valid.sum() * real, 1)
    if measured.hardest is not None:
        meter.add("hard_negatives/proposed", measured.hardest.proposed, len(scores.layout.ids))
        meter.add("hard_negatives/entered", measured.hardest.entered, len(scores.layout.ids))
    for routed in measured.routed:
        for expert, taken in enumerate(routed.taken):
            meter.add(f"router/load/{expert:03d}", taken * len(routed.taken), routed.taken.sum())
    for batch in measured.micro_batch.forwards:
        meter.add("throughput/tokens_per_s", batch.num_tokens, 1)
        meter.add("throughput/images_per_s", batch.num_images, 1)
        meter.add("throughput/model_tflop_per_s", flops.of(batch.model_inputs, batch.num_scored) / 1e12, 1)
    for source in sources:
        _measure_source(meter, scores, objectives, source)


def _measure_source(meter: Meter, scores: Scores, objectives: Objectives, source: str) -> None:
    """Each term's mean over the groups of one source; every rank names the same metrics, whatever it has of them."""
    layout = scores.layout.of_source(source)
    for name, objective in objectives.items():
        seen = scores_of(name, objective, replace(scores, layout=layout))
        counts = torch.atleast_1d(objective.denominator(seen.layout))
        with torch.no_grad():
            totals = torch.atleast_1d(objective.numerator(seen)) if source in layout.sources else torch.zeros_like(counts)
        for number, (total, count) in enumerate(zip(totals, counts, strict=True)):
            meter.add(f"loss/{name}/{source}{_PART}{number}", total, count)
