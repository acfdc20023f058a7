"""Micro-batches by tokens: nothing lost, limits kept, ranks of equal work; trained under ZeRO-3; and the check of packed scores."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import pytest
import torch
from conftest import losses, run_ranks, run_trainings, train_arguments
from stores import preparing

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.data import PackedSampler

LIMIT = 8192
RNG = random.Random(0)
MIXES = {
    "alike": [580 + RNG.randrange(60, 200) for _ in range(5000)],
    "native resolution": [int(min(7000, max(60, RNG.lognormvariate(6.2, 0.9)))) for _ in range(5000)],
    "text and images": [RNG.choice([90, 1300]) + RNG.randrange(60) for _ in range(5000)],
}


def sampler(tokens: list[int], micro_batches: int = 8, rank: int = 0, world: int = 1, **changes: Any) -> PackedSampler:
    options = {"max_tokens": LIMIT, "seed": 3, **changes}
    return PackedSampler(tokens=tokens, rank=rank, world_size=world, gradient_accumulation_steps=micro_batches // world, **options)


def steps(of: PackedSampler, count: int, micro_batches: int = 8) -> list[list[list[int]]]:
    stream = iter(of)
    return [[next(stream) for _ in range(micro_batches)] for _ in range(count)]


@pytest.mark.parametrize("mix", MIXES)
def test_micro_batches_are_full_and_of_equal_work(mix):
    """Within the limit; less unused than the smallest group takes; the largest of a step's 8 within 2 % of their mean."""
    tokens = MIXES[mix]
    loads = torch.tensor([[sum(tokens[g] for g in batch) for batch in step] for step in steps(sampler(tokens), 40)]).double()
    assert loads.max() <= LIMIT
    assert loads.mean() > LIMIT - min(tokens)
    imbalance = loads.amax(1) / loads.mean(1)
    assert imbalance.mean() < 1.002 and imbalance.max() < 1.02


@pytest.mark.parametrize("mix", MIXES)
def test_no_group_is_lost_or_repeated(mix):
    """What was read from the stream has been seen or waits, each epoch's groups once; the order is nearly that of the stream."""
    of = sampler(MIXES[mix][:700])
    seen: list[int] = []
    for step in steps(of, 30):
        seen += itertools.chain(*step)
        of.advance()
        waiting = list(of.state_dict()["waiting"])
        stream = of.order.at(0, len(seen) + len(waiting))
        assert Counter(seen + waiting) == Counter(stream) and of.samples_seen == len(seen)
        assert len(waiting) <= 32
    assert len(seen) > 2 * of.num_groups, "epochs were crossed"
    assert of.num_steps(len(seen) / 700) == 30


@pytest.mark.parametrize("num_groups", [1, 2, 3, 5, 12, 31, 40])
def test_small_data_is_seen_evenly(num_groups):
    """Few groups, most of them large: the small ones are not repeated while the large ones wait; every micro-batch has a group."""
    tokens = [100 if g % 4 == 3 else 5000 + 10 * g for g in range(num_groups)]
    for micro_batches in (1, 2, 8):
        of, seen = sampler(tokens, micro_batches), Counter(dict.fromkeys(range(num_groups), 0))
        for step in steps(sampler(tokens, micro_batches), 40, micro_batches):
            assert all(step) and all(sum(tokens[g] for g in batch) <= LIMIT for batch in step)
            seen.update(itertools.chain(*step))
            of.advance()
            waiting = of.state_dict()["waiting"]
            assert len(set(waiting)) == len(waiting) and of.samples_seen == seen.total()
            assert max(seen.values()) - min(seen.values()) <= 2
    assert [sampler([100] * 100, 1, max_tokens=100).num_steps(n / 100) for n in range(1, 101)] == list(range(1, 101))
    assert sampler([100] * 100, 1, max_tokens=100).num_steps(0.29) == 29


def test_ranks_share_the_steps_of_one():
    alone = steps(sampler(MIXES["native resolution"]), 5)
    for world in (2, 4, 8):
        streams = [iter(sampler(MIXES["native resolution"], rank=rank, world=world)) for rank in range(world)]
        assert [[next(stream) for _ in range(8 // world) for stream in streams] for _ in range(5)] == alone
    assert steps(sampler(MIXES["native resolution"], seed=4), 1) != alone[:1]


def test_a_saved_position_continues_the_stream():
    whole = steps(sampler(MIXES["alike"]), 9)
    first = sampler(MIXES["alike"])
    for _ in range(4):
        first.advance()
    second = sampler(MIXES["alike"])
    second.load_state_dict(first.state_dict())
    assert steps(second, 5) == whole[4:]
    with pytest.raises(DataError, match="did not pack"):
        second.load_state_dict({name: value for name, value in first.state_dict().items() if name != "waiting"})


def test_a_group_over_the_limit_is_refused():
    with pytest.raises(ValueError, match=r"group 1 has 9000 tokens, over max_tokens \(8192\)"):
        sampler([10, 9000])


# Trained ------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(model_dir, manifests, tmp_path_factory):
    """Name -> (run folder, output), of five steps of two micro-batches of at most 500 tokens."""
    out = tmp_path_factory.mktemp("packed")
    options = ["--data.max_tokens_per_micro_batch=500", "--train.max_steps=5", "--train.self_check=error"]

    def arguments(name: str, *extra: str) -> list[str]:
        return train_arguments(model_dir, manifests, out / name, *options, *extra)

    accumulated = ["--train.gradient_accumulation_steps=2"]
    one = run_trainings(1, arguments("one", *accumulated, "--train.save_steps=2", "--train.save_total_limit=9"))
    assert preparing(manifests["train"], out / "store", pack=True)
    resumed = [*options, *accumulated, "--train.resume", str(out / "one" / "checkpoint-2")]
    again = run_trainings(1, train_arguments(model_dir, {"train": out / "store"}, out / "again", *resumed))
    two = run_trainings(2, arguments("two"))
    return {"one": (out / "one", one), "two": (out / "two", two), "again": (out / "again", again)}


def test_packed_training_is_the_same_on_two_ranks_and_after_a_stop(packed):
    """Two micro-batches on one rank, or one on each of two: fp32, relative 2e-4. Stopped, and resumed on a store of the same groups:
    bit for bit."""
    expected = losses(packed["one"][0])
    assert len(expected) == 5
    assert losses(packed["two"][0]) == pytest.approx(expected, rel=2e-4)
    assert losses(packed["again"][0]) == expected[2:]


def test_the_first_row_is_compared_with_ordinary_forwards(packed):
    for _, output in packed.values():
        assert "self-check: packing changes scores by at most " in output
        assert ": 48 groups, 106 images, visual tokens min 16, median 16, max 16 per image" in output


def test_wrong_scores_stop_a_run_before_it_trains(model_dir, manifests, tmp_path):
    """Siblings that see each other, in a real run: an error that names the attention, and no step."""
    arguments = train_arguments(model_dir, manifests, tmp_path / "run", "--train.self_check=error")
    ((code, said),) = run_ranks(1, "rank_functions:seeing_siblings", arguments)
    assert code == 1
    assert "model.attn_implementation sdpa gives scores that differ by" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
