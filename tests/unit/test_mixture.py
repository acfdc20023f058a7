"""The order of a mixture: every source has its share in every stretch, and any place can be asked for."""

from __future__ import annotations

import time
from fractions import Fraction
from typing import Literal

import numpy as np
import pytest

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.data import GroupSampler, permutation
from cfvlm_ds.data.mixture import PATTERN, Draws, Order, shares_of

WEIGHTS = [
    [1.0],
    [2.0, 1.0],
    [1.0, 1.0, 1.0],
    [0.7, 0.2, 0.05, 0.05],
    [665.0, 118.0, 3.0, 1e-3],
    [1.0, 7.0, 13.0, 0.11, 2.5, 9.0],
    [3.0, 0.0, 1.0],
    [9.0, *[1.0] * 9],
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_stretch_has_every_share(weights):
    """Counted over stretches that begin anywhere, against the bound of the docs; and in sum no source drifts from its share."""
    draws, shares = Draws(shares_of(weights, [1] * len(weights))), np.array(weights) / sum(weights)
    drawn = (draws.at(0, 200_000)[0][:, None] == np.arange(len(weights))).cumsum(0)
    further = shares * (len(weights) - 2)
    assert (np.abs(drawn - np.arange(1, 200_001)[:, None] * shares) <= 1 + further / 2).all()
    for length in (9, 10, 1000):
        assert (np.abs(drawn[length:] - drawn[:-length] - length * shares) <= 1.001 + further).all()


@pytest.mark.parametrize("weights", [*WEIGHTS, [1.0, 2e-9], [3.0, 4.0, 1.0 + 2**-40]], ids=str)
def test_shares_are_those_of_the_pattern_and_rounded_up_to_millionths(weights):
    draws = Draws(shares_of(weights, [1] * len(weights)))
    total = int(draws.counts.sum())
    for share, count in zip(draws.shares, draws.counts.tolist(), strict=True):
        assert 0 <= Fraction(count, 1 << 20) - share < Fraction(1, 1 << 20) or Fraction(count, total) == share
    assert np.bincount(draws.pattern[0], minlength=len(weights)).tolist() == draws.counts.tolist()
    assert total < (1 << 20) + len(weights)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_a_place_is_told_without_those_before_it(weights):
    """The number of a draw is that of a count from the start; any stretch is part of the whole; place_of is the inverse."""
    draws = Draws(shares_of(weights, [1] * len(weights)))
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


def test_shares_are_exact_and_by_size_where_no_source_has_a_weight():
    assert shares_of([0.1, 0.2], [5, 5]) == (Fraction(1, 3), Fraction(2, 3))
    assert shares_of([None, None], [30, 10]) == (Fraction(3, 4), Fraction(1, 4))


def test_far_places_and_rare_sources_take_no_time():
    """Ten million million draws on; the millionth draw of a source that has one in a million."""
    began = time.process_time()
    for weights in (*WEIGHTS, [1.0, 2e-9]):
        draws = Draws(shares_of(weights, [1] * len(weights)))
        for place in (0, 999_999, 10**9 + 7, 10**13 + 1):
            sources, numbers = draws.at(place, 3)
            found = [draws.place_of(source, number) for source, number in zip(sources.tolist(), numbers.tolist(), strict=True)]
            assert found == [place, place + 1, place + 2]
        for source, share in enumerate(draws.shares):
            if share:
                place = draws.place_of(source, 10**6)
                assert [part.tolist() for part in draws.at(place, 1)] == [[source], [10**6]]
    assert time.process_time() - began < 10


SIZES = (7, 3, 11)


def order(stop: Literal["all_exhausted", "first_exhausted"] = "all_exhausted", weights: tuple[float, ...] = (3, 1, 2)) -> Order:
    return Order(SIZES, shares_of(list(weights), SIZES), 5, stop)


def test_every_source_goes_through_all_of_its_groups_before_any_is_repeated():
    """A source's draws in epochs of its size: each a permutation of it, another one every time, and another source's is not the same."""
    drawn = order().at(0, 400)
    firsts = [0, 7, 10, 21]
    for source, size in enumerate(SIZES):
        own = [group - firsts[source] for group in drawn if firsts[source] <= group < firsts[source + 1]]
        epochs = [tuple(own[start : start + size]) for start in range(0, len(own) - size + 1, size)]
        assert len(epochs) > 10 and all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len(set(epochs)) > 3
    for start, count in ((0, 1), (17, 40), (399, 1), (123, 0)):
        assert order().at(start, count) == drawn[start : start + count]
    twins = Order((9, 9), shares_of([1, 1], (9, 9)), 0).at(0, 18)
    assert [group for group in twins if group < 9] != [group - 9 for group in twins if group >= 9]


@pytest.mark.parametrize("weights", [(3, 1, 2), (1, 1, 1), (1, 100, 1), (0.01, 5, 3)], ids=str)
def test_an_epoch_ends_with_the_first_or_the_last_source(weights):
    """Against a count of the stream from its start."""
    drawn, ends = order(weights=weights).at(0, 20_000), dict[int, int]()
    firsts, seen = [0, 7, 10, 21], [set[int](), set[int](), set[int]()]
    for place, group in enumerate(drawn, 1):
        source = next(k for k in range(3) if group < firsts[k + 1])
        seen[source].add(group)
        if len(seen[source]) == SIZES[source]:
            ends.setdefault(source, place)
    assert order("first_exhausted", weights).length == min(ends.values())
    assert order("all_exhausted", weights).length == max(ends.values()) and len(ends) == 3


def test_a_state_of_another_mixture_is_refused(monkeypatch):
    sizes = {"num_groups": sum(SIZES), "groups_per_micro_batch": 8, "gradient_accumulation_steps": 1}
    sampler = GroupSampler(**sizes, rank=0, world_size=1, seed=5, order=order())
    state = sampler.state_dict()
    assert {name: state[name] for name in ("sizes", "shares")} == {"sizes": [7, 3, 11], "shares": ["1/2", "1/6", "1/3"]}
    for change, name in (
        ({"shares": ["1/2", "1/3", "1/6"]}, "shares"),
        ({"sizes": [7, 11, 3]}, "sizes"),
        ({"seed": 6}, "seed"),
        ({"order": None}, "order"),
    ):
        with pytest.raises(DataError, match=rf"sampler has {name}.*resume"):
            sampler.load_state_dict(state | change)
    monkeypatch.setattr(permutation, "STORED", 10)
    assert order().identity()["order"] == f"{PATTERN}+{permutation.COMPUTED}", "as of one data set of so many groups"
