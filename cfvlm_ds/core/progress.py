"""Progress lines for long tasks, with the rate and the time left. The first line appears after two seconds, and later lines every few
seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")
Say = Callable[[str], object]
"""A function that prints a line."""
Alive = Callable[[], object]
"""A function that is called repeatedly during a long task, as a sign of life. It can raise an exception to abort the task."""


def no_op(*given: object) -> None:
    """Do nothing. This is the default for optional ``Say`` and ``Alive`` arguments."""


FIRST_S, EVERY_S = 2.0, 5.0


def time_left(passed_s: float, done: float, total: float) -> str:
    """Estimate the time left from the rate so far, and format it as hours, minutes and seconds."""
    return str(timedelta(seconds=round(passed_s * max(total - done, 0) / done))) if done else "an unknown time"


class Progress:
    """Counter of finished work units that prints lines such as ``world with habits: 40 of 800 groups, 13.3 groups/s, 0:00:57 left``.

    Args:
        say: function that prints a line; World.say prints only on rank 0.
        what: name of the work.
        total: number of units; None if unknown.
        unit: name of the units, in the plural.
    """

    def __init__(self, say: Say, what: str, total: float | None, unit: str) -> None:
        self._say, self._what, self._total, self._unit = say, what, total, unit
        self._began = time.monotonic()
        self._next = self._began + FIRST_S
        self._done = 0.0

    def advance(self, units: float = 1) -> None:
        """Count units as done, and print a line if one is due."""
        self._done += units
        now = time.monotonic()
        if now >= self._next:
            self._next = now + EVERY_S
            rate = self._done / (now - self._began)
            speed = f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"
            if self._total is None:
                self._say(f"{self._what}: {_number(self._done)} {self._unit}, {speed} {self._unit}/s")
                return
            left = time_left(now - self._began, self._done, self._total)
            self._say(f"{self._what}: {_number(self._done)} of {_number(self._total)} {self._unit}, {speed} {self._unit}/s, {left} left")

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items; each counts as done when the next one is requested."""
        for item in items:
            yield item
            self.advance()


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.1f}"
