"""The loop under real ZeRO-3 processes: one trajectory whatever the ranks, equal to a plain-torch reference, exact across a kill."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import (
    REPO,
    assert_same_trajectory,
    environment,
    losses,
    metrics,
    printed,
    read_json,
    refused,
    run_train,
    run_trainings,
    save_groups,
    selected,
    train_arguments,
    write_json,
    write_manifest,
)

from cfvlm_ds.batching.batch import MicroBatch
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.data import read_manifest
from cfvlm_ds.data.cfgroup import from_row, to_row
from cfvlm_ds.evaluation.before_after import from_table
from cfvlm_ds.evaluation.metrics import MEAN
from cfvlm_ds.training.gradient_cache import forward

GLOBAL_BATCH = 16
STEPS = 4  # of 48 groups: into the second epoch
FORWARD = 240  # tokens: a few images with their texts


MANY = ((1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 2), (4, 4), (1, 2, FORWARD), (2, 2, FORWARD))
LAYOUTS = [
    pytest.param(layout, marks=pytest.mark.long if layout in MANY else ())
    for layout in ((1, 2), (1, 4), (1, 2, FORWARD), (2, 1), (2, 2), (2, 4), (2, 2, FORWARD), (4, 1), (4, 2), (4, 4))
]
"""Ranks, accumulation steps and, where it is bounded, tokens of a forward: unequally many forwards on ranks, which test_whole_steps has
with these terms and others."""


@pytest.fixture(scope="module")
def trajectories(model_dir, manifests, tmp_path_factory, request):
    """Layout -> run folder, 16 groups a step; (1, 1) always."""
    chosen = list(dict.fromkeys([(1, 1), *selected(request, "layout")]))
    folders = {layout: tmp_path_factory.mktemp("x".join(map(str, layout))) for layout in chosen}
    for ranks in (1, 2, 4):
        arguments = []
        for (_, steps, *limit), folder in ((layout, folder) for layout, folder in folders.items() if layout[0] == ranks):
            micro = GLOBAL_BATCH // (ranks * steps)
            extra = [
                f"--train.max_steps={STEPS}",
                f"--train.per_device_train_batch_size={micro}",
                f"--train.gradient_accumulation_steps={steps}",
            ]
            extra += [part for tokens in limit for part in ("--data.max_tokens_per_forward", str(tokens))]
            arguments.append(train_arguments(model_dir, manifests, folder, *extra))
        if arguments:
            run_trainings(ranks, *arguments)
    return folders


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_and_accumulation_give_one_trajectory(layout, trajectories):
    """Ragged groups included (0 to 2 counterfactuals, shams): every term is divided by its global count. fp32, relative 2e-4."""
    first, *_, last = losses(trajectories[1, 1])
    assert len(losses(trajectories[1, 1])) == STEPS and last < first - 0.3, "it must train, or equality means nothing"
    assert_same_trajectory(trajectories[1, 1], trajectories[layout])


@pytest.mark.parametrize("steps", [STEPS, pytest.param(20, marks=pytest.mark.long)])
def test_equals_the_plain_torch_reference(steps, trajectories, model_dir, manifests, tmp_path):
    """A single-process loop of about 60 lines that shares no code with the package gives the same losses, and those of the golden file."""
    folder = trajectories[1, 1]
    if steps != STEPS:
        folder = tmp_path / "run"
        run_trainings(1, train_arguments(model_dir, manifests, folder, "--train.max_steps", str(steps)))
    printed = subprocess.run(
        [sys.executable, "tests/support/reference_loop.py", str(model_dir), str(manifests["train"]), str(steps)],
        cwd=REPO, env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    expected = json.loads(printed.stdout)
    rows = [row for row in metrics(folder) if "loss" in row]
    ramps = [min(1.0, number / steps / 0.5) for number in range(steps)]  # the reference prints what it minimises, the run the full weights
    found = [row["loss/align"] + ramp * (0.5 * row["loss/csd"] + 0.7 * row["loss/fcd"]) for row, ramp in zip(rows, ramps, strict=True)]
    assert found == pytest.approx(expected, rel=2e-4)
    final = [row["loss/align"] + 0.5 * row["loss/csd"] + 0.7 * row["loss/fcd"] for row in rows]
    assert [row["loss"] for row in rows] == pytest.approx(final)
    if steps == 20:
        golden = read_json(REPO / "tests/golden/train20.json")
        assert expected == pytest.approx(golden, rel=2e-3), "the reference itself moved: see CONTRIBUTING on golden files"


def test_the_table_before_and_after_a_training(model_dir, manifests, tmp_path, monkeypatch, capsys):
    """A rate of 0 changes nothing; a second run has its baseline from the cache; an earlier run's in the folder is removed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    split = ["--data.evaluation.test", str(manifests["test"])]
    still, moved, plain = (tmp_path / name for name in ("still", "moved", "plain"))
    (plain / "baseline").mkdir(parents=True)
    write_json(plain / "baseline" / "test.json", {"data": {}, "groups": []})
    size, first, auto = ["--train.per_device_train_batch_size=32"], ["--train.max_steps=1"], ["--train.eval_on_start=auto"]
    said = [
        run_trainings(1, train_arguments(model_dir, manifests, folder, *size, *options))
        for folder, options in (
            (still, ["--train.learning_rate=0", *first, *auto, *split]),
            (moved, ["--train.learning_rate=0.01", *auto, *split]),
            (plain, [*first, *split]),
        )
    ]
    cached = "before the first step: accuracies of test are taken from an earlier run with this model"
    assert [cached in each for each in said] == [False, True, False]
    assert (still / "baseline" / "test.json").read_text() == (moved / "baseline" / "test.json").read_text()
    stored = {folder: read_json(folder / "before_after.json") for folder in (still, moved, plain)}
    assert all(len(row) == len(table["columns"]) for table in stored.values() for row in table["data"])
    rows = {folder: list(map(vars, from_table(table))) for folder, table in stored.items()}
    final = {MEAN if row["mean"] else row["name"]: row["metrics"] for row in read_json(moved / "results.json")["test"]}
    assert {row["edit"] for row in rows[moved]} == {"colour"}, "one edit type needs no mean"
    assert all(row["after"] == final["colour"][row["metric"]] for row in rows[moved])
    assert [row["metric"] for row in rows[moved]] == ["group", "pair", "image_pair", "factual", "sham"]
    assert rows[moved][0]["difference"] != 0
    assert all(row["difference"] == row["after"] - row["before"] for row in rows[moved])
    assert all(row["before"] == row["after"] for row in rows[still]) and len(rows[still]) >= 2
    assert [row["before"] for row in rows[moved]] == [row["before"] for row in rows[still]]
    logged = [row for row in metrics(moved) if "eval/test/pair" in row]
    assert [row["step"] for row in logged] == [0, 6] and logged[0]["eval/test/pair"] != logged[1]["eval/test/pair"]
    assert rows[plain] == [] and not (plain / "baseline").exists()
    assert "Not compared with the model before training: test (train.eval_on_start is false)" in (plain / "results.md").read_text()
    tables = printed(capsys, "compare", still, moved, moved / "results.json").split("| set | edit type | groups | metric |")[1:]
    blanks = ["" if row["blank"] is None else f"{row['blank_before']:.1f} -> {row['blank']:.1f}" for row in rows[moved]]
    changed = [
        f"| {row['before']:.1f} | {row['after']:.1f} | {blank} | "
        + (f"{row['difference']:+.1f}" if row["groups"] < 20 or row["better"] + row["worse"] else "unchanged")
        for row, blank in zip(rows[moved], blanks, strict=True)
    ]
    assert len(tables) == 3 and all(change in table for table in tables for change in changed), "their mean is what both are"
    assert "said-still" in refused(capsys, "compare", still, tmp_path / "said-still")
    vocabulary = read_json(model_dir / "config.json")["text_config"]["vocab_size"]
    assert f"- NLL of uniform guessing: {math.log(vocabulary):.2f} " in (still / "results.md").read_text()


