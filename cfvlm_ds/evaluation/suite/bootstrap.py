"""Confidence intervals of metrics that are any functions of judged items: a bootstrap that draws clusters, such as all items of a picture.

Draw k is a function of the seed and k alone, so that ranks can share the draws, and so that two models are compared on the same ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from cfvlm_ds.core.distributed import Patience, World, gather_objects
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.evaluation.benchmarks.base import Judged, Values

Metrics = Callable[[Sequence[Judged]], Values]
Interval = tuple[float, float]
LEVEL = 0.95
MOST_DRAWS, LEAST_DRAWS = 1000, 200
_ITEMS_OF_ALL = 10_000_000  # of all draws together: a benchmark of fifty thousand items has fewer draws


def draws_for(num_items: int) -> int:
    """How many draws a benchmark of so many items gets where nobody says."""
    return max(LEAST_DRAWS, min(MOST_DRAWS, _ITEMS_OF_ALL // max(1, num_items)))


class Bootstrap:
    """Draws of whole clusters with replacement, of one table or of several side by side.

    Args:
        clusters: the cluster of each item, in the tables' order.
        seed: of the draws.
    """

    def __init__(self, clusters: Sequence[str], seed: int = 0) -> None:
        found: dict[str, list[int]] = {}
        for number, name in enumerate(clusters):
            found.setdefault(name, []).append(number)
        self._members, self._seed = list(found.values()), seed

    @property
    def clusters(self) -> int:
        """How many there are."""
        return len(self._members)

    def draw(self, k: int) -> list[tuple[int, int]]:
        """(item, which of its copies in this draw it is) of draw ``k``."""
        chance = random.Random(f"{self._seed}/{k}")
        copies = [0] * len(self._members)
        found = []
        for place in chance.choices(range(len(self._members)), k=len(self._members)):
            found += [(number, copies[place]) for number in self._members[place]]
            copies[place] += 1
        return found

    def values(self, metrics: Metrics, tables: Sequence[Sequence[Judged]], draws: Sequence[int]) -> list[list[Values]]:
        """For each draw the metrics of each table on it."""
        known: list[dict[tuple[int, int], Judged]] = [{} for _ in tables]

        def copy(which: int, at: tuple[int, int]) -> Judged:
            if not at[1]:
                return tables[which][at[0]]
            if at not in known[which]:
                known[which][at] = tables[which][at[0]].copy(at[1])
            return known[which][at]

        return [[metrics([copy(which, at) for at in drawn]) for which in range(len(tables))] for drawn in map(self.draw, draws)]


def drawn_together(
    world: World, bootstrap: Bootstrap, metrics: Metrics, table: Sequence[Judged], draws: int, label: str, patience: Patience
) -> list[Values]:
    """The metrics of each draw, in order, on every rank; ranks share the draws, and wait as long as one of them makes progress."""
    found: dict[int, Values] = {}
    progress = Progress(world.say, f"{label}: bootstrap", draws, "draws")
    for k in range(world.rank, draws, world.size):
        found[k] = bootstrap.values(metrics, [table], [k])[0][0]
        progress.advance(world.size)
        patience.alive()
    patience.meet()
    every: dict[int, Values] = {}
    for part in gather_objects(found, world):
        every |= part
    return [every[k] for k in range(draws)]


def interval(values: Sequence[float]) -> Interval | None:
    """The central ``LEVEL`` of the values, between neighbours in proportion; None of fewer than two."""
    ordered = sorted(value for value in values if value == value)
    if len(ordered) < 2:
        return None

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return at((1 - LEVEL) / 2), at((1 + LEVEL) / 2)


def intervals(drawn: Sequence[Values], clusters: int) -> dict[str, Interval]:
    """The interval of each metric over the draws that have it; none of a single cluster, of which every draw is the same."""
    if clusters < 2:
        return {}
    names = dict.fromkeys(name for values in drawn for name in values)
    found = {name: interval([values[name] for values in drawn if name in values]) for name in names}
    return {name: each for name, each in found.items() if each is not None}
