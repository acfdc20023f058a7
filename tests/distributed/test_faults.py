"""What goes wrong on one of two ranks of a real ZeRO-3 training: both go on, or stop with one named error, together."""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_same_trajectory, losses, metrics, read_json, read_rows, run_plans, train_arguments

from cfvlm_ds.data import GroupSampler

Plans = dict[str, tuple[list[Any], list[str]]]
"""Name of the run folder -> (fault of tests/support/fault_injection.py with its details, options)."""


def planned(manifests: dict[str, Path], folder: Path) -> Plans:
    """What is trained, one after the other, in one family of processes."""
    often = ["--train.save_steps=1", "--train.max_steps=4", "--train.save_total_limit=0"]
    last, test = ["--train.save_total_limit=1"], [f"--data.evaluation.test={manifests['test']}"]
    one_epoch = ["--train.max_steps=3"]
    unreadable = [*one_epoch, "--data.train", str(damaged(manifests["train"], folder / "damaged")), "--data.check=rows"]
    alone = ["--train.per_device_train_batch_size=1", "--train.gradient_accumulation_steps=8"]
    plans: Plans = {
        "whole": (["nothing"], often),
        "full": (["full disk", 2, 4], often),
        "slow gathers": (["slow gathers", 0.02, str(folder / "slow.txt")], ["--train.max_steps=3"]),
        "slow export": (["slow export", 3.0], ["--train.max_steps=1", "--train.export=true", *test]),
        "left out": (["left out", ILL], FIVE),
        **{f"{what} {then}": (["nothing"], planted(what, then)) for what in ("loss", "gradient") for then in ("skip", "stop")},
        "no room for metrics": (["full metrics", str(folder / "no room for metrics"), 3, 4], planted("loss", "skip")),
        "without": (["without", BROKEN], one_epoch),
        "unreadable skip": (["nothing"], [*unreadable, "--data.on_error=skip", "--data.num_workers=1"]),
        "unreadable skip alone": (["nothing"], [*unreadable, "--data.on_error=skip", *alone]),
        "unreadable over": (["nothing"], [*unreadable, "--data.on_error=skip", "--data.max_skipped=0"]),
        "unreadable error": (["nothing"], unreadable),
        "by the clock": (["nothing"], ["--train.save_minutes=1e-9", "--train.max_steps=3", *last, "--train.save_keep_every=2"]),
        "best": (["nothing"], ["--train.eval_steps=1", "--train.max_steps=4", *last, "--train.save_best=eval/test/pair", *test]),
        "taken": (["taken", str(folder / "taken" / "run.lock")], one_epoch),
        "memory": (["exit"], planted("memory", "stop")),
    }
    return plans


@pytest.fixture(scope="module")
def trainings(model_dir, manifests, tmp_path_factory, request):
    folder, tests = tmp_path_factory.mktemp("faults"), {item.name for item in request.session.items if item.path == request.path}
    plans = {name: plan for name, plan in planned(manifests, folder).items() if name not in LONG or LONG[name] in tests}
    micro = ["--train.per_device_train_batch_size=8"]
    listed = [(fault, train_arguments(model_dir, manifests, folder / name, *micro, *extra)) for name, (fault, extra) in plans.items()]
    said = run_plans(2, listed, timeout=1500, code=1)  # the last of them
    return folder, {name: text.splitlines() for name, text in zip(plans, said, strict=True)}


FIVE = ["--train.max_steps=5", "--train.per_device_train_batch_size=4"]
LONG = {
    "slow export": "test_an_export_may_take_longer_than_collectives",
    "gradient skip": "test_a_step_that_is_not_finite_on_one_rank_is_left_out_on_both[gradient]",
    "gradient stop": "test_a_step_that_is_not_finite_stops_both_ranks_by_default[gradient]",
}
"""Plans that are trained where these tests of theirs are, which are long."""
ILL = 2  # the step in which the planted group is seen first


BROKEN = 31  # this group of the manifest has a truncated image


def damaged(manifest: Path, folder: Path) -> Path:
    """A copy of the manifest and its images, one of them cut short."""
    shutil.copytree(manifest.parent, folder)
    image = folder / "images" / f"train-{BROKEN}-0.png"
    image.write_bytes(image.read_bytes()[:-40])
    return folder / manifest.name


def planted(what: str, then: str) -> list[str]:
    """A group of rank 1's micro-batch of step ILL spoils the loss or the gradient; an epoch is of 6 steps, so it is not seen again."""
    options = {"weight": 1, "group": ids(1)[3], "what": what}
    given = [part for name, value in options.items() for part in (f"--objective.planted.{name}", str(value))]
    return [*given, "--train.on_nonfinite", then, *FIVE]


def raised(lines: list[str]) -> dict[int, str]:
    """What every rank raised."""
    found = [line.removeprefix("rank ").split(" raised ", 1) for line in lines if line.startswith("rank ") and " raised " in line]
    return {int(rank): message for rank, message in found}


