"""Mixtures of sources. The source at each position in the stream of groups is computed from the position alone.

The stream is divided into windows of 1,000 draws. Each source gets its share of the 1,000 draws, rounded down or up. The set of sources
whose share is rounded up varies from window to window, so every source has its exact share in the long run (systematic sampling with a
start that advances by the golden ratio). Within a window, the draws of a source are evenly spaced. The result does not depend on the number
of ranks, and any position can be computed directly, because the number of draws before a window has a closed form.

Shapes: S sources, W windows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.sequences import Lazy
from cfvlm_ds.data import permutation
from cfvlm_ds.data.permutation import COMPUTED, TOGETHER, RowsTogether, permuted

WINDOW = 1000
"""Number of draws in a window. In every window, each source gets its share to within one draw."""
_TURN = 0x9E3779B97F4A7C15  # fraction of the golden ratio times 2**64; its multiples are evenly spaced on the circle
_CIRCLE = 1 << 64
_KEPT = 1 << 10  # cached windows


@dataclass(frozen=True)
class Draws:
    """Order of the draws from the sources.

    Args:
        shares: each source's share of the draws; the sum is 1.
    """

    shares: tuple[Fraction, ...]

    def at(self, start: int, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """For each of ``count`` stream positions from ``start``, return the source and the number of earlier draws from this source."""
        sources, earlier = [], []
        stop = start + count
        for window in range(start // WINDOW, -(-stop // WINDOW)):
            low, high = max(start - window * WINDOW, 0), min(stop - window * WINDOW, WINDOW)
            source, place = _window(tuple(self.counts(window).tolist()))
            sources.append(source[low:high])
            earlier.append((self.before(window)[source] + place)[low:high])
        return np.concatenate([np.empty(0, np.int64), *sources]), np.concatenate([np.empty(0, np.int64), *earlier])

    def counts(self, window: int) -> npt.NDArray[np.int64]:
        """Return the number of draws from each source in a window, [S]; their sum is WINDOW."""
        return self.before(window + 1) - self.before(window)

    def before(self, window: int) -> npt.NDArray[np.int64]:
        """Return the number of draws from each source in all windows before ``window``, [S]."""
        return _before(self.shares, window)

    def place_of(self, source: int, number: int) -> int:
        """Return the stream position of draw ``number`` (counted from 0) of a source. The source must have a positive share."""
        low, high = 0, 1
        while int(self.before(high)[source]) <= number:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if int(self.before(middle)[source]) <= number else (low, middle)
        drawn, place = _window(tuple(self.counts(low).tolist()))
        return low * WINDOW + int(np.flatnonzero((drawn == source) & (place == number - int(self.before(low)[source])))[0])


@functools.lru_cache(maxsize=_KEPT)
def _before(shares: tuple[Fraction, ...], windows: int) -> npt.NDArray[np.int64]:
    """Return the number of draws from each source in the first ``windows`` windows, [S].

    In each window, the sources are adjacent intervals on the number line. An interval's length is the fractional part of share * WINDOW.
    The share is rounded up if the interval contains a whole number. From window to window, all intervals move by the golden ratio.
    """
    whole_draws = [int(share * WINDOW) for share in shares]
    offset = _floors(windows, _TURN, 0)
    passed, end, draws = 0, Fraction(0), list[int]()
    for share, count in zip(shares, whole_draws, strict=True):
        end += share * WINDOW - count
        turns, rest = divmod(int(end * _CIRCLE), _CIRCLE)
        reached = turns * windows + _floors(windows, _TURN, rest) - offset
        draws.append(count * windows + reached - passed)
        passed = reached
    return np.array(draws, np.int64)


def _floors(count: int, step: int, first: int) -> int:
    """Sum floor((step k + first) / _CIRCLE) over k from 0 to ``count`` - 1. The time is proportional to the number of bits in the
    arguments.
    """
    total, modulus = 0, _CIRCLE
    while count > 0:
        total += (count - 1) * count // 2 * (step // modulus) + count * (first // modulus)
        step, first = step % modulus, first % modulus
        count, first, step, modulus = *divmod(step * count + first, modulus), modulus, step
    return total


@functools.lru_cache(maxsize=_KEPT)
def _window(counts: tuple[int, ...]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For each position in a window, return the source, and the draw's index among the source's draws in this window. Draw k of n is placed
    at the fraction (k + 1/2) / n of the window.
    """
    source = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    place = np.concatenate([np.arange(count, dtype=np.int64) for count in counts])
    order = np.argsort((place + 0.5) / np.repeat(np.array(counts), counts), kind="stable")
    return source[order], place[order]


