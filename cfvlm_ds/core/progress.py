"""Progress of long work: a line with a rate and the time left, at first after two seconds, and then at most one every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")

FIRST_S, EVERY_S = 2.0, 5.0


def time_left(passed_s: float, done: float, total: float) -> str:
    """The time left in hours, minutes and seconds, at the rate so far."""
    return str(timedelta(seconds=round(passed_s * max(total - done, 0) / done))) if done else "an unknown time"


class Progress:
    """Counts finished units of work and prints lines such as ``scenes: 40 of 800 groups, 13.3 groups/s, 0:00:57 left``.

    Args:
        say: prints a line at once, as World.say does on rank 0 alone.
        what: is done.
        total: units in all; None where that is not known.
        unit: their name, in the plural.
        every_s: seconds from one line to the next, at least; to the first, at most ``FIRST_S``.
    """

    def __init__(self, say: Callable[[str], object], what: str, total: float | None, unit: str, every_s: float = EVERY_S) -> None:
        self._say, self._what, self._total, self._unit, self._every_s = say, what, total, unit, every_s
        self._began = time.monotonic()
        self._next = self._began + min(FIRST_S, every_s)
        self._done = 0.0

    def advance(self, units: float = 1) -> None:
        """Count more units as done."""
        self._done += units
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._every_s
            rate = self._done / (now - self._began)
            speed = f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"
            if self._total is None:
                self._say(f"{self._what}: {_number(self._done)} {self._unit}, {speed} {self._unit}/s")
                return
            left = time_left(now - self._began, self._done, self._total)
            self._say(f"{self._what}: {_number(self._done)} of {_number(self._total)} {self._unit}, {speed} {self._unit}/s, {left} left")

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The items; each counts as done when the next one is asked for."""
        for item in items:
            yield item
            self.advance()


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.1f}"
