"""The order of a mixture: every source has its share in every window, and any place can be asked for."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.data.mixture import WINDOW, Draws, shares_of

WEIGHTS = [
    [1.0],
    [2.0, 1.0],
    [1.0, 1.0, 1.0],
    [0.7, 0.2, 0.05, 0.05],
    [665.0, 118.0, 3.0, 1e-3],
    [1.0, 7.0, 13.0, 0.11, 2.5, 9.0],
    [3.0, 0.0, 1.0],
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_window_has_every_share_to_one(weights: list[float]) -> None:
    """Counted by hand over 200 windows; and in sum no source drifts from its share by more than two."""
    draws = Draws(shares_of(weights, [1] * len(weights), "abcdef"[: len(weights)]))
    wanted = WINDOW * np.array(weights) / sum(weights)
    sources, _ = draws.at(0, 200 * WINDOW)
    counts = np.array([np.bincount(sources[k * WINDOW :][:WINDOW], minlength=len(weights)) for k in range(200)])
    assert np.abs(counts - wanted).max() < 1
    assert np.abs(counts.cumsum(0) - np.arange(1, 201)[:, None] * wanted).max() <= 2
    evenly = [abs(np.bincount(sources[k:][:WINDOW], minlength=len(weights)) - wanted).max() for k in range(0, 20_000, 37)]
    assert max(evenly) < 2  # also in windows that begin anywhere


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_a_place_is_told_without_those_before_it(weights: list[float]) -> None:
    """The number of a draw is that of a count from the start; any stretch is part of the whole; place_of is the inverse."""
    draws = Draws(shares_of(weights, [1] * len(weights), "abcdef"[: len(weights)]))
    sources, numbers = draws.at(0, 5000)
    seen = [0] * len(weights)
    for source, number in zip(sources.tolist(), numbers.tolist(), strict=True):
        assert number == seen[source]
        seen[source] += 1
    for start, count in ((0, 1), (999, 2), (1000, 1000), (3333, 1500), (4999, 1), (17, 0)):
        some, theirs = draws.at(start, count)
        assert (some == sources[start : start + count]).all() and (theirs == numbers[start : start + count]).all()
    for place in (0, 1, 999, 1000, 2718, 4999):
        assert draws.place_of(int(sources[place]), int(numbers[place])) == place
    for source, weight in enumerate(weights):
        if not weight:
            assert seen[source] == 0
            with pytest.raises(ValueError, match="no share"):
                draws.place_of(source, 0)


def test_shares_are_exact_and_by_size_where_no_source_has_a_weight() -> None:
    assert shares_of([0.1, 0.2], [5, 5], "ab") == (Fraction(1, 3), Fraction(2, 3))
    assert shares_of([None, None], [30, 10], "ab") == (Fraction(3, 4), Fraction(1, 4))
    with pytest.raises(DataError, match="source 'b' has no weight and others have"):
        shares_of([1, None], [5, 5], "ab")