def common(lines: list[str]) -> str:
    """The one error that both ranks raised."""
    messages = raised(lines)
    assert set(messages) == {0, 1}
    (message,) = set(messages.values())
    return message


def ids(rank: int) -> list[str]:
    """The groups of a rank's micro-batch of step ILL."""
    sampler = GroupSampler(num_groups=48, groups_per_micro_batch=4, gradient_accumulation_steps=1, rank=rank, world_size=2, seed=0)
    return [f"train-{index}" for index in list(itertools.islice(sampler, ILL))[-1]]


@pytest.mark.long
def test_an_export_may_take_longer_than_collectives(trainings):
    folder, said = trainings
    assert not raised(said["slow export"]), said["slow export"]
    assert (folder / "slow export" / "export" / "config.json").is_file() and (folder / "slow export" / "results.json").is_file()


# Files that cannot be written ------------------------------------------------------------------------------------------------------------


def test_a_full_disk_costs_a_checkpoint_and_at_the_end_is_an_error_on_all_ranks(trainings):
    """The system refuses rank 1's files at step 2: a warning on rank 0, nothing left of that checkpoint, and the same losses. So it does at
    the last step."""
    folder, said = trainings
    run_dir = folder / "full"
    (warning,) = [line for line in said[run_dir.name] if line.startswith("warning")]
    assert f"{run_dir}/checkpoint-2 cannot be written (rank 1: [Errno 27] File too large" in warning and "training continues" in warning
    assert losses(run_dir) == losses(folder / "whole")
    saved = [(row["step"], row["checkpoint/failed"]) for row in metrics(run_dir) if "checkpoint/failed" in row]
    assert saved[:3] == [(1, 0), (2, 1), (3, 0)]
    assert re.match(rf"SaveError: {run_dir}/checkpoint-4 .*rank 1: \[Errno 27\] File too large", common(said[run_dir.name]))
    assert {path.name for path in run_dir.glob("checkpoint*")} == {"checkpoint-1", "checkpoint-3"}


def test_metrics_wait_for_room_and_cost_nothing(trainings):
    """The system has no room for metrics.jsonl in steps 3 and 4, and takes no nonfinite.jsonl: two warnings, and the same rows in order."""
    folder, said = trainings
    run_dir = folder / "no room for metrics"
    assert not raised(said[run_dir.name])
    spoken = "\n".join(said[run_dir.name])
    for words in (
        "metrics.jsonl cannot be written (No space",
        "metrics.jsonl can be written again",
        "nonfinite.jsonl cannot be written (Is",
    ):
        assert spoken.count(f"{run_dir}/{words}") == 1
    assert ids(1)[0] in spoken
    timed = ("time", "throughput/", "checkpoint/")
    rows, expected = (
        [{name: value for name, value in row.items() if not name.startswith(timed)} for row in metrics(path)]
        for path in (run_dir, folder / "loss skip")
    )
    assert rows == expected and {row["step"] for row in rows} == {1, 3, 4, 5}


def test_checkpoints_by_the_clock_multiples_and_the_best_are_kept_and_their_cost_recorded(trainings):
    run_dir = trainings[0] / "by the clock"
    saved = [row for row in metrics(run_dir) if "checkpoint/failed" in row]
    assert [row["step"] for row in saved] == [1, 2, 3]
    assert all(0 < row["checkpoint/seconds"] < 60 and 0 < row["checkpoint/share"] < 1 for row in saved)
    assert {path.name for path in run_dir.glob("checkpoint*")} == {"checkpoint-2", "checkpoint-3"}
    run_dir = trainings[0] / "best"
    found = {row["step"]: row["eval/test/pair"] for row in metrics(run_dir) if "eval/test/pair" in row and row["step"] < 4}
    best = max(found, key=lambda step: (found[step], -step))
    assert {path.name for path in run_dir.glob("checkpoint*")} == {f"checkpoint-{best}", "checkpoint-4"}


# Losses and gradients that are not finite ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["loss", pytest.param("gradient", marks=pytest.mark.long)])
def test_a_step_that_is_not_finite_on_one_rank_is_left_out_on_both(what, trainings):
    """As if its data had been taken and nothing computed: weights, moments and schedule are untouched, and later figures the same."""
    folder, said = trainings
    run_dir = folder / f"{what} skip"
    assert not raised(said[run_dir.name])
    rows, expected = metrics(run_dir), metrics(folder / "left out")
    for name in ("step", "loss/align", "loss/csd", "grad_norm", "learning_rate"):
        assert [row[name] for row in rows if "loss" in row] == [row[name] for row in expected if "loss" in row], name
    assert [row["step"] for row in rows if "loss" in row] == [1, 3, 4, 5]
    assert [row["skipped_steps"] for row in rows if "loss" in row] == [0, 1, 1, 1]
    (listed,) = read_rows(run_dir / "nonfinite.jsonl")
    groups = {"1": ids(1)} if what == "loss" else {"0": ids(0), "1": ids(1)}
    assert listed == {"step": ILL, "what": what, "groups": groups}
    (warning,) = [line for line in said[run_dir.name] if line.startswith("warning: the")]
    assert f"the {what} is not finite at step 2; its groups: rank" in warning and "skipped on all ranks" in warning


