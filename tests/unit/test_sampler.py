"""The sampler against a naive reference: one list of all epochs, cut into steps, dealt to ranks."""

from __future__ import annotations

import hashlib
import itertools
import re

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.data import GroupSampler, PackedSampler, permutation
from cfvlm_ds.data.mixture import Order
from cfvlm_ds.data.permutation import RowsTogether


def make(num_groups: int = 23, mb: int = 1, accumulation: int = 1, rank: int = 0, world: int = 1, seed: int = 3) -> GroupSampler:
    return GroupSampler(
        num_groups=num_groups,
        groups_per_micro_batch=mb,
        gradient_accumulation_steps=accumulation,
        rank=rank,
        world_size=world,
        seed=seed,
    )


def take(sampler: GroupSampler, count: int) -> list[list[int]]:
    return list(itertools.islice(sampler, count))


def stream(length: int, num_groups: int = 23, seed: int = 3) -> list[int]:
    """The first elements of the stream, as one rank with micro-batches of one sees them."""
    return [index for (index,) in take(make(num_groups, seed=seed), length)]


def test_permutations_are_pinned():
    # A change here breaks the resumption of every run under way.
    assert stream(20, num_groups=10, seed=0) == [9, 4, 1, 3, 2, 8, 6, 5, 7, 0, 3, 7, 6, 4, 9, 8, 0, 5, 2, 1]
    assert stream(10, num_groups=10, seed=1) == [6, 5, 3, 9, 8, 2, 1, 7, 0, 4]


