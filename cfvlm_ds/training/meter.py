"""Meter for training metrics. It keeps sums on the device, and converts them to means and rates per second when metrics are recorded."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cfvlm_ds.core.distributed import World, all_reduce_sums
from cfvlm_ds.models import ModelFlops
from cfvlm_ds.objectives import Objectives, likelihood_report, scores_of
from cfvlm_ds.training.step import Measured


class Meter:
    """Running sums and counts of metrics since the last record. They are added up over all ranks before any ratio is computed.

    After ``reduce``, ``incomplete`` maps each metric of which only some parts were measured to a note, such as " (1 of 2 parts)".

    ``gathering`` is a function that returns how many seconds computation has waited for partitioned weights since the previous call. It is
    None if weights are not partitioned.
    """

    def __init__(self, gathering: Callable[[], float] | None) -> None:
        self.gathering = gathering
        self.incomplete: dict[str, str] = {}
        self.reset()

    def reset(self) -> None:
        self._sums: dict[tuple[str, int, bool], list[Tensor | float]] = {}  # (metric, part, is a rate) -> [sum, count]
        self._waited = 0.0
        self.since = time.monotonic()
        if self.gathering is not None:
            self.gathering()

    def __len__(self) -> int:
        return len(self._sums)

    def add(self, name: str, total: Tensor | float, count: Tensor | float | None, part: int = 0) -> None:
        """Add ``total`` and ``count`` to the float64 sums of one part of a metric. The metric is the sum of its parts' means or, if
        ``count`` is None, the total per second.

        Tensors stay on their device, because copying them to the host would force a synchronisation with the GPU.
        """
        sums = self._sums.setdefault((name, part, count is None), [0.0, 0.0])
        for place, value in enumerate((total, 1 if count is None else count)):
            sums[place] += value.detach().double() if isinstance(value, Tensor) else value

    def wait(self, seconds: float) -> None:
        """Add the time, in seconds, that a step waited for its data."""
        self._waited += seconds

    def reduce(self, world: World) -> dict[str, float]:
        """Return means over all ranks and rates per second of wall-clock time, and reset the meter for the next record.

        Every rank must call this. All sums leave the device in one transfer.
        """
        values = [torch.as_tensor(value, dtype=torch.float64, device=world.device) for sums in self._sums.values() for value in sums]
        both = dict(zip(self._sums, all_reduce_sums([torch.stack(values).view(-1, 2)], world.device)[0].tolist(), strict=True))
        elapsed = time.monotonic() - self.since
        metrics: dict[str, float] = {}
        parts, measured = Counter[str](), Counter[str]()
        for (name, _, is_rate), (total, count) in both.items():
            parts[name] += 1
            if count:
                measured[name] += 1
                metrics[name] = metrics.get(name, 0.0) + total / (elapsed if is_rate else count)
        self.incomplete = {name: f" ({count} of {parts[name]} parts)" for name, count in measured.items() if count < parts[name]}
        metrics["throughput/data_wait_share"] = self._waited / elapsed
        if self.gathering is not None:
            metrics["throughput/all_gather_share"] = self.gathering() / elapsed
        self.reset()
        return metrics


def measure(
    meter: Meter,
    measured: Measured,
    objectives: Objectives,
    part_of_step: float,
    flops: ModelFlops,
    sources: Sequence[str] = (),
) -> None:
    """Add a micro-batch's measurements to the meter.

    Args:
        part_of_step: fraction of a step that the micro-batch represents. A step's loss is the sum over its micro-batches and ranks.
        flops: counter of the model's floating-point operations.
        sources: names of a mixture's sources, each of which is also measured separately.
    """
    scores = measured.scores
    real = float(len(scores.layout.ids) > 0)  # a stand-in for unreadable groups is not measured
    for name, shares in measured.shares.items():
        for part, (share, some) in enumerate(zip(shares, measured.has_comparisons[name], strict=True)):
            meter.add(f"loss/{name}", share, some * part_of_step, part)
    for name, objective in objectives.items():
        for key, (total, count) in objective.report(scores_of(name, objective, scores)).items():
            meter.add(key, total * real, count * real)
    for key, (total, count) in likelihood_report(scores).items():
        meter.add(key, total * real, count * real)
    meter.add("throughput/groups_per_s", len(scores.layout.ids), None)
    meter.add("throughput/candidates_per_s", scores.layout.valid.sum() * real, None)
    if measured.hardest is not None:
        meter.add("hard_negatives/proposed", measured.hardest.proposed, len(scores.layout.ids))
        meter.add("hard_negatives/entered", measured.hardest.entered, len(scores.layout.ids))
    for routed in measured.routed:
        for expert, taken in enumerate(routed.taken):
            meter.add(f"router/load/{expert:03d}", taken * len(routed.taken), routed.taken.sum())
    for batch in measured.micro_batch.forwards:
        meter.add("throughput/tokens_per_s", batch.num_tokens, None)
        meter.add("throughput/images_per_s", batch.num_images, None)
        meter.add("throughput/model_tflop_per_s", flops.of(batch.model_inputs, batch.num_scored) / 1e12, None)
    for source in sources:  # every rank adds the same metrics, whether or not it has groups of the source
        layout = scores.layout.of_source(source)
        for name, objective in objectives.items():
            of_source = scores_of(name, objective, replace(scores, layout=layout))
            counts = torch.atleast_1d(objective.denominator(of_source.layout))
            with torch.no_grad():
                totals = torch.atleast_1d(objective.numerator(of_source)) if source in layout.sources else torch.zeros_like(counts)
            for number, (total, count) in enumerate(zip(totals, counts, strict=True)):
                meter.add(f"loss/{name}/{source}", total, count, number)
