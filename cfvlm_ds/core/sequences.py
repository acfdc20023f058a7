"""Sequence utilities: lazy sequences, common prefixes, and a threaded map with limited look-ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar, overload

T = TypeVar("T")
R = TypeVar("R")


class Lazy(Sequence[T]):
    """Sequence of the items ``make(k)`` for every index k in ``places``. Items are created on access, and slices are lazy as well."""

    def __init__(self, make: Callable[[int], T], places: range | int) -> None:
        self._make, self._places = make, range(places) if isinstance(places, int) else places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...

    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        return Lazy(self._make, self._places[index]) if isinstance(index, slice) else self._make(self._places[index])


def shared_start(one: Sequence[T], other: Sequence[T]) -> int:
    """Return the length of the longest common prefix of two sequences, for instance of words."""
    return next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def differing(one: Sequence[T], other: Sequence[T]) -> tuple[slice, slice]:
    """Return one slice per sequence, which leaves out the common prefix and then the common suffix of the rest."""
    first = shared_start(one, other)
    last = shared_start(one[first:][::-1], other[first:][::-1])
    return slice(first, len(one) - last), slice(first, len(other) - last)


def side_by_side(function: Callable[[T], R], items: Iterator[T], threads: int, ahead: int) -> Iterator[tuple[T, R]]:
    """Yield each item and the result of ``function`` for it, in order, while threads compute the next ``ahead`` results."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque((item, pool.submit(function, item)) for item in islice(items, ahead))
        try:
            while waiting:
                item, answer = waiting.popleft()
                result = answer.result()
                waiting.extend((following, pool.submit(function, following)) for following in islice(items, 1))
                yield item, result
        finally:
            pool.shutdown(cancel_futures=True)
