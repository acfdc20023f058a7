"""Word balancing: edits are kept with probabilities such that no single word distinguishes counterfactuals from originals.

A word that edits introduce more often than they remove reveals counterfactuals. Each word therefore has a price. An edit that replaces word
s with word t is kept with probability min(1, price of t / price of s). The prices are chosen so that, up to chance, every word is
introduced as often as it is removed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cfvlm_ds.counterfactuals.propose.edit_rules import Edit
from cfvlm_ds.counterfactuals.work_folder import seed_of

_ROUNDS, _CLOSE = 1000, 0.01
_DIGITS = 6  # significant digits of a price: few enough that all machines agree

Numbers = npt.NDArray[Any]


Prices = Mapping[str, Mapping[str, float]]
"""Edit type -> word or phrase -> price."""


def share(edit: Edit, prices: Prices) -> float:
    """Compute the probability of keeping an edit: 1 if its type has no prices or it only reorders words, and 0 if a word has no price."""
    if edit.type not in prices or not edit.gone:
        return 1.0
    gone, come = (prices[edit.type].get(word, 0.0) for word in (edit.gone, edit.come))
    return min(1.0, come / gone) if gone else 0.0


def drawn(edits: Sequence[Edit], prices: Prices, most: int, *purpose: object) -> list[Edit]:
    """Draw at most ``most`` of a caption's edits of one type. The edits' probabilities (see ``share``) are scaled down if their sum
    exceeds ``most``.
    """
    shares = [share(edit, prices) for edit in edits]
    scale = min(1.0, most / max(sum(shares), 1e-9))
    return [edits[k] for k in sampled([probability * scale for probability in shares], *purpose)]


def sampled(shares: Iterable[float], *purpose: object) -> list[int]:
    """Draw each index with its probability in ``shares``, by systematic sampling (Madow 1949, Annals of Mathematical Statistics 20).

    All draws share one random number. In any range of consecutive indices, the number of drawn indices equals the sum of their
    probabilities, up to rounding.
    """
    remaining, places = seed_of(*purpose) / 2.0**63, []
    for k, share in enumerate(shares):
        remaining -= share
        if remaining < 0:
            places.append(k)
            remaining += 1
    return places


def prices_of(captions: Iterable[Sequence[Edit]], types: Sequence[str], most: int) -> dict[str, dict[str, float]]:
    """Compute the prices of words from the edits of all captions. ``most`` limits the number of edits kept per caption and type."""
    moves, together = list[Move](), list[int]()
    for number, edits in enumerate(captions):
        for edit in edits:
            if edit.type in types:
                for word, direction in ((edit.gone, -1), (edit.come, 1)):
                    moves.append((len(together), (edit.type, word) if word else ("", ""), direction))
                together.append(number * len(types) + types.index(edit.type))

    def room(kept: Numbers) -> Numbers:
        """Return a factor for each edit, so that at most ``most`` edits with the same caption and type are kept on average."""
        return np.asarray(np.minimum(1.0, most / np.maximum(np.bincount(together, kept), 1e-9))[together])

    prices: dict[str, dict[str, float]] = {kind: {} for kind in types}
    for (kind, word), log in _balanced(moves, len(together), room).items():
        if kind:
            prices[kind][word] = float(f"{math.exp(log):.{_DIGITS}g}")
    return prices


Move = tuple[int, Any, int]
"""(index of an edit, word, direction). The direction is 1 if the edit introduces the word and -1 if it removes it."""


def _balanced(moves: Sequence[Move], edits: int, room: Callable[[Numbers], Numbers]) -> dict[Any, float]:
    """Compute the logarithm of each word's price. At these prices, the expected numbers of introductions and removals of a word differ by
    at most one standard deviation.
    """
    places = {word: place for place, word in enumerate(dict.fromkeys(word for _, word, _ in moves))}
    edit, word, direction = np.array([(number, places[name], side) for number, name, side in moves], int).reshape(-1, 3).T
    slow = 2 / max(int(np.max(np.bincount(edit), initial=0)), 2)  # step size: an edit's probability depends on all of its words
    logs = np.zeros(len(places))
    for _ in range(_ROUNDS if moves else 0):
        kept = np.exp(np.minimum(0.0, np.bincount(edit, direction * logs[word], edits)))
        kept *= room(kept)
        into, out = (np.bincount(word[direction == side], kept[edit[direction == side]], len(places)) for side in (1, -1))
        surplus = into - out
        excess = np.sign(surplus) * np.maximum(0.0, np.abs(surplus) - np.sqrt(into + out))
        if np.abs(excess).max() < _CLOSE:
            break
        logs -= slow * excess / np.maximum(into + out, 1e-9)
    return dict(zip(places, logs.tolist(), strict=True))
