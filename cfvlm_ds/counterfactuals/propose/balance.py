"""The balance of words: how often each edit is kept, so that the words of a set do not tell counterfactuals from originals.

A word that edits lead to more often than away from gives them away. Each word has a price; an edit from s to t is kept with probability
min(1, price of t / price of s), and the prices are such that every word comes as often as it goes, up to what chance would make of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
    """Return at most so many of a caption's edits of one type: each with its share, or less where the shares add up to more than that."""
    shares = [share(edit, prices) for edit in edits]
    scale = min(1.0, most / max(sum(shares), 1e-9))
    return [edits[k] for k in sampled([each * scale for each in shares], *purpose)]


def sampled(shares: Iterable[float], *purpose: object) -> list[int]:
    """Return the places that are drawn, each with its share. One number is drawn for all, so that of any that follow each other as many are
    drawn as their shares add up to (systematic sampling; Madow 1949, Annals of Mathematical Statistics 20)."""
    place, found = seed_of(*purpose) / 2.0**63, []
    for k, each in enumerate(shares):
        place -= each
        if place < 0:
            found.append(k)
            place += 1
    return found


def prices_of(captions: Iterable[Sequence[Edit]], types: Sequence[str], most: int) -> dict[str, dict[str, float]]:
    """Return the prices for the edits of some captions of these types, of which at most ``most`` of a type are kept."""
    moves, together = list[Move](), list[int]()
    for number, edits in enumerate(captions):
        for edit in edits:
            if edit.type in types:
                for word, way in ((edit.gone, -1), (edit.come, 1)):
                    moves.append((len(together), (edit.type, word) if word else ("", ""), way))
                together.append(number * len(types) + types.index(edit.type))

    def room(kept: Numbers) -> Numbers:
        """Return which share of the edits of a caption and a type there is room for."""
        return np.asarray(np.minimum(1.0, most / np.maximum(np.bincount(together, kept), 1e-9))[together])

    prices: dict[str, dict[str, float]] = {kind: {} for kind in types}
    for (kind, word), log in balanced(moves, len(together), room)[0].items():
        if kind:
            prices[kind][word] = float(f"{math.exp(log):.{_DIGITS}g}")
    return prices


Move = tuple[int, Any, int]
"""An edit by its number, a word, and 1 where the word comes with it, -1 where it goes."""


def balanced(
    moves: Sequence[Move], edits: int, room: Callable[[Numbers], Numbers | float] = lambda kept: 1.0, exact: Collection[Any] = ()
) -> tuple[dict[Any, float], Numbers]:
    """Return the logarithm of each word's price, and the share with which each edit is kept: no word comes oftener than it goes, nor the
    reverse, by more than one standard deviation of a count, or where it is one of ``exact`` at all."""
    places = {word: place for place, word in enumerate(dict.fromkeys(word for _, word, _ in moves))}
    edit, word, way = np.array([(number, places[name], side) for number, name, side in moves], int).reshape(-1, 3).T
    tolerance = np.array([float(name not in exact) for name in places])
    slow = 2 / max(np.bincount(edit).max(initial=0), 2)  # an edit of many words is pulled by all of them
    logs, kept = np.zeros(len(places)), np.ones(edits)
    for _ in range(_ROUNDS if moves else 0):
        kept = np.exp(np.minimum(0.0, np.bincount(edit, way * logs[word], edits)))
        kept *= room(kept)
        into, out = (np.bincount(word[way == side], kept[edit[way == side]], len(places)) for side in (1, -1))
        surplus, chance = into - out, tolerance * np.sqrt(into + out)
        excess = np.sign(surplus) * np.maximum(0.0, np.abs(surplus) - chance)
        if np.abs(excess).max() < _CLOSE:
            break
        logs -= slow * excess / np.maximum(into + out, 1e-9)
    return dict(zip(places, logs.tolist(), strict=True)), kept
