"""The order of an epoch: a permutation of all groups that depends on their number, the seed and the epoch alone.

Up to ``STORED`` groups it is drawn and kept. Beyond that it is computed where it is asked for, and takes no memory: a Feistel network over
the next power of two, whose results beyond the number of groups are sent through it again until they are below.

Where a row has several groups, such as the answers of a conversation, rows are permuted and their groups stay together: what they have in
common is then in a micro-batch once.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

STORED = 1_000_000
"""Groups up to which the permutation is stored: 8 MB an epoch."""

COMPUTED, TOGETHER = "feistel-1", "rows-1"
"""What the state of a sampler calls the order beyond, and that of rows of several groups; another name for another order."""

_BLOCK = 1 << 12  # places that are computed at once
_ROUNDS = 8  # four suffice for a pseudorandom permutation where the round functions are (Luby, Rackoff 1988)

Array = npt.NDArray[np.uint64]


def permuted(start: int, count: int, num_groups: int, seed: int | str, epoch: int) -> list[int]:
    """The groups at places ``start`` and following of an epoch; fewer where the epoch ends."""
    stop = min(start + count, num_groups)
    if num_groups <= STORED:
        return _stored(num_groups, seed, epoch)[start:stop].tolist()
    found: list[int] = []
    while start < stop:
        block, offset = divmod(start, _BLOCK)
        found += _computed(block, num_groups, seed, epoch)[offset : offset + stop - start]
        start = (block + 1) * _BLOCK
    return found


class RowsTogether:
    """An order of rows of several groups each.

    Args:
        firsts: [rows + 1] number of groups before each row, and in all.
        num_groups: those that count, if not all: the first ones.
    """

    def __init__(self, firsts: npt.NDArray[Any], num_groups: int | None = None) -> None:
        self.num_groups = int(firsts[-1]) if num_groups is None else num_groups
        self._firsts, self._rows = firsts, int(np.searchsorted(firsts, self.num_groups))
        self._before = functools.lru_cache(maxsize=2)(self._groups_before)  # of the epoch in progress, and where prefetching is
        self._kept = functools.lru_cache(maxsize=8)(self._block)

    def permuted(self, start: int, count: int, seed: int | str, epoch: int) -> list[int]:
        """As the function ``permuted``."""
        stop, found = min(start + count, self.num_groups), list[int]()
        before = self._before(seed, epoch)
        while start < stop:
            block = int(before.searchsorted(start, "right")) - 1
            first, sizes, ends = self._kept(block, seed, epoch)
            places = np.arange(start - before[block], min(stop - before[block], ends[-1]))
            rows = ends.searchsorted(places, "right")
            found += (first[rows] + places - (ends[rows] - sizes[rows])).tolist()
            start = int(before[block + 1])
        return found

    def _groups_before(self, seed: int | str, epoch: int) -> npt.NDArray[np.int64]:
        """Groups before each block of rows, and in all."""
        sizes = [int(self._block(block, seed, epoch)[2][-1]) for block in range(-(-self._rows // _BLOCK))]
        return np.cumsum([0, *sizes], dtype=np.int64)

    def _block(self, block: int, seed: int | str, epoch: int) -> tuple[npt.NDArray[np.int64], ...]:
        """First group, number of groups, and number up to its last, of each row of a block of the order."""
        rows = np.array(permuted(block * _BLOCK, _BLOCK, self._rows, seed, epoch), np.int64)
        first, end = (self._firsts[each].astype(np.int64) for each in (rows, rows + 1))
        sizes = np.minimum(end, self.num_groups) - first
        return first, sizes, np.cumsum(sizes)


_KEPT: dict[tuple[int, int | str], dict[int, torch.Tensor]] = {}
"""(number of groups, seed) -> the permutations of two epochs: the one in progress, and the one that prefetching has reached."""


def _stored(num_groups: int, seed: int | str, epoch: int) -> torch.Tensor:
    """[num_groups] int64. CPU generator whatever the default device, and seeds hashed so that (0, 1) and (1, 0) are unrelated."""
    kept = _KEPT.setdefault((num_groups, seed), {})
    if epoch not in kept:
        digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:4], "little"))
        while len(kept) > 1:
            del kept[next(iter(kept))]
        kept[epoch] = torch.randperm(num_groups, generator=generator, device="cpu")
    return kept[epoch]


@functools.lru_cache(maxsize=64)  # where the loop is, and where prefetching has reached, of each source
def _computed(block: int, num_groups: int, seed: int | str, epoch: int) -> list[int]:
    places = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, num_groups), dtype=np.uint64)
    return feistel(places, num_groups, seed, epoch).tolist()


def feistel(places: Array, num_groups: int, seed: int | str, epoch: int) -> Array:
    """Where each of the places 0 to ``num_groups`` - 1 goes; no two go to the same."""
    keys = np.frombuffer(hashlib.sha512(f"{seed}/{epoch}".encode()).digest(), "<u8")[:_ROUNDS]
    bits = max(2, (num_groups - 1).bit_length())
    found = _network(places, bits, keys)
    while len(beyond := np.flatnonzero(found >= num_groups)):
        found[beyond] = _network(found[beyond], bits, keys)
    return found


def _network(values: Array, bits: int, keys: Array) -> Array:
    """A bijection of the numbers of so many bits: in each round one part is changed by what the other one and a key say, and they change
    places."""
    low, high = bits // 2, bits - bits // 2
    left, right = values >> np.uint64(low), values & np.uint64((1 << low) - 1)
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) >> np.uint64(64 - high))
        low, high = high, low
    return (left << np.uint64(low)) | right


def _mixed(values: Array) -> Array:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): every bit of the result depends on every bit of the value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
