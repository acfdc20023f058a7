"""The baseline of a run and its cache: which files are believed, and what a damaged, stale or unwritable one costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from conftest import ONE as ALONE
from conftest import read_json

from cfvlm_ds.core.groups import Candidate, CounterfactualGroup, Edit
from cfvlm_ds.core.parsing import parse_config
from cfvlm_ds.data.identity import data_identity
from cfvlm_ds.evaluation import Accuracy, GroupScores, accuracies
from cfvlm_ds.objectives import OBJECTIVES
from cfvlm_ds.training.baseline import Baseline
from cfvlm_ds.training.evaluation_sample import EvaluationSample

MODEL = {"weights": "w", "inputs": "i"}


def groups(root: Path, edit: str = "colour", count: int = 120) -> list[CounterfactualGroup]:
    for name in ("a.png", "b.png"):
        (root / name).write_bytes(name.encode())
    one = CounterfactualGroup(
        "", ((root / "a.png",), (root / "b.png",)), (Candidate("", "a"), Candidate("", "b")), ((1, 0), (0, 1)), (Edit(edit, 1, 1),)
    )
    return [replace(one, id=f"g{number}") for number in range(count)]


def accuracies_of(found: Sequence[CounterfactualGroup], right: bool) -> list[Accuracy]:
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0]] if right else [[0.0, 1.0], [1.0, 0.0]])
    rows = accuracies(found, [GroupScores(scores, torch.zeros(2))] * len(found))
    return [*rows[:-1], replace(rows[-1], losses={"align": {"value": 5.0}}, nll=0.5)]


class Run:
    """A run in a folder of its own, of a model that is wrong everywhere before the first step."""

    def __init__(self, folder: Path, found: list[CounterfactualGroup], root: Path, *options: str) -> None:
        config = parse_config(["--model.name_or_path", "m", "--train.output_dir", str(folder), *options], OBJECTIVES)
        identity = {**data_identity(found, [root]), "pictures": "known"}
        self.groups, self.evaluated, self.folder = found, list[str](), folder
        self.baseline = Baseline(config, {"test": found}, {"test": identity}, MODEL, torch.float32, 8, ALONE)

    def measure(self) -> dict[str, list[Accuracy]]:
        def evaluator(splits: Any) -> Any:
            self.evaluated += splits
            return {name: accuracies_of(groups, False) for name, groups in splits.items()}, {}

        return self.baseline.measure(evaluator)  # type: ignore[arg-type]

    @property
    def change(self) -> tuple[float, float, int] | None:
        """Accuracy before, and after a training that makes everything right, and of how many groups."""
        changes = self.baseline.compare({"test": accuracies_of(self.groups, True)})
        return (changes[-1].before, changes[-1].after, changes[-1].groups) if changes else None


def test_a_second_run_takes_the_first_one_s_baseline(tmp_path, monkeypatch, capsys):
    """Without losses, which depend on the objective; not with other labels; a damaged or unwritable cache costs an evaluation."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = groups(tmp_path)
    first = Run(tmp_path / "first", data, tmp_path)
    assert first.measure()["test"][-1].num == 100 and first.evaluated == ["test"], "100 of 120 are drawn"
    assert first.change == (0.0, 100.0, 100)
    second = Run(tmp_path / "second", data, tmp_path)
    assert second.measure()["test"][-1].num == 100 and second.evaluated == [] and second.change == first.change
    (cached,) = (tmp_path / "cache").rglob("*.json")
    assert read_json(cached)["rows"][-1]["losses"] == {} and "earlier run with this model" in capsys.readouterr().out
    relabelled = Run(tmp_path / "relabelled", groups(tmp_path, "size"), tmp_path)
    relabelled.measure()
    assert relabelled.evaluated == ["test"] and relabelled.change == first.change

    assert Run(tmp_path / "first", groups(tmp_path, count=119), tmp_path).change is None, "the set has changed since"
    for each in (nameless := [Run(tmp_path / f"nameless {n}", data, tmp_path) for n in range(2)]):
        each.baseline = replace(each.baseline, model=None)
        each.measure()
    assert all(each.evaluated == ["test"] for each in nameless), "nothing is cached for an unknown model"

    whole = Run(tmp_path / "whole", data, tmp_path, "--train.eval_on_start", "true")
    assert whole.measure()["test"][-1].nll == 0.5 and whole.change == (0.0, 100.0, 120)
    for damage in ("{", "[]", json.dumps({"rows": [{"name": "all"}]})):
        for file in (tmp_path / "cache").rglob("*.json"):
            file.write_text(damage)
        again = Run(tmp_path / "again", data, tmp_path)
        again.measure()
        assert again.evaluated == ["test"] and again.change == first.change, damage
    (again.folder / "baseline" / "test.json").write_text("{")
    assert again.change is None and "test.json cannot be read" in capsys.readouterr().out
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    alone = Run(tmp_path / "alone", data, tmp_path)
    alone.measure()
    assert alone.change == first.change
    off = Run(tmp_path / "alone", data, tmp_path, "--train.eval_on_start", "false")
    assert off.measure() == {} and off.evaluated == [] and off.change is None, "an earlier run's is removed"


def test_the_sample_is_the_same_groups_before_during_and_after_the_training(tmp_path):
    """Its accuracies are computed from evaluations of the sample and of sets that contain it; by hand from the groups' own outcomes."""
    data = groups(tmp_path, count=400)
    run = Run(tmp_path / "run", data, tmp_path)
    sample = EvaluationSample({"test": data, "few": data[:3]}, trained=1200, total_steps=10)
    assert [step for step in range(1, 11) if sample.is_due(step)] == [2, 5, 7]
    chosen = {group.id for group in sample.groups["test"]}
    assert len(chosen) == int(0.15 * 1200 / 3 * 400 / 403) and "few" not in sample.groups, "of 3 groups, the budget allows 1"

    def rows(found, right):
        scores = [torch.tensor([[1.0, 0.0], [0.0, 1.0]] if group.id in right else [[0.0, 1.0], [1.0, 0.0]]) for group in found]
        return accuracies(found, [GroupScores(each, torch.zeros(2)) for each in scores])

    right = set(sorted(chosen)[:50]) | {group.id for group in data if group.id not in chosen}
    expected = {"eval_sample/test/group": 100 * 50 / len(chosen)}
    assert sample.metrics({"test": rows(data, right)}) == expected == sample.metrics({"test": rows(sample.groups["test"], right)})
    drawn = [data[index] for index in replace(run.baseline, trained=1200)._drawn("test")]
    assert chosen <= {group.id for group in drawn} and sample.metrics({"test": rows(drawn, right)}) == expected, "the baseline contains it"
    assert not EvaluationSample({"test": data}, trained=500, total_steps=10).groups, "25 groups would be drawn"
    whole = EvaluationSample({"test": data[:30]}, trained=1200, total_steps=10)
    assert whole.counts["eval_sample/test/group"] == "30 of 30 groups" and whole.metrics({"test": rows(data[:30], right)}) == {}, (
        "eval/test/group has it"
    )
