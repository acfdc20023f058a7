"""The balance of words: how often each edit is kept, so that the words of a set do not tell counterfactuals from originals.

A word that edits lead to more often than away from gives them away. Each word has a price; an edit from s to t is kept with probability
min(1, price of t / price of s), and the prices are such that every word comes as often as it goes, up to what chance would make of it.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cfvlm_ds.counterfactuals.propose.base import Proposal
from cfvlm_ds.counterfactuals.work_folder import seed_of

_ROUNDS, _CLOSE = 1000, 0.01
_DIGITS = 6  # of a price: the same on every machine

Numbers = npt.NDArray[Any]
Prices = Mapping[str, Mapping[str, float]]
"""Type -> word, or phrase, -> price."""


def moved(edit: Proposal) -> tuple[str, str] | None:
    """The words that go and those that come, without articles; None where words change places."""
    gone, come = ([word for word in side.split() if word not in ("a", "an")] for side in (edit.source, edit.target))
    return None if Counter(gone) == Counter(come) else (" ".join(gone), " ".join(come))


def share(edit: Proposal, prices: Prices) -> float:
    """How often an edit is kept: always where its type has no prices or words change places, never where a word has none."""
    if edit.type not in prices or (words := moved(edit)) is None:
        return 1.0
    gone, come = (prices[edit.type].get(word, 0.0) for word in words)
    return min(1.0, come / gone) if gone else 0.0


def drawn(edits: Sequence[Proposal], prices: Prices, most: int, *purpose: object) -> list[Proposal]:
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


def prices_of(captions: Iterable[Sequence[Proposal]], types: Sequence[str], most: int) -> dict[str, dict[str, float]]:
    """The prices for the edits of some captions of these types, of which at most ``most`` of a type are kept."""
    words: dict[tuple[str, str], int] = {("", ""): 0}  # which comes and goes where words change places
    gone, come, groups = array("l"), array("l"), array("l")
    number = 0
    for edits in captions:
        for kind in types:
            for edit in edits:
                if edit.type == kind:
                    pair = moved(edit)
                    for listed, word in zip((gone, come), pair or ("", ""), strict=True):
                        listed.append(words.setdefault((kind if pair else "", word), len(words)))
                    groups.append(number)
            number += 1
    logs = _balanced(*(np.array(each, np.int64) for each in (gone, come, groups)), len(words), most)
    prices: dict[str, dict[str, float]] = {kind: {} for kind in types}
    for (kind, word), log in zip(words, logs.tolist(), strict=True):
        if kind:
            prices[kind][word] = float(f"{math.exp(log):.{_DIGITS}g}")
    return prices


def _balanced(gone: Numbers, come: Numbers, groups: Numbers, words: int, most: int) -> Numbers:
    """Logarithms of prices by which no word comes oftener than it goes, nor the reverse, by more than one standard deviation of a count."""
    logs = np.zeros(words)
    for _ in range(_ROUNDS if len(gone) else 0):
        kept = np.exp(np.minimum(0.0, logs[come] - logs[gone]))
        kept *= np.minimum(1.0, most / np.maximum(np.bincount(groups, kept), 1e-9))[groups]
        into, out = (np.bincount(side, kept, words) for side in (come, gone))
        surplus, chance = into - out, np.sqrt(into + out)
        excess = np.sign(surplus) * np.maximum(0.0, np.abs(surplus) - chance)
        if np.abs(excess).max() < _CLOSE:
            break
        logs -= excess / np.maximum(into + out, 1e-9)
    return logs