def test_two_passes_draw_the_same_random_numbers():
    """A part drops out the same in both forwards: the gradient is that of one graph over all parts, and the last one completes it."""
    weight, boundaries = torch.ones(6, requires_grad=True), []

    class Engine:
        set_gradient_accumulation_boundary = boundaries.append

        def __call__(self, at: slice) -> torch.Tensor:
            return torch.nn.functional.dropout(weight[at] * torch.arange(1.0, 7.0)[at], 0.5)

        def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
            loss.backward()

    class Part:
        reference = None

        def __init__(self, at: slice) -> None:
            self.model_inputs, self.at = {"at": at}, at

        def scores(self, logp: torch.Tensor) -> Scores:
            whole = torch.zeros(6).index_add(0, torch.arange(6)[self.at], logp)
            return Scores(None, whole, whole)  # type: ignore[arg-type]

    def loss_of(scores: Scores) -> torch.Tensor:
        return scores.logp.sum() ** 2

    engine, parts = Engine(), [Part(slice(0, 3)), Part(slice(3, 6))]
    torch.manual_seed(0)
    engine(parts[0].at)  # the repeat, because another rank has three parts
    (expected,) = torch.autograd.grad(loss_of(Scores.joined([part.scores(engine(part.at)) for part in parts])), weight)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    scores, backward = forward(engine, MicroBatch(tuple(parts)), 3, torch.device("cpu"), lambda _: None, last=True)  # type: ignore[arg-type]
    backward(loss_of(scores))
    torch.testing.assert_close(weight.grad, expected)
    assert boundaries == [False, False, True] and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("tower", ["full", pytest.param("frozen", marks=pytest.mark.long)])
