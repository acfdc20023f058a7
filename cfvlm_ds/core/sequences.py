"""Sequences whose items are made when they are asked for, so that a million of them take no memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, overload

T = TypeVar("T")


class Lazy(Sequence[T]):
    """``make(k)`` for every k of ``places``; a slice of it is another one."""

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
