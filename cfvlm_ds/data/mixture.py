"""Mixtures of sources. The source at each position in the stream of groups is computed from the position alone.

The stream repeats a pattern of at most about 2**20 draws. Each source has its share of the draws in the pattern, evenly spaced. The stream
does not depend on the number of ranks.

Shapes: S sources, L draws in the pattern.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cfvlm_ds.core.groups import CounterfactualGroup, Groups
from cfvlm_ds.core.sequences import Lazy
from cfvlm_ds.data import permutation
from cfvlm_ds.data.permutation import COMPUTED, TOGETHER, RowsTogether, permuted

LONGEST = 1 << 20
"""Maximum length of the pattern for exact shares. Shares that need a longer pattern are rounded up to multiples of about one millionth."""
PATTERN = "pattern-1"
"""Version of the algorithm that orders a mixture, stored in a sampler's state. If the order changes, the version must change."""

Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Draws:
    """Order of the draws from the sources.

    Args:
        shares: each source's share of the draws, summing to 1.
    """

    shares: tuple[Fraction, ...]

    @functools.cached_property
    def counts(self) -> Array:
        """Number of draws from each source in the pattern, [S]."""
        length = min(math.lcm(*(share.denominator for share in self.shares)), LONGEST)
        return np.array([math.ceil(share * length) for share in self.shares])

    @functools.cached_property
    def pattern(self) -> tuple[Array, Array]:
        """Source of each draw in the pattern, [L], and the number of earlier draws from this source, [L]. Draw k (counted from 0) of a
        source with n draws is placed at the fraction (k + 1/2) / n of the pattern.
        """
        source = np.repeat(np.arange(len(self.counts)), self.counts)
        earlier = np.concatenate([np.arange(count) for count in self.counts])
        order = np.argsort((earlier + 0.5) / self.counts[source], kind="stable")
        return source[order], earlier[order]

    def at(self, start: int, count: int) -> tuple[Array, Array]:
        """Return the source at each of ``count`` stream positions from ``start``, and the number of earlier draws from this source."""
        turns, places = np.divmod(np.arange(start, start + count), len(self.pattern[0]))
        source, earlier = (part[places] for part in self.pattern)
        return source, turns * self.counts[source] + earlier

    def place_of(self, source: int, number: int) -> int:
        """Return the stream position of draw ``number`` (counted from 0) of a source. The source must have a positive share."""
        turns, rest = divmod(number, int(self.counts[source]))
        return turns * len(self.pattern[0]) + int(np.flatnonzero(self.pattern[0] == source)[rest])


def shares_of(weights: Sequence[float | None], sizes: Sequence[int]) -> tuple[Fraction, ...]:
    """Compute each source's share of the draws from the sources' weights, or from their numbers of groups if no source has a weight.

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

    The stream of a single data set is a sequence of epochs, each a permutation of its groups. In a mixture, each source has its own epochs.

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

    @functools.cached_property
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
        counts, sums = self.draws.counts.tolist(), np.add.reduceat(values, np.cumsum([0, *self.sizes[:-1]]), dtype=np.int64).tolist()
        of_sources = (Fraction(count * total, size) for count, total, size in zip(counts, sums, self.sizes, strict=True))
        return sum(of_sources, Fraction(0)) / sum(counts)

    def epochs(self, seen: int) -> list[float]:
        """Return the number of passes over each source of a mixture in the first ``seen`` positions; [] for a single data set."""
        turns, rest = divmod(seen, len(self.draws.pattern[0]))
        drawn = turns * self.draws.counts + np.bincount(self.draws.pattern[0][:rest], minlength=len(self.sizes))
        return (drawn / np.array(self.sizes)).tolist() if self.shares else []

    def identity(self) -> dict[str, Any]:
        """Return everything that determines the group at each position, as JSON values."""
        mixed = {"sizes": list(self.sizes), "shares": [str(share) for share in self.shares]} if self.shares else {}
        kinds = [
            *[PATTERN] * bool(self.shares),
            *[COMPUTED] * (max(self.sizes) > permutation.STORED),
            *[TOGETHER] * any(rows is not None for rows in self.rows),
        ]
        return {"num_groups": sum(self.sizes), "seed": self.seed, **mixed, **({"order": "+".join(kinds)} if kinds else {})}


class MixedGroups(Lazy[CounterfactualGroup]):
    """Groups of all sources, source by source. Each group has the id ``SOURCE/ID``, and the name and objectives of its source.

    Args:
        sources: groups of each source.
        names: names of the sources.
        objectives: objectives that use each source's groups; None for all.
    """

    def __init__(
        self,
        sources: Sequence[Groups],
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