@pytest.mark.parametrize("what", ["loss", pytest.param("gradient", marks=pytest.mark.long)])
def test_a_step_that_is_not_finite_stops_both_ranks_by_default(what, trainings):
    folder, said = trainings
    assert re.match(f"FloatingPointError: the {what} .* step 2; .*{ids(1)[0]}", common(said[f"{what} stop"]))
    assert losses(folder / f"{what} stop") == losses(folder / f"{what} skip")[:1]
    assert not list((folder / f"{what} stop").glob("checkpoint-*"))


def so_far() -> list[set[int]]:
    """The groups that both ranks have seen after each of three steps."""
    sampler = GroupSampler(num_groups=48, groups_per_micro_batch=16, gradient_accumulation_steps=1, rank=0, world_size=1, seed=0)
    return [set().union(*seen) for seen in itertools.accumulate(([step] for step in itertools.islice(sampler, 3)), list.__add__)]


# Groups that cannot be read --------------------------------------------------------------------------------------------------------------


def test_an_unreadable_group_is_left_out_with_the_same_counts_everywhere(trainings):
    """The reference never hears of the group: its sampler leaves it out of the micro-batch, and all its files are sound."""
    folder, said = trainings
    run_dir = folder / "unreadable skip"
    assert not raised(said[run_dir.name])
    assert losses(run_dir) == losses(folder / "without") and len(losses(run_dir)) == 3
    reasons = read_json(run_dir / "skipped.json")
    assert set(reasons) == {f"train-{BROKEN}"} and f"train-{BROKEN}-0.png: image cannot be read" in reasons[f"train-{BROKEN}"]
    assert [row["skipped_groups"] for row in metrics(run_dir) if "loss" in row] == [BROKEN in seen for seen in so_far()]
    (warning,) = [line for line in said[run_dir.name] if line.startswith("warning: group")]
    assert f"'train-{BROKEN}' is left out" in warning


def test_a_rank_whose_micro_batch_is_empty_still_takes_part(trainings):
    """One group a micro-batch, so that nothing is left of the damaged one's: the same trajectory, nothing of the stand-in in any metric."""
    assert_same_trajectory(trainings[0] / "without", trainings[0] / "unreadable skip alone", "active/", "violated/")


def test_unreadable_groups_over_the_budget_are_an_error_on_all_ranks(trainings):
    for name, sentence in (("unreadable over", r"DataError: 1 groups .*data\.max_skipped \(0\)"), ("unreadable error", "DataError: ")):
        assert re.match(rf"{sentence}.*train-{BROKEN}-0\.png: image cannot be read", common(trainings[1][name]))


# Two runs in one folder ------------------------------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_on_all_ranks(trainings):
    assert re.match("ConfigError: .* process 7 on node9, Slurm job 4711, started yesterday", common(trainings[1]["taken"]))
    assert [path.name for path in (trainings[0] / "taken").iterdir()] == ["run.lock"]


# Memory ----------------------------------------------------------------------------------------------------------------------------------


def test_out_of_memory_names_the_batch_and_the_setting(trainings):
    """torch's own allocator refuses on one rank; the other one ends too, and neither well, without a launcher to see to it."""
    said = "\n".join(trainings[1]["memory"])
    assert "error: out of memory at step 2 on rank 1; its largest forward pass has 4 groups, " in said
    assert "; lower train.per_device_train_batch_size (4), and raise train.gradient_accumulation_steps, set data." in said
    assert "can't allocate memory" in said


# Where the time goes ---------------------------------------------------------------------------------------------------------------------


def test_the_wait_for_weights_is_measured(trainings):
    """Gathers that take longer by known times show up as those times in the share of the step, and in the progress line."""
    folder, said = trainings

    def of_run(name: str) -> tuple[list[float], list[float]]:
        steps = [row for row in metrics(folder / name) if "loss" in row]
        elapsed = [8 * 2 / step["throughput/groups_per_s"] for step in steps]
        return elapsed, [step["throughput/all_gather_share"] * seconds for step, seconds in zip(steps, elapsed, strict=True)]

    added = [float(line) for line in (folder / "slow.txt").read_text().split()]
    elapsed, slow = of_run("slow gathers")
    _, quick = of_run("whole")
    assert len(added) == 3 and min(added) > 1, "some sixty gathers forward, and as many backward"
    for more, seconds, waited, usual in zip(added, elapsed, slow, quick[:3], strict=True):
        assert more <= waited < seconds and 0 < usual < more
    assert sum("all-gather" in line for line in said["slow gathers"] if line.startswith("step ")) == 3
