"""The balance of words: how often each edit is kept, so that the words of a set do not tell counterfactuals from originals.

A word that edits lead to more often than away from gives them away. Each word has a price; an edit from s to t is kept with probability
min(1, price of t / price of s), and the prices are such that every word comes as often as it goes, up to what chance would make of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from cfvlm_ds.counterfactuals.work_folder import seed_of

_ROUNDS, _CLOSE = 1000, 0.01
_DIGITS = 6  # of a price: the same on every machine

Numbers = npt.NDArray[Any]


class Edit(Protocol):
    """What is drawn: an edit of a type, with the words that go and those that come; both empty where words change places."""

    @property
    def type(self) -> str: ...
    @property
    def gone(self) -> str: ...
    @property
    def come(self) -> str: ...


E = TypeVar("E", bound=Edit)
Prices = Mapping[str, Mapping[str, float]]
"""Type -> word, or phrase, -> price."""


def share(edit: Edit, prices: Prices) -> float:
    """How often an edit is kept: always where its type has no prices or words change places, never where a word has none."""
    if edit.type not in prices or not edit.gone:
        return 1.0
    gone, come = (prices[edit.type].get(word, 0.0) for word in (edit.gone, edit.come))
    return min(1.0, come / gone) if gone else 0.0


def drawn(edits: Sequence[E], prices: Prices, most: int, *purpose: object) -> list[E]:
    """At most so many of a caption's edits of one type: each with its share, or less where all shares add up to more than ``most``. One
    number is drawn for all (systematic sampling; Madow 1949, Annals of Mathematical Statistics 20)."""
    shares = [share(edit, prices) for edit in edits]
    scale = min(1.0, most / max(sum(shares), 1e-9))
    place, found = seed_of(*purpose) / 2.0**63, []
    for edit, each in zip(edits, shares, strict=True):
        place -= each * scale
        if place < 0:
            found.append(edit)
            place += 1
    return found


def prices_of(captions: Iterable[Sequence[Edit]], types: Sequence[str], most: int) -> dict[str, dict[str, float]]:
    """The prices for the edits of some captions of these types, of which at most ``most`` of a type are kept."""
    words: dict[tuple[str, str], int] = {("", ""): 0}  # which comes and goes where words change places
    gone, come, together = list[int](), list[int](), list[int]()
    for number, edits in enumerate(captions):
        for edit in edits:
            if edit.type in types:
                for listed, word in ((gone, edit.gone), (come, edit.come)):
                    listed.append(words.setdefault((edit.type, word) if word else ("", ""), len(words)))
                together.append(number * len(types) + types.index(edit.type))
    logs = _balanced(np.array(gone), np.array(come), np.array(together), len(words), most)
    prices: dict[str, dict[str, float]] = {kind: {} for kind in types}
    for (kind, word), log in zip(words, logs.tolist(), strict=True):
        if kind:
            prices[kind][word] = float(f"{math.exp(log):.{_DIGITS}g}")
    return prices


def _balanced(gone: Numbers, come: Numbers, together: Numbers, words: int, most: int) -> Numbers:
    """Logarithms of prices by which no word comes oftener than it goes, nor the reverse, by more than one standard deviation of a count."""
    logs = np.zeros(words)
    for _ in range(_ROUNDS if len(gone) else 0):
        kept = np.exp(np.minimum(0.0, logs[come] - logs[gone]))
        kept *= np.minimum(1.0, most / np.maximum(np.bincount(together, kept), 1e-9))[together]
        into, out = (np.bincount(side, kept, words) for side in (come, gone))
        surplus, chance = into - out, np.sqrt(into + out)
        excess = np.sign(surplus) * np.maximum(0.0, np.abs(surplus) - chance)
        if np.abs(excess).max() < _CLOSE:
            break
        logs -= excess / np.maximum(into + out, 1e-9)
    return logs
