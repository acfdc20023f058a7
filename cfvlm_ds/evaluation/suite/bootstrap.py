"""Confidence intervals for metrics, and for differences between two models. A metric can be any function of items and their scores.

Intervals for a single model come from a bootstrap. Items of a cluster, such as all items about one picture, are not independent, so they
are drawn together. Draw k depends only on the seed and k, so the draws can be divided among ranks. Percentile intervals from few clusters
are too narrow, so they are not computed for fewer than ``FEWEST_DRAWN`` clusters. Two models are compared by a permutation test, which
exchanges their answers to whole clusters and is exact for any number of clusters.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from cfvlm_ds.core.distributed import ProgressBarrier, World, gather_objects
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.evaluation.benchmarks.base import Judged, Metrics, Outcome, Values, clusters_of, judged

Interval = tuple[float, float]
LEVEL, SEED = 0.95, 0
FEWEST_DRAWN = 30
"""Minimum number of clusters for a bootstrap. In simulations, intervals from 30 clusters contain the true share in 92 to 96 % of cases,
from 10 clusters in 66 to 96 %, and from 6 clusters in 45 to 97 %."""
MOST_DRAWS, LEAST_DRAWS = 1000, 200
_ITEMS_OF_ALL = 10_000_000  # maximum number of items x draws; large benchmarks get fewer draws


def draws_for(num_items: int) -> int:
    """Return the default number of draws for ``num_items`` items."""
    return max(LEAST_DRAWS, min(MOST_DRAWS, _ITEMS_OF_ALL // max(1, num_items)))


def draw_of(members: Sequence[Sequence[int]], k: int) -> list[tuple[int, int]]:
    """Draw whole clusters with replacement, and return draw ``k`` as pairs (item index, copy). ``members`` holds the item indices of each
    cluster. ``copy`` is 0 the first time that the item's cluster is drawn, 1 the second time, and so on.
    """
    generator = random.Random(f"{SEED}/{k}")
    copies = [0] * len(members)
    numbers = []
    for place in generator.choices(range(len(members)), k=len(members)):
        numbers += [(number, copies[place]) for number in members[place]]
        copies[place] += 1
    return numbers


def values_of(metrics: Metrics, table: Sequence[Judged], members: Sequence[Sequence[int]], k: int) -> Values:
    """Return the metrics on bootstrap draw ``k`` of the table."""
    return metrics([_copy(table[n], copy) if copy else table[n] for n, copy in draw_of(members, k)])


@lru_cache(1 << 16)
def _copy(judged: Judged, copy: int) -> Judged:
    return replace(judged, draw=copy)


def exchanges(members: Sequence[Sequence[int]], draws: int) -> Iterator[set[int]]:
    """Yield the sets of item indices for which two models exchange their answers in a permutation test. A set consists of whole clusters;
    the first set is empty.

    The other sets cover all choices of clusters or, if there are more than ``draws`` choices, ``draws`` random ones. The first cluster is
    never exchanged, because exchanging the complement of a set instead would only reverse the sign of the difference.
    """
    rest = members[1:]
    ways: Iterator[Sequence[bool]] = itertools.product((False, True), repeat=len(rest))
    if 2 ** len(rest) > draws:
        generator = random.Random(f"{SEED}/exchanges")
        ways = iter([(False,) * len(rest), *(generator.choices((False, True), k=len(rest)) for _ in range(draws))])
    for way in ways:
        yield {number for cluster, exchanged in zip(rest, way, strict=True) if exchanged for number in cluster}


def drawn_together(
    world: World, outcomes: Sequence[Outcome], metrics: Metrics, draws: int | None, label: str, barrier: ProgressBarrier
) -> list[Values]:
    """Return the metrics of each bootstrap draw, in order, on every rank. Return [] if there are too few clusters.

    The draws are divided among the ranks. A rank that finishes early waits for as long as any other is still making progress.
    """
    members, table = clusters_of(outcome.item for outcome in outcomes), judged(outcomes)["seen"]
    draws = draws_for(len(outcomes)) if draws is None else draws
    if len(members) < FEWEST_DRAWN:
        return []
    local: dict[int, Values] = {}
    progress = Progress(world.say, f"{label}: bootstrap", draws, "draws")
    for k in range(world.rank, draws, world.size):
        local[k] = values_of(metrics, table, members, k)
        progress.advance(world.size)
        barrier.alive()
    barrier.meet()
    every: dict[int, Values] = {}
    for part in gather_objects(local, world):
        every |= part
    return [every[k] for k in range(draws)]


def interval(values: Sequence[float]) -> Interval:
    """Return the central interval that contains the fraction ``LEVEL`` of the values. Its bounds are interpolated linearly."""
    low, high = np.quantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)).tolist()
    return low, high


def intervals(drawn: Sequence[Values]) -> dict[str, Interval]:
    """Return the interval of each metric that is defined in every draw. Metrics with the same value in all draws, such as 100 %, are left
    out.
    """
    names = [name for name in drawn[0] if not any(math.isnan(values.get(name, math.nan)) for values in drawn)] if drawn else []
    spans = {name: interval([values[name] for values in drawn]) for name in names}
    return {name: span for name, span in spans.items() if span[0] < span[1]}


def exchange_intervals(differences: Sequence[Values], names: Sequence[str]) -> dict[str, Interval]:
    """Return intervals for the differences between two models. ``differences`` contains the observed differences, followed by those
    after each exchange.

    As in an exact test, an interval excludes 0 if at most 5 % of the exchanges give a difference at least as large as the observed one. The
    metrics are tested jointly (max-T of Westfall and Young): for two equally good models, all intervals contain 0 in 95 % of cases.
    """
    scales = {name: math.sqrt(sum(difference[name] ** 2 for difference in differences) / len(differences)) for name in names}
    units = {name: [round(difference[name] / scale, 9) for difference in differences] for name, scale in scales.items() if scale > 1e-9}
    largest = sorted(max(map(abs, values)) for values in zip(*units.values(), strict=True)) or [0.0]
    most = largest[len(largest) - 1 - int((1 - LEVEL) * len(largest))]
    return dict.fromkeys(names, (0.0, 0.0)) | {
        name: ((values[0] - most) * scales[name], (values[0] + most) * scales[name]) for name, values in units.items()
    }
