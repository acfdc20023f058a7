"""Several sources in one stream of groups: which source each place of the stream draws from, computed from the place alone.

The stream is cut into windows of 1,000 draws. A window takes from each source its share of 1,000, rounded down or up; who is rounded up
turns from window to window, so that in the long run every source has its share (systematic sampling with a start that advances by the
golden ratio). Within a window a source's draws lie evenly. Nothing depends on the number of ranks, and any place can be asked for: what
was drawn before a window is a sum in closed form, not a count.

Shapes: S sources, W windows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.sequences import Lazy
from cfvlm_ds.data import permutation
from cfvlm_ds.data.permutation import COMPUTED, TOGETHER, RowsTogether, permuted

WINDOW = 1000
"""Draws in which every source has its share, to one."""
_TURN = 0x9E3779B97F4A7C15  # the golden ratio's fraction, of 2**64: multiples of it lie evenly on the circle
_CIRCLE = 1 << 64
_LEAST = Fraction(1, 10**9)  # of a share: places are numbers of 64 bits
_KEPT = 1 << 10  # windows that are remembered


@dataclass(frozen=True)
class Draws:
    """The order in which sources are drawn from.

    Args:
        shares: of the draws, one for each source; they add up to 1.
    """

    shares: tuple[Fraction, ...]

    def at(self, start: int, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(source, how many draws of that source come before) of ``count`` places of the stream from ``start`` on."""
        sources, earlier = [], []
        stop = start + count
        for window in range(start // WINDOW, -(-stop // WINDOW)):
            low, high = max(start - window * WINDOW, 0), min(stop - window * WINDOW, WINDOW)
            source, place = _window(tuple(self.counts(window).tolist()))
            sources.append(source[low:high])
            earlier.append((self.before(window)[source] + place)[low:high])
        return np.concatenate([np.empty(0, np.int64), *sources]), np.concatenate([np.empty(0, np.int64), *earlier])

    def counts(self, window: int) -> npt.NDArray[np.int64]:
        """[S] draws of each source in a window; WINDOW together."""
        return self.before(window + 1) - self.before(window)

    def before(self, window: int) -> npt.NDArray[np.int64]:
        """[S] draws of each source in all windows before this one."""
        return _before(self.shares, window)

    def place_of(self, source: int, number: int) -> int:
        """The place in the stream of a source's draw ``number``, from 0. Raises ValueError for a source without a share."""
        if not self.shares[source]:
            raise ValueError(f"source {source} has no share")
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
    """[S] draws of each source in so many windows.

    In every window the sources lie one after the other on a circle of 1, each as long as what its share of WINDOW is beyond a whole number,
    and behind a start that advances by the golden ratio. A source is rounded up as often as its part of the circle passes a whole number.
    """
    whole = [int(share * WINDOW) for share in shares]
    none = _floors(windows, _TURN, 0)
    passed, end, found = 0, Fraction(0), list[int]()
    for share, count in zip(shares, whole, strict=True):
        end += share * WINDOW - count
        turns, rest = divmod(int(end * _CIRCLE), _CIRCLE)
        reached = turns * windows + _floors(windows, _TURN, rest) - none
        found.append(count * windows + reached - passed)
        passed = reached
    return np.array(found, np.int64)


def _floors(count: int, step: int, first: int) -> int:
    """The sum of floor((step k + first) / _CIRCLE) over k from 0 to ``count`` - 1, in as many operations as the numbers have bits."""
    total, modulus = 0, _CIRCLE
    while count > 0:
        total += (count - 1) * count // 2 * (step // modulus) + count * (first // modulus)
        step, first = step % modulus, first % modulus
        count, first, step, modulus = *divmod(step * count + first, modulus), modulus, step
    return total


@functools.lru_cache(maxsize=_KEPT)
def _window(counts: tuple[int, ...]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(source, its how many-th draw of the window) of each place of a window: the k-th of n draws lies at (k + 1/2) / n."""
    source = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    place = np.concatenate([np.arange(count, dtype=np.int64) for count in counts])
    order = np.argsort((place + 0.5) / np.repeat(np.array(counts), counts), kind="stable")
    return source[order], place[order]


def shares_of(weights: Sequence[float | None], sizes: Sequence[int], names: Sequence[str]) -> tuple[Fraction, ...]:
    """The share of draws of each source: by weight, or by number of groups where none has a weight.

    Raises DataError where some have a weight and others have none, and for a share that no run would ever see.
    """
    if all(weight is None for weight in weights):
        given = [Fraction(size) for size in sizes]
    elif without := [name for name, weight in zip(names, weights, strict=True) if weight is None]:
        raise DataError(f"data.train: source {without[0]!r} has no weight and others have; give each a weight, or none")
    else:
        given = [Fraction(repr(float(weight or 0))) for weight in weights]
    total = sum(given, Fraction(0))
    for each, name in zip(given, names, strict=True):
        if 0 < each / total < _LEAST:
            raise DataError(f"data.train: source {name!r} has {float(each / total):.1g} of the draws, less than one in 1e9; leave it out")
    return tuple(each / total for each in given)


@dataclass(frozen=True)
class Order:
    """The stream of groups that a sampler cuts into steps: one data set, epoch after epoch, each in a permutation of its own; or a mixture,
    whose sources go through epochs of their own.

    Args:
        sizes: groups of each source; the groups of the sources follow each other.
        shares: of the draws, one for each source; they add up to 1. None at all for one data set.
        seed: of the permutations.
        stop: an epoch of the mixture ends when ``all_exhausted`` sources have been seen whole, or when the ``first_exhausted`` has.
        rows: of each source whose rows have several groups, which stay together; None for another.
    """

    sizes: tuple[int, ...]
    shares: tuple[Fraction, ...]
    seed: int
    stop: Literal["all_exhausted", "first_exhausted"] = "all_exhausted"
    rows: tuple[RowsTogether | None, ...] = ()

    @property
    def draws(self) -> Draws:
        """The order in which sources are drawn from."""
        return Draws(self.shares or (Fraction(1),))

    @functools.cached_property
    def length(self) -> int:
        """Places of an epoch."""
        ends = [self.draws.place_of(source, size - 1) + 1 for source, size in enumerate(self.sizes) if self.draws.shares[source]]
        return max(ends) if self.stop == "all_exhausted" else min(ends)

    def at(self, start: int, count: int) -> list[int]:
        """The groups at ``count`` places of the stream."""
        sources, numbers = self.draws.at(start, count)
        found = np.empty(count, np.int64)
        first = 0
        for source, size in enumerate(self.sizes):
            places, seed = np.flatnonzero(sources == source), f"{self.seed}/{source}" if self.shares else self.seed
            while len(places):  # a source's draws follow each other: one stretch of each of its epochs
                epoch, offset = divmod(int(numbers[places[0]]), size)
                stretch = places[: size - offset]
                if rows := self.rows[source] if self.rows else None:
                    drawn = rows.permuted(offset, len(stretch), seed, epoch)
                else:
                    drawn = permuted(offset, len(stretch), size, seed, epoch)
                found[stretch] = first + np.array(drawn, np.int64)
                places = places[len(stretch) :]
            first += size
        return found.tolist()

    def mean(self, values: npt.NDArray[Any]) -> Fraction:
        """What a place has on average of what each group has."""
        parts = np.split(values, np.cumsum(self.sizes)[:-1])
        means = (Fraction(int(part.sum(dtype=np.int64)), len(part)) for part in parts)
        return sum((share * mean for share, mean in zip(self.draws.shares, means, strict=True)), Fraction(0))

    def epochs(self, seen: int) -> list[float]:
        """Passes over each source of a mixture after so many places; none of one data set."""
        window, rest = divmod(seen, WINDOW)
        drawn = self.draws.before(window) + np.bincount(self.draws.at(window * WINDOW, rest)[0], minlength=len(self.sizes))
        return (drawn / np.array(self.sizes)).tolist() if self.shares else []

    def identity(self) -> dict[str, Any]:
        """What must be equal for a place to mean the same group; JSON."""
        mixed = {"sizes": list(self.sizes), "shares": [str(share) for share in self.shares]} if self.shares else {}
        kinds = [*[COMPUTED] * (max(self.sizes) > permutation.STORED), *[TOGETHER] * any(each is not None for each in self.rows)]
        return {"num_groups": sum(self.sizes), "seed": self.seed, **mixed, **({"order": "+".join(kinds)} if kinds else {})}


class MixedGroups(Sequence[CounterfactualGroup]):
    """The groups of all sources, one source after the other; each is named ``SOURCE/ID`` and carries its source and its objectives.

    Args:
        sources: groups of each.
        names: of the sources.
        objectives: those that the groups of a source count in; None for all.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[CounterfactualGroup]],
        names: Sequence[str],
        objectives: Sequence[tuple[str, ...] | None],
    ) -> None:
        self.sources, self.names, self.objectives = list(sources), list(names), list(objectives)
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, index: int) -> CounterfactualGroup: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[CounterfactualGroup]: ...

    def __getitem__(self, index: int | slice) -> CounterfactualGroup | Sequence[CounterfactualGroup]:
        if isinstance(index, slice):
            return Lazy(self._group, range(len(self))[index])
        return self._group(range(len(self))[index])

    def _group(self, index: int) -> CounterfactualGroup:
        source = int(self._ends.searchsorted(index, "right"))
        group = self.sources[source][index - (int(self._ends[source - 1]) if source else 0)]
        name = self.names[source]
        return replace(group, id=f"{name}/{group.id}", source=name, objectives=self.objectives[source])
