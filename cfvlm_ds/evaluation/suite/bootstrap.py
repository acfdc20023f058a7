"""Confidence intervals of metrics that are any functions of judged items, and of their differences between two models.

Items of a cluster, such as those of a picture, are not independent: they are drawn, and exchanged, together. One model has a bootstrap,
whose draw k is a function of the seed and k alone, so that ranks can share the draws. Percentiles of a bootstrap of few clusters are too
narrow: there are none below ``FEWEST_DRAWN`` clusters. Two models exchange their answers, a permutation test that is exact for any number.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence

import numpy as np

from cfvlm_ds.core.distributed import ProgressBarrier, World, gather_objects
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.evaluation.benchmarks.base import Judged, Metrics, Outcome, Values, judged

Interval = tuple[float, float]
LEVEL, SEED = 0.95, 0
LEAST_CLUSTERS = 6
"""Of n clusters the rarest of all exchanges has a share of 2 / 2^n, which is above 5 % where there are fewer."""
FEWEST_DRAWN = 30
"""Clusters of which intervals hold the true share in 92 to 96 % of simulations; of 10 it is in 66 to 96 %, of 6 in 45 to 97 %."""
MOST_DRAWS, LEAST_DRAWS = 1000, 200
_ITEMS_OF_ALL = 10_000_000  # of all draws together: a benchmark of fifty thousand items has fewer draws


def draws_for(num_items: int) -> int:
    """How many draws a benchmark of so many items gets where nobody says."""
    return max(LEAST_DRAWS, min(MOST_DRAWS, _ITEMS_OF_ALL // max(1, num_items)))


class Bootstrap:
    """Draws of whole clusters with replacement, and exchanges of whole clusters between two tables.

    Args:
        clusters: the cluster of each item, in the tables' order.
    """

    def __init__(self, clusters: Sequence[str]) -> None:
        found: dict[str, list[int]] = {}
        for number, name in enumerate(clusters):
            found.setdefault(name, []).append(number)
        self._members = list(found.values())

    @property
    def clusters(self) -> int:
        """How many there are."""
        return len(self._members)

    def draw(self, k: int) -> list[tuple[int, int]]:
        """(item, which of its copies in this draw it is) of draw ``k``."""
        chance = random.Random(f"{SEED}/{k}")
        copies = [0] * len(self._members)
        found = []
        for place in chance.choices(range(len(self._members)), k=len(self._members)):
            found += [(number, copies[place]) for number in self._members[place]]
            copies[place] += 1
        return found

    def values(self, metrics: Metrics, table: Sequence[Judged], k: int) -> Values:
        """The metrics of the table on draw ``k``."""
        return metrics([Judged(table[n].item, table[n].scores, draw=copy) if copy else table[n] for n, copy in self.draw(k)])

    def exchanges(self, draws: int) -> Iterator[set[int]]:
        """Items that two models exchange, whole clusters at a time: first none; then every choice of clusters, or ``draws`` at random where
        there are more. The first cluster always stays, since the opposite choice only turns the sign of a difference."""
        rest = self._members[1:]
        ways: Iterator[Sequence[bool]] = itertools.product((False, True), repeat=len(rest))
        if 2 ** len(rest) > draws:
            chance = random.Random(f"{SEED}/exchanges")
            ways = iter([(False,) * len(rest), *(chance.choices((False, True), k=len(rest)) for _ in range(draws))])
        for way in ways:
            yield {number for members, exchanged in zip(rest, way, strict=True) if exchanged for number in members}


def bootstrap_of(outcomes: Sequence[Outcome]) -> Bootstrap:
    """The bootstrap of some items: what shares a picture or a pair is drawn together."""
    return Bootstrap([each.item.cluster or each.item.id for each in outcomes])


def drawn_together(
    world: World, outcomes: Sequence[Outcome], metrics: Metrics, draws: int | None, label: str, barrier: ProgressBarrier
) -> list[Values]:
    """The metrics of each draw, in order, on every rank, none of too few clusters; ranks share the draws, and wait as long as one of them
    makes progress."""
    bootstrap, table = bootstrap_of(outcomes), judged(outcomes)["seen"]
    draws = draws_for(len(outcomes)) if draws is None else draws
    if bootstrap.clusters < FEWEST_DRAWN:
        return []
    found: dict[int, Values] = {}
    progress = Progress(world.say, f"{label}: bootstrap", draws, "draws")
    for k in range(world.rank, draws, world.size):
        found[k] = bootstrap.values(metrics, table, k)
        progress.advance(world.size)
        barrier.alive()
    barrier.meet()
    every: dict[int, Values] = {}
    for part in gather_objects(found, world):
        every |= part
    return [every[k] for k in range(draws)]


def interval(values: Sequence[float]) -> Interval | None:
    """The central ``LEVEL`` of the values, between neighbours in proportion; None of fewer than two."""
    found = [value for value in values if value == value]
    if len(found) < 2:
        return None
    low, high = np.quantile(found, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)).tolist()
    return low, high


def intervals(drawn: Sequence[Values]) -> dict[str, Interval]:
    """The interval of each metric that every draw has; none where all draws are the same, as of a model that is always right."""
    names = [name for name in drawn[0] if all(name in values for values in drawn)] if drawn else []
    found = {name: interval([values[name] for values in drawn]) for name in names}
    return {name: each for name, each in found.items() if each is not None and each[0] < each[1]}


def exchange_intervals(differences: Sequence[Values], names: Sequence[str]) -> dict[str, Interval]:
    """The intervals of differences between two models, the first of ``differences``, by those after exchanges.

    An interval excludes 0 where fewer than 5 % of the exchanges reach the difference: the size of an exact test. The metrics are tested
    together (max-T of Westfall and Young): of two models of equal worth all intervals hold 0 in 95 % of cases.
    """
    scales = {name: math.sqrt(sum(each[name] ** 2 for each in differences) / len(differences)) for name in names}
    units = {name: [round(each[name] / scale, 9) for each in differences] for name, scale in scales.items() if scale > 1e-9}
    largest = sorted(max(map(abs, values)) for values in zip(*units.values(), strict=True)) or [0.0]
    most = largest[len(largest) - 1 - int((1 - LEVEL) * len(largest))]
    return dict.fromkeys(names, (0.0, 0.0)) | {
        name: ((values[0] - most) * scales[name], (values[0] + most) * scales[name]) for name, values in units.items()
    }