def shares_of(weights: Sequence[float | None], sizes: Sequence[int]) -> tuple[Fraction, ...]:
    """Use the sources' weights to compute each source's share of the draws. If no source has a weight, use their numbers of groups.

    ``DataConfig.train_sets`` rejects a mixture in which only some sources have a weight.
    """
    if all(weight is None for weight in weights):
        given = [Fraction(size) for size in sizes]
    else:
        given = [Fraction(repr(float(weight or 0))) for weight in weights]
    total = sum(given, Fraction(0))
    return tuple(weight / total for weight in given)


@dataclass(frozen=True)
class Order:
    """Stream of groups that a sampler divides into steps.

    A single data set is a sequence of epochs, each in its own permutation. In a mixture, every source goes through its own epochs.

    Args:
        sizes: number of groups in each source; groups are numbered source by source.
        shares: each source's share of the draws, summing to 1; empty for a single data set.
        seed: seed of the permutations.
        stop: condition for the end of a mixture's epoch: every source has been seen completely (``all_exhausted``), or at least one source
            has (``first_exhausted``).
        rows: for each source, the permutation that keeps the groups of a row together; None if every row is one group.
    """

    sizes: tuple[int, ...]
    shares: tuple[Fraction, ...]
    seed: int
    stop: Literal["all_exhausted", "first_exhausted"] = "all_exhausted"
    rows: tuple[RowsTogether | None, ...] = ()

    @property
    def draws(self) -> Draws:
        """Order of the draws from the sources."""
        return Draws(self.shares or (Fraction(1),))

    @functools.cached_property
    def length(self) -> int:
        """Number of positions in an epoch."""
        ends = [self.draws.place_of(source, size - 1) + 1 for source, size in enumerate(self.sizes) if self.draws.shares[source]]
        return max(ends) if self.stop == "all_exhausted" else min(ends)

    def at(self, start: int, count: int) -> list[int]:
        """Return the group indices at ``count`` stream positions, starting at ``start``."""
        sources, numbers = self.draws.at(start, count)
        groups = np.empty(count, np.int64)
        first = 0
        for source, size in enumerate(self.sizes):
            places, seed = np.flatnonzero(sources == source), f"{self.seed}/{source}" if self.shares else self.seed
            while len(places):  # a source's draw numbers are consecutive, so each epoch is one slice
                epoch, offset = divmod(int(numbers[places[0]]), size)
                stretch = places[: size - offset]
                if rows := self.rows[source] if self.rows else None:
                    drawn = rows.permuted(offset, len(stretch), seed, epoch)
                else:
                    drawn = permuted(offset, len(stretch), size, seed, epoch)
                groups[stretch] = first + np.array(drawn, np.int64)
                places = places[len(stretch) :]
            first += size
        return groups.tolist()

    def mean(self, values: npt.NDArray[Any]) -> Fraction:
        """Compute the mean of a per-group value over the stream."""
        parts = np.split(values, np.cumsum(self.sizes)[:-1])
        means = (Fraction(int(part.sum(dtype=np.int64)), len(part)) for part in parts)
        return sum((share * mean for share, mean in zip(self.draws.shares, means, strict=True)), Fraction(0))

    def epochs(self, seen: int) -> list[float]:
        """Return the number of passes over each source of a mixture in the first ``seen`` positions; [] for a single data set."""
        window, rest = divmod(seen, WINDOW)
        drawn = self.draws.before(window) + np.bincount(self.draws.at(window * WINDOW, rest)[0], minlength=len(self.sizes))
        return (drawn / np.array(self.sizes)).tolist() if self.shares else []

    def identity(self) -> dict[str, Any]:
        """Return everything that determines the group at each position, as JSON values."""
        mixed = {"sizes": list(self.sizes), "shares": [str(share) for share in self.shares]} if self.shares else {}
        kinds = [*[COMPUTED] * (max(self.sizes) > permutation.STORED), *[TOGETHER] * any(rows is not None for rows in self.rows)]
        return {"num_groups": sum(self.sizes), "seed": self.seed, **mixed, **({"order": "+".join(kinds)} if kinds else {})}


class MixedGroups(Lazy[CounterfactualGroup]):
    """Groups of all sources, one source after the other. Each group has the id ``SOURCE/ID``, and the name and objectives of its source.

    Args:
        sources: groups of each source.
        names: names of the sources.
        objectives: objectives that use each source's groups; None for all.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[CounterfactualGroup]],
        names: Sequence[str],
        objectives: Sequence[tuple[str, ...] | None],
    ) -> None:
        self.sources, self.names, self.objectives = list(sources), list(names), list(objectives)
        self._ends = np.cumsum([len(source) for source in sources])
        super().__init__(self._group, int(self._ends[-1]))

    def _group(self, index: int) -> CounterfactualGroup:
        source = int(self._ends.searchsorted(index, "right"))
        group = self.sources[source][index - (int(self._ends[source - 1]) if source else 0)]
        name = self.names[source]
        return replace(group, id=f"{name}/{group.id}", source=name, objectives=self.objectives[source])