def test_every_group_once_per_epoch_in_another_order():
    epochs = [stream(23 * 4)[start : start + 23] for start in range(0, 23 * 4, 23)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    # Neither another seed, nor another seed's later epoch: (seed 4, epoch 0) is not (seed 3, epoch 1).
    others = {tuple(stream(23, seed=seed)) for seed in (0, 1, 2, 4)}
    assert len(others) == 4 and not others & {tuple(epoch) for epoch in epochs}


def test_global_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = stream(50)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert stream(50) == first


@pytest.mark.parametrize("num_groups", [23, 5, 1])  # B is 16: 5 and 1 groups recur within one step
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_world_size_invariance(num_groups, world, accumulation):
    size, steps = 16, 7
    mb = size // (world * accumulation)
    elements = stream(size * steps, num_groups)
    ranks = [take(make(num_groups, mb, accumulation, rank, world), accumulation * steps) for rank in range(world)]
    for step in range(steps):
        expected = [[[] for _ in range(accumulation)] for _ in range(world)]
        for j, element in enumerate(elements[step * size : (step + 1) * size]):  # the documented rule, element by element
            expected[(j // mb) % world][j // (mb * world)].append(element)
        assert [micro[step * accumulation : (step + 1) * accumulation] for micro in ranks] == expected


def test_resume_on_another_world_keeps_the_position():
    saved = make(mb=3, accumulation=2, world=2)
    saved.advance()
    assert saved.samples_seen == 12 and saved.epoch == 12 / 23
    elements = stream(12 + 40)[12:]
    ranks = []
    for rank in range(4):  # four ranks and a step of 8: 12 is not a multiple of it
        sampler = make(mb=2, rank=rank, world=4)
        sampler.load_state_dict(saved.state_dict())
        ranks.append(take(sampler, 5))
    assert [index for micro in range(5) for rank in range(4) for index in ranks[rank][micro]] == elements


def test_state_of_other_data_is_refused():
    state = make().state_dict()
    assert state == {"samples_seen": 0, "num_groups": 23, "seed": 3}
    for bad, name in [
        (make(24).state_dict(), "num_groups 24"),
        (make(seed=4).state_dict(), "seed 4"),
        ({}, "num_groups None"),
    ]:
        sampler = make()
        sampler.advance()
        with pytest.raises(DataError, match=f"{name}.*resume"):
            sampler.load_state_dict(bad)
        assert sampler.samples_seen == 1


def test_steps_of_a_decimal_number_of_epochs():
    """Whole hundredths of 100 groups, and thousandths of 1000, as a person counts them; a part of a group is a group."""
    for hundredths in range(1, 301):
        assert make(100).num_steps(float(f"{hundredths / 100:.2f}")) == hundredths
    assert [make(1000, mb=7).num_steps(float(f"0.{n:03}")) for n in range(1, 1000)] == [-(-n // 7) for n in range(1, 1000)]
    assert [make(3).num_steps(share) for share in (1e-6, 0.3, 1 / 3, 0.34, 2 / 3, 1, 7 / 3)] == [1, 1, 1, 2, 2, 3, 7]


def test_data_loader_prefetch_does_not_move_the_position():
    def loader(sampler):
        data = list(range(23))
        return DataLoader(data, batch_sampler=sampler, num_workers=1, prefetch_factor=4, collate_fn=list)  # type: ignore[arg-type]

    whole = take(make(mb=2, accumulation=2), 2 * 10)
    running = make(mb=2, accumulation=2)
    seen = []
    for micro, batch in enumerate(loader(running), 1):
        seen.append(batch)
        if micro % 2 == 0:
            running.advance()
        if micro == 7:  # killed in the middle of step 4: three steps were consumed, and prefetching is well ahead
            break
    assert seen == whole[:7] and running.samples_seen == 12
    resumed = make(mb=2, accumulation=2)
    resumed.load_state_dict(running.state_dict())
    assert list(itertools.islice(loader(resumed), 14)) == whole[6:]


# More groups than a permutation is stored of ------------------------------------------------------------------------------------------


def naive_feistel(place: int, num_groups: int, seed: int, epoch: int) -> int:
    """The same network in whole numbers, a place at a time."""

    def mixed(value):
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    digest = hashlib.sha512(f"{seed}/{epoch}".encode()).digest()
    bits = max(2, (num_groups - 1).bit_length())
    while True:
        low, high = bits // 2, bits - bits // 2
        left, right = place >> low, place % 2**low
        for k in range(8):
            key = int.from_bytes(digest[8 * k : 8 * k + 8], "little")
            left, right = right, left ^ (mixed((right + key) % 2**64) >> (64 - high))
            low, high = high, low
        place = left << low | right
        if place < num_groups:
            return place


@pytest.mark.parametrize("num_groups", [*range(1, 70), 1000, 1024, 1025, 4097, 1_000_003])
def test_a_computed_order_is_a_permutation(num_groups):
    places = np.arange(num_groups, dtype=np.uint64)
    found = permutation.feistel(places, num_groups, 3, 1)
    assert np.array_equal(np.sort(found), places)
    some = range(0, num_groups, max(1, num_groups // 50))
    assert [int(found[place]) for place in some] == [naive_feistel(place, num_groups, 3, 1) for place in some]


def test_a_computed_order_looks_drawn():
    """Groups of any stretch of an epoch come evenly from the whole file; neighbours, epochs and seeds are unrelated."""
    number = 1_048_577  # where nearly half of all results go through the network again
    orders = [
        permutation.feistel(np.arange(number, dtype=np.uint64), number, seed, epoch).astype(float)
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    for order in orders:
        for stretch in np.split(order[: 1 << 20], 64):
            counts = np.histogram(stretch, 64, (0, number))[0]
            assert ((counts - 256) ** 2 / 256).sum() < 150, "chi-square of 63 degrees of freedom: 150 once in 10^8"
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.006
        assert abs(np.corrcoef(order, np.arange(number))[0, 1]) < 0.006
    assert all(abs(np.corrcoef(first, second)[0, 1]) < 0.006 for first, second in itertools.combinations(orders, 2))


def test_more_than_a_million_groups_have_a_computed_order(monkeypatch):
    """The million-and-first group changes how the order is found, and nothing else: any number of ranks, a resume, other orders refused."""
    drawn = stream(1, num_groups=1_000_000), stream(5, num_groups=1_000_001)
    assert drawn[0] == permutation._stored(1_000_000, 3, 0)[:1].tolist()
    assert drawn[1] == [naive_feistel(place, 1_000_001, 3, 0) for place in range(5)]
    assert make(1_000_000).state_dict().keys() == make().state_dict().keys()
    monkeypatch.setattr(permutation, "STORED", 10)
    monkeypatch.setattr(permutation, "_BLOCK", 4)
    permutation._computed.cache_clear()
    elements = stream(60)
    assert elements == [naive_feistel(place, 23, 3, epoch) for epoch in range(3) for place in range(23)][:60]
    ranks = [take(make(mb=2, accumulation=2, rank=rank, world=3), 10) for rank in range(3)]
    assert [index for micro in range(10) for rank in range(3) for index in ranks[rank][micro]] == elements
    running = make(mb=2)
    running.advance()
    resumed = make(mb=2)
    resumed.load_state_dict(running.state_dict())
    assert take(resumed, 3) == [elements[2:4], elements[4:6], elements[6:8]]
    earlier = {name: value for name, value in running.state_dict().items() if name != "order"}
    with pytest.raises(DataError, match="order None, but this run has 'feistel-1'"):
        resumed.load_state_dict(earlier)
    permutation._computed.cache_clear()


@pytest.mark.parametrize("computed", [False, True])
def test_groups_of_a_row_come_together(computed, monkeypatch):
    """Rows in the order that they have alone, each with its groups in theirs; any stretch, any number of ranks, part of a file."""
    monkeypatch.setattr(permutation, "_BLOCK", 4)
    if computed:
        monkeypatch.setattr(permutation, "STORED", 10)
    permutation._computed.cache_clear()
    sizes = np.random.default_rng(0).integers(1, 6, 30)
    firsts = np.concatenate([[0], np.cumsum(sizes)]).astype("<u4")
    for limit in (int(firsts[-1]), int(firsts[17]), int(firsts[17]) + 1, 1):
        rows = RowsTogether(firsts, limit)
        parts = [range(int(a), min(int(b), limit)) for a, b in itertools.pairwise(firsts) if a < limit]
        for epoch in range(3):
            whole = [group for row in permutation.permuted(0, len(parts), len(parts), 3, epoch) for group in parts[row]]
            assert sorted(whole) == list(range(limit)) and rows.permuted(0, limit, 3, epoch) == whole
            for start, count in ((0, 1), (5, 17), (limit - 1, 9), (limit // 2, limit)):
                assert rows.permuted(start, count, 3, epoch) == whole[start : start + count]
        order = Order((limit,), (), 3, rows=(rows,))
        elements = order.at(0, 4 * limit)
        options = {"num_groups": limit, "gradient_accumulation_steps": 2, "seed": 3, "order": order}
        ranks = [GroupSampler(rank=rank, world_size=2, groups_per_micro_batch=3, **options) for rank in range(2)]
        streams = [take(sampler, limit // 3 + 1) for sampler in ranks]
        seen = [group for micro in zip(*streams, strict=True) for each in micro for group in each]
        assert seen == elements[: len(seen)] if len(seen) <= len(elements) else seen[: len(elements)] == elements
        state = ranks[0].state_dict()
        assert state["order"] == ("feistel-1+rows-1" if computed and limit > 10 else "rows-1")
        with pytest.raises(DataError, match=re.escape(f"sampler has order '{state['order']}', but this run has ")):
            make(limit).load_state_dict(state)
        with pytest.raises(DataError, match=r"sampler has order (None|'feistel-1'), but"):
            ranks[0].load_state_dict(make(limit).state_dict())
    permutation._computed.cache_clear()


def test_steps_of_a_packed_run_are_tried_where_they_are_too_many_to_count(monkeypatch):
    """Whatever the mix of lengths, what is taken from a part of an epoch is within one in a hundred of what counting finds."""
    chance = np.random.default_rng(0)
    for tokens in (chance.integers(600, 800, 6000), chance.lognormal(6.2, 0.9, 6000).clip(60, 7000), chance.choice([90, 1300], 6000)):
        monkeypatch.undo()
        packed = PackedSampler(tokens=tokens.astype(np.int32), max_tokens=8192, gradient_accumulation_steps=2, rank=0, world_size=2, seed=1)
        counted = [packed.num_steps(epochs) for epochs in (0.5, 1, 2.25)]
        monkeypatch.setattr("cfvlm_ds.data.sampler._COUNTED", 100)
        monkeypatch.setattr("cfvlm_ds.data.sampler._TRIED", 2000)
        tried, said = [packed.num_steps(epochs) for epochs in (0.5, 1, 2.25)], list[str]()
        monkeypatch.setattr("cfvlm_ds.core.progress.time.monotonic", iter(range(0, 10**6, 3)).__next__)
        assert packed.num_steps(1, said.append) == tried[1] and " of 2000 groups, " in said[0], "each step takes three seconds"
        assert tried == pytest.approx(counted, rel=0.01, abs=1)
