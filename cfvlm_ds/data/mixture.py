"""Several sources in one stream of groups: which source each place of the stream draws from, computed from the place alone.

The stream is cut into windows of 1,000 draws. A window takes from each source its share of 1,000, rounded down or up; who is rounded up
turns from window to window, so that in the long run every source has exactly its share (systematic sampling with a start that advances by
the golden ratio). Within a window a source's draws lie evenly. Nothing depends on the number of ranks, and any place can be asked for.

Shapes: S sources, W windows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from cfvlm_ds.core.errors import DataError

WINDOW = 1000
"""Draws in which every source has its share, to one."""
_TURN = 0x9E3779B97F4A7C15  # the golden ratio's fraction, of 2**64: multiples of it lie evenly on the circle
_CIRCLE = 1 << 64
_BLOCK = 1024  # windows counted at a time


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
        return self._counted(window // _BLOCK)[0][window % _BLOCK]

    def before(self, window: int) -> npt.NDArray[np.int64]:
        """[S] draws of each source in all windows before this one."""
        return self._counted(window // _BLOCK)[1][window % _BLOCK]

    def place_of(self, source: int, number: int) -> int:
        """The place in the stream of a source's draw ``number``, from 0. Raises ValueError for a source without a share."""
        if not self.shares[source]:
            raise ValueError(f"source {source} has no share")
        low, high = 0, int(number / self.shares[source]) // WINDOW + 3
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if int(self.before(middle)[source]) <= number else (low, middle)
        drawn, place = _window(tuple(self.counts(low).tolist()))
        return low * WINDOW + int(np.flatnonzero((drawn == source) & (place == number - int(self.before(low)[source])))[0])

    def _counted(self, block: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """([_BLOCK, S] draws in each window of a block, [_BLOCK, S] those in all windows before)."""
        counts = _counts(self.shares, block)
        return counts, _earlier(self.shares, block) + np.cumsum(counts, 0) - counts


@functools.lru_cache(maxsize=4)
def _counts(shares: tuple[Fraction, ...], block: int) -> npt.NDArray[np.int64]:
    whole = [int(share * WINDOW) for share in shares]
    ends = [(sum(shares[: s + 1], Fraction(0)) * WINDOW - sum(whole[: s + 1])) * _CIRCLE for s in range(len(shares))]
    turns, rest = zip(*(divmod(int(end), _CIRCLE) for end in ends), strict=True)
    starts = np.arange(block * _BLOCK, (block + 1) * _BLOCK, dtype=np.uint64) * np.uint64(_TURN)  # modulo 2**64
    around = starts[:, None] + np.array(rest, np.uint64)
    reached = np.array(turns, np.int64) + (around < starts[:, None])
    return np.array(whole, np.int64) + np.diff(reached, axis=1, prepend=0)


_TOTALS: dict[tuple[Fraction, ...], list[npt.NDArray[np.int64]]] = {}
"""Shares -> draws of each source before each block, as far as they have been asked for."""


def _earlier(shares: tuple[Fraction, ...], block: int) -> npt.NDArray[np.int64]:
    totals = _TOTALS.setdefault(shares, [np.zeros(len(shares), np.int64)])
    while len(totals) <= block:
        totals.append(totals[-1] + _counts(shares, len(totals) - 1).sum(0))
    return totals[block]


@functools.lru_cache(maxsize=1 << 10)
def _window(counts: tuple[int, ...]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(source, its how many-th draw of the window) of each place of a window: the k-th of n draws lies at (k + 1/2) / n."""
    source = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    place = np.concatenate([np.arange(count, dtype=np.int64) for count in counts])
    order = np.argsort((place + 0.5) / np.repeat(np.array(counts), counts), kind="stable")
    return source[order], place[order]


def shares_of(weights: Sequence[float | None], sizes: Sequence[int], names: Sequence[str]) -> tuple[Fraction, ...]:
    """The share of draws of each source: by weight, or by number of groups where none has a weight.

    Raises DataError where some have a weight and others have none.
    """
    if all(weight is None for weight in weights):
        given = [Fraction(size) for size in sizes]
    elif without := [name for name, weight in zip(names, weights, strict=True) if weight is None]:
        raise DataError(f"data.train: source {without[0]!r} has no weight and others have; give each a weight, or none")
    else:
        given = [Fraction(repr(float(weight or 0))) for weight in weights]
    total = sum(given, Fraction(0))
    return tuple(each / total for each in given)
