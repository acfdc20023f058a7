"""Rounds of sampling and training: equal to the same steps by hand, and to themselves after a kill and with another number of ranks."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import forkserver_ranks
import pytest
from conftest import contents, losses, printed, run_train, wait_for

from cfvlm_ds.core.config import HabitsConfig
from cfvlm_ds.demo.base import write_base
from cfvlm_ds.demo.habits import build_habits

JUDGE = "cfvlm_ds.demo.habits:is_true"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    config = HabitsConfig(str(tmp_path_factory.mktemp("rounds") / "world"), num_train=8, num_test=4, num_counterfactuals=0)
    return build_habits(config, progress=lambda line: None)


def options(base: Path, world: Path, out: Path, *more: str) -> list[str]:
    common = ["--config", "tests/support/train.yaml", "--train.export", "true", "--train.max_steps", "2", "--train.learning_rate", "1e-3"]
    common += ["--train.per_device_train_batch_size", "2", "--objective", "{align: {}, csd: {}}", "--train.save_steps", "1"]
    return [*common, "--model.name_or_path", str(base), "--train.output_dir", str(out), *more]


def rounds(base: Path, world: Path, out: Path) -> list[str]:
    """Two rounds of two steps."""
    told = {"number": 2, "pictures": {"path": str(world / "train.jsonl")}, "judge": JUDGE, "n": 4, "max_new_tokens": 48, "weight": 0.5}
    return options(base, world, out, "--data.train", str(world / "train.jsonl"), "--train.rounds", json.dumps(told))


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounds")
    base = write_base(folder / "base")
    run_train(2, rounds(base, world, folder / "out"), said=folder / "said")
    return folder


def test_two_rounds_are_the_same_steps_by_hand(trained, world, capsys):
    model = trained / "base"
    for number in (1, 2):
        work, run, train = trained / f"by-hand-{number}", trained / f"run-{number}", str(world / "train.jsonl")
        printed(capsys, "data", "sample", model, train, "--out", work, "--judge", JUDGE, "--n", 4, "--max_new_tokens", 48)
        groups = (work / "groups.jsonl").read_bytes()
        assert (trained / "out" / f"sampled-{number}" / "groups.jsonl").read_bytes() == groups and groups
        sampled = {"path": str(work / "groups.jsonl"), "name": "sampled", "weight": 0.5, "root": str(world)}
        sources = [{"path": train, "name": "train", "weight": 1.0}, sampled]
        run_train(2, options(model, world, run, "--data.train", json.dumps(sources)), said=trained / f"said-{number}")
        assert losses(trained / "out" / f"round-{number}") == losses(run)
        weights = [folder / "export" / "model.safetensors" for folder in (trained / "out" / f"round-{number}", run)]
        assert weights[0].read_bytes() == weights[1].read_bytes() != (model / "model.safetensors").read_bytes()
        model = run / "export"


@pytest.mark.long
def test_rounds_go_on_after_a_kill_with_another_number_of_ranks(trained, world, tmp_path):
    """Killed while the model of round 1 writes; then one rank goes on. The texts are the same bytes, round 1 is not trained again."""
    out = tmp_path / "out"
    ranks = forkserver_ranks.start(2, "forkserver_ranks:train_script", rounds(trained / "base", world, out), said=tmp_path / "said")
    wait_for(lambda: list((out / "sampled-2").glob("sample/*.done.json")))
    for rank in ranks:
        os.killpg(rank.pid or 0, signal.SIGKILL)
        rank.join()
    assert not (out / "round-2").exists()
    before = contents(out / "round-1")
    same_batch = ["--train.gradient_accumulation_steps", "2"]
    run_train(1, [*rounds(trained / "base", world, out), *same_batch], said=tmp_path / "again")
    assert (out / "sampled-2" / "groups.jsonl").read_bytes() == (trained / "out" / "sampled-2" / "groups.jsonl").read_bytes()
    assert contents(out / "round-1") == before and len(losses(out / "round-2")) == 2


@pytest.mark.long
def test_adapters_of_a_round_are_merged_for_the_next(trained, world, tmp_path):
    lora = [
        f"--model.{name}.tuning={how}" for name, how in (("vision_tower", "frozen"), ("projector", "frozen"), ("language_model", "lora"))
    ]
    run_train(1, [*rounds(trained / "base", world, tmp_path / "out"), *lora], said=tmp_path / "said")
    first, second = (tmp_path / "out" / f"round-{number}" for number in (1, 2))
    assert json.loads((tmp_path / "out" / "sampled-2" / "sample.json").read_text())["model"] == str(first / "export")
    assert (first / "adapter" / "adapter_model.safetensors").is_file() and (second / "adapter" / "adapter_model.safetensors").is_file()


def test_what_rounds_cannot_do_is_said_before_anything_is_sampled(trained, world, tmp_path):
    for number, more in enumerate((["--train.export", "false"], ["--objective.dpo.weight", "1"])):
        out = tmp_path / str(number)
        (said,) = run_train(1, [*rounds(trained / "base", world, out), *more], said=tmp_path / f"said-{number}", code=2)
        assert "error: " in said and not out.exists()