def test_ranks_whose_rows_differ_make_the_same_collectives(tower, model_dir, tmp_path):
    """Text alone, one picture, several at once, or nothing, since a picture is broken: a rank without pictures would not gather the tower's
    weights, and the others wait for ever (DeepSpeed#7170). torch compares every collective of the ranks, and the losses are one rank's."""
    groups = read_manifest(write_manifest(tmp_path / "m.jsonl", 12, seed=2))
    other = groups[0].images[0]
    for place, kind in enumerate(("text", "one", "several", "broken", "one", "text", "text", "several", "one", "one", "text", "several")):
        own = groups[place].images[0]
        pictures = {"text": (), "several": (*own, *other)}.get(kind, own)
        shown = dataclasses.replace(groups[place], images=(pictures,), match=groups[place].match[:1], edits=())
        prompt = "" if kind == "text" else [{"type": "image"}] * len(pictures)
        row = to_row(shown, tmp_path) | {"prompt": [{"role": "user", "content": [*prompt, {"type": "text", "text": "Describe."}]}]}
        groups[place] = from_row(row, tmp_path)
        if kind == "broken":
            pictures[0].write_bytes(b"no picture")
    manifests = {"train": save_groups(tmp_path / "rows.jsonl", groups)}
    options = ["--model.vision_tower.tuning", tower, "--train.max_steps=4", "--data.check=rows", "--data.on_error=skip"]
    for ranks in (1, 3):
        size = [f"--train.per_device_train_batch_size={3 // ranks}"]
        arguments = train_arguments(model_dir, manifests, tmp_path / str(ranks), *options, *size)
        run_train(ranks, arguments, {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"})
    assert len(losses(tmp_path / "1")) == 4 and losses(tmp_path / "3") == pytest.approx(losses(tmp_path / "1"), rel=2e-4)
    assert read_json(tmp_path / "3" / "skipped.json")
