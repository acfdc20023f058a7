"""Permutations of the groups in an epoch. They depend only on the number of groups, the seed and the epoch.

For up to ``STORED`` groups, a permutation is drawn and kept in memory. For more groups, a Feistel network over the next power of two
computes entries on demand. An entry that is too large is passed through the network again until it is a valid group index.

If rows have several groups, such as the answers of a conversation, the rows are permuted and each row's groups stay together, so a
micro-batch encodes what they share only once.
"""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

STORED = 1_000_000
"""Maximum number of groups in a permutation that is stored (8 MB per epoch)."""

COMPUTED, TOGETHER = "feistel-1", "rows-1"
"""Versions of two orders, stored in a sampler's state: the computed order, and the order of rows with several groups. If an order changes,
so must its version.
"""

_BLOCK = 1 << 12  # positions computed at a time
_ROUNDS = 8  # four rounds suffice for a pseudorandom permutation if the round functions are pseudorandom (Luby, Rackoff 1988)

Array = npt.NDArray[np.uint64]


def permuted(start: int, count: int, num_groups: int, seed: int | str, epoch: int) -> list[int]:
    """Return the indices of ``count`` groups, starting at position ``start`` of an epoch; fewer at the end of the epoch."""
    stop = min(start + count, num_groups)
    if num_groups <= STORED:
        return _stored(num_groups, seed, epoch)[start:stop].tolist()
    groups: list[int] = []
    while start < stop:
        block, offset = divmod(start, _BLOCK)
        groups += _computed(block, num_groups, seed, epoch)[offset : offset + stop - start]
        start = (block + 1) * _BLOCK
    return groups


class RowsTogether:
    """Permutation that keeps the groups of a row together.

    Args:
        firsts: index of each row's first group, followed by the total number of groups, [rows + 1].
        num_groups: use only the first ``num_groups`` groups; None for all.
    """

    def __init__(self, firsts: npt.NDArray[Any], num_groups: int | None = None) -> None:
        self.num_groups = int(firsts[-1]) if num_groups is None else num_groups
        self._firsts, self._rows = firsts, int(np.searchsorted(firsts, self.num_groups))
        self._before = functools.lru_cache(maxsize=2)(self._groups_before)  # the training loop and prefetching may be in different epochs
        self._kept = functools.lru_cache(maxsize=8)(self._block)

    def permuted(self, start: int, count: int, seed: int | str, epoch: int) -> list[int]:
        """Return the indices of ``count`` groups, starting at position ``start`` of an epoch; fewer at the end of the epoch."""
        stop, groups = min(start + count, self.num_groups), list[int]()
        before = self._before(seed, epoch)
        while start < stop:
            block = int(before.searchsorted(start, "right")) - 1
            first, sizes, ends = self._kept(block, seed, epoch)
            places = np.arange(start - before[block], min(stop - before[block], ends[-1]))
            rows = ends.searchsorted(places, "right")
            groups += (first[rows] + places - (ends[rows] - sizes[rows])).tolist()
            start = int(before[block + 1])
        return groups

    def _groups_before(self, seed: int | str, epoch: int) -> npt.NDArray[np.int64]:
        """Return the number of groups before each block of rows, followed by the total number of groups."""
        sizes = [int(self._block(block, seed, epoch)[2][-1]) for block in range(-(-self._rows // _BLOCK))]
        return np.cumsum([0, *sizes], dtype=np.int64)

    def _block(self, block: int, seed: int | str, epoch: int) -> tuple[npt.NDArray[np.int64], ...]:
        """Return three arrays with a value for each row in a block of the permutation: its first group, its number of groups, and the
        cumulative number of groups.
        """
        rows = np.array(permuted(block * _BLOCK, _BLOCK, self._rows, seed, epoch), np.int64)
        first, end = (self._firsts[index].astype(np.int64) for index in (rows, rows + 1))
        sizes = np.minimum(end, self.num_groups) - first
        return first, sizes, np.cumsum(sizes)


_KEPT: dict[tuple[int, int | str], dict[int, torch.Tensor]] = {}
"""(number of groups, seed) -> epoch -> permutation, for the current epoch and the epoch that prefetching has reached."""


def _stored(num_groups: int, seed: int | str, epoch: int) -> torch.Tensor:
    """Return an epoch's permutation, drawn on the CPU, [num_groups] int64. Seed and epoch are hashed together, so the pairs (0, 1) and
    (1, 0) give unrelated permutations.
    """
    import torch  # a data check does not need it

    kept = _KEPT.setdefault((num_groups, seed), {})
    if epoch not in kept:
        digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:4], "little"))
        while len(kept) > 1:
            del kept[next(iter(kept))]
        kept[epoch] = torch.randperm(num_groups, generator=generator, device="cpu")
    return kept[epoch]


@functools.lru_cache(maxsize=64)  # the training loop and prefetching use different blocks of each source
def _computed(block: int, num_groups: int, seed: int | str, epoch: int) -> list[int]:
    places = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, num_groups), dtype=np.uint64)
    return feistel(places, num_groups, seed, epoch).tolist()


def feistel(places: Array, num_groups: int, seed: int | str, epoch: int) -> Array:
    """Return the entries at the positions ``places`` of an epoch's permutation of 0 to ``num_groups`` - 1."""
    keys = np.frombuffer(hashlib.sha512(f"{seed}/{epoch}".encode()).digest(), "<u8")[:_ROUNDS]
    bits = max(2, (num_groups - 1).bit_length())
    images = _network(places, bits, keys)
    while len(beyond := np.flatnonzero(images >= num_groups)):
        images[beyond] = _network(images[beyond], bits, keys)
    return images


def _network(values: Array, bits: int, keys: Array) -> Array:
    """Apply a bijection on ``bits``-bit numbers. Each round combines one half of the bits with a function of the other half and a key, and
    then swaps the halves.
    """
    low, high = bits // 2, bits - bits // 2
    left, right = values >> np.uint64(low), values & np.uint64((1 << low) - 1)
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) >> np.uint64(64 - high))
        low, high = high, low
    return (left << np.uint64(low)) | right


def _mixed(values: Array) -> Array:
    """Apply the finalizer of splitmix64 (Steele, Lea, Flood 2014). Every bit of the result depends on every bit of the input."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
