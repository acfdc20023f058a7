"""Rounds of sampling and training: equal to the same steps by hand, and to themselves after a kill and with another number of ranks."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
from pathlib import Path

import forkserver_ranks
import pytest
from conftest import contents, losses, printed, read_json, read_rows, run_ranks, run_train, wait_for, write_json, write_rows

from cfvlm_ds.cli.rounds import mixable
from cfvlm_ds.cli.train import run
from cfvlm_ds.cluster.run_lock import RunLock
from cfvlm_ds.core.config import HabitsConfig
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.parsing import parse_config
from cfvlm_ds.core.run_folder import named_model
from cfvlm_ds.demo.base import write_base
from cfvlm_ds.demo.habits import build_habits
from cfvlm_ds.objectives import OBJECTIVES

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
    run_train(2, rounds(base, world, folder / "out"))
    return folder


def test_two_rounds_are_the_same_steps_by_hand(trained, world, capsys):
    with pytest.raises(ConfigError, match="round-2"):
        named_model(str(trained / "out"))
    model = trained / "base"
    for number in (1, 2):
        work, run, train = trained / f"by-hand-{number}", trained / f"run-{number}", str(world / "train.jsonl")
        printed(capsys, "data", "sample", model, train, "--out", work, "--judge", JUDGE, "--n", 4, "--max_new_tokens", 48)
        groups = (work / "groups.jsonl").read_bytes()
        assert (trained / "out" / f"sampled-{number}" / "groups.jsonl").read_bytes() == groups and groups
        sampled = {"path": str(work / "groups.jsonl"), "name": "sampled", "weight": 0.5, "root": str(world)}
        sources = [{"path": train, "name": "train", "weight": 1.0}, sampled]
        run_train(2, options(model, world, run, "--data.train", json.dumps(sources)))
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
    run_train(1, [*rounds(trained / "base", world, out), *same_batch])
    assert (out / "sampled-2" / "groups.jsonl").read_bytes() == (trained / "out" / "sampled-2" / "groups.jsonl").read_bytes()
    assert contents(out / "round-1") == before and len(losses(out / "round-2")) == 2


def is_known(text, row):
    """Judge: a text is true if it is a true text of the row."""
    return text in [known["text"] for known in row["texts"]]


def decides_only_on_known(text, row):
    """Judge that fails on texts that a model wrote."""
    return is_known(text, row) or {}[text]


@pytest.mark.long
def test_a_scorer_judges_a_round_of_two_ranks_as_one_process(trained, world, tmp_path, capsys):
    scorer, out, work = trained / "out" / "round-1" / "export", tmp_path / "out", tmp_path / "W"
    told = {"number": 1, "pictures": {"path": str(world / "train.jsonl")}, "judge": "match", "scorer": str(scorer), "n": 4}
    told |= {"max_new_tokens": 48, "weight": 0.5}
    run_train(2, [*rounds(trained / "base", world, out), "--train.rounds", json.dumps(told)])
    given = ["--out", work, "--judge", "match", "--scorer", scorer, "--n", 4, "--max_new_tokens", 48]
    printed(capsys, "data", "sample", trained / "base", world / "train.jsonl", *given)
    groups = (work / "groups.jsonl").read_bytes()
    assert (out / "sampled-1" / "groups.jsonl").read_bytes() == groups and groups
    assert read_json(out / "sampled-1" / "counts.json") == read_json(work / "counts.json") and len(losses(out / "round-1")) == 2


@pytest.mark.long
def test_rounds_with_adapters_on_captions(trained, world, tmp_path):
    """The adapters are merged. The data's format and root are not those of the groups. An options file that is edited meanwhile is not
    read again."""
    rows = read_rows(world / "train.jsonl")
    captions = write_rows(
        tmp_path / "my captions.jsonl", ({"file": row["images"][0]["path"], "said": row["texts"][0]["text"]} for row in rows)
    )
    told = {"number": 2, "pictures": {"path": str(captions), "limit": 4}, "judge": "test_rounds:is_known", "n": 2, "max_new_tokens": 48}
    tuning = {"vision_tower": "frozen", "projector": "frozen", "language_model": "lora"}
    document = {"train": {"rounds": told}, "model": {name: {"tuning": how} for name, how in tuning.items()}}
    file, out = tmp_path / "mine.yaml", tmp_path / "an out"
    write_json(file, document | {"data": {"train": str(captions), "root": str(world), "format": "captions:image=file,caption=said"}})
    given = [*options(trained / "base", world, out), "--config", str(file), "--objective.csd.weight", "0"]
    (rank,) = forkserver_ranks.start(1, "forkserver_ranks:train_script", given, said=tmp_path / "said")
    wait_for((out / "sampled-1").exists)
    file.write_text("edited: true")
    rank.join()
    assert rank.exitcode == 0, (tmp_path / "said" / "rank-0.log").read_text()
    first, second = (out / f"round-{number}" for number in (1, 2))
    assert read_json(out / "sampled-2" / "sample.json")["model"] == str(first / "export")
    assert (first / "adapter" / "adapter_model.safetensors").is_file() and (second / "adapter" / "adapter_model.safetensors").is_file()


def test_what_rounds_cannot_do_is_said_before_anything_is_sampled(trained, world, tmp_path):
    named, out = json.dumps([{"path": str(world / "train.jsonl"), "name": "sampled", "weight": 1}]), tmp_path / "out"
    given = [*rounds(trained / "base", world, out), "--train.export", "false"]
    for more in ([], ["--train.dry_run", "true"]):
        (said,) = run_train(1, [*given, *more], code=2)
        assert "error: " in said and not out.exists()
    for option, value in (
        ("objective.dpo.weight", "1"), ("data.train", named), ("train.resume", str(tmp_path)), ("model.lora.load_in_4bit", "true"),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            mixable(parse_config([*given, "--train.export", "true", f"--{option}", value], OBJECTIVES))


@pytest.mark.parametrize("entry", ["config.yaml", "run.lock"])
def test_rounds_do_not_mix_with_a_run_or_with_other_rounds(entry, trained, world, tmp_path):
    out = tmp_path / "out"
    lock = RunLock(out)
    if entry == "config.yaml":
        lock.release()
        shutil.copy(trained / "out" / "round-1" / entry, out)
    before = contents(out)
    (said,) = run_train(1, rounds(trained / "base", world, out), code=2)
    assert f"error: {out} " in said and contents(out) == before


def test_all_ranks_end_with_the_error_of_one(trained, world, tmp_path):
    """The judge fails when all texts are written, on the rank that finishes last."""
    given = [*rounds(trained / "base", world, tmp_path / "out"), "--train.rounds.judge", "test_rounds:decides_only_on_known"]
    run_train(2, given, code=2)
    assert not (tmp_path / "out" / "round-1").exists()


def train_and_count_engines(arguments):
    run(arguments)
    gc.collect()
    print("engines:", sum(type(each).__name__ == "DeepSpeedEngine" for each in gc.get_objects()))


def test_a_run_leaves_no_engine_in_memory(trained, world, tmp_path):
    given = options(trained / "base", world, tmp_path / "out", "--data.train", str(world / "train.jsonl"), "--train.export", "false")
    given += ["--objective.csd.weight", "0", "--objective.fcd.weight", "0"]
    ((code, said),) = run_ranks(1, "test_rounds:train_and_count_engines", given)
    assert code == 0 and "engines: 0" in said, said
