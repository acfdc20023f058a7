"""The learning benchmark, without a training: its arms, its budget, its choice of a rate, its table, and that of the demo, by hand."""

from __future__ import annotations

import json

import learning
import pytest
from conftest import write_rows

from cfvlm_ds.core.parsing import parse_config
from cfvlm_ds.demo import report as demo_report
from cfvlm_ds.demo.habits.build import TESTS
from cfvlm_ds.objectives import OBJECTIVES

TERMS = {
    "nll": {"align"},
    "dpo-nll": {"align", "dpo"},
    "mdpo": {"dpo"},
    "symmpo": {"symmpo"},
    "svco": {"svco"},
    "default": {"align", "csd", "fcd"},
    "light": {"align", "csd", "fcd"},
    "credit": {"align", "csd", "fcd"},
    "distill": {"align", "csd", "fcd", "contrast_distill"},
}


def test_every_arm_has_the_terms_of_its_title_and_every_axis_a_set_of_the_demo():
    for name, arm in learning.ARMS.items():
        config = parse_config(["--config", "examples/quickstart.yaml", *arm.options], OBJECTIVES)
        assert set(config.objective) == TERMS[name] and arm.scores == any(term.needs_reference for term in config.objective.values())
        assert {name for name, term in config.objective.items() if term.needs_tokens} == ({"csd", "fcd"} if name == "credit" else set())
    sets = {**config.data.evaluation_sets, **config.data.benchmark_sets}
    assert {metric.split("/")[0] for metric in demo_report.AXES.values()} == sets.keys()
    assert learning.evaluation_sets(learning.REPO).keys() == sets.keys()
    assert {f"test_{name}" for name in config.data.evaluation_sets} == {*TESTS}
    assert config.train.max_steps == learning.STEPS and config.build.habits.num_train == learning.TRAIN


def test_scores_and_steps_share_the_time():
    assert learning.affordable(2.0, 1.0, 0.0) == 250
    # A group's scores take 0.1 s, those of a step 1.2 s, and a step of 0.8 s: 2 s of 500 s for each.
    assert learning.affordable(0.8, 1.0, 0.1 * learning.TRAIN) == 250
    # All 6000 groups are scored in 60 s; 440 s remain.
    assert learning.affordable(0.1, 1.0, 60.0) == 4400
    assert learning.affordable(2.0, 1.0, 0.0, 200) == 100
    assert learning.affordable(0.1, 1.0, 60.0, 200) == 1400


def test_the_rate_that_was_best_on_the_validation_set(tmp_path, monkeypatch):
    tried = [("nll", "1e-4", 60.0), ("nll", "1e-3", 62.0), ("nll", "6e-4", 62.0), ("default", "3e-4", 70.0)]
    rows = [{"name": f"{arm}-{rate}", "arm": arm, "rate": rate, "validation": value} for arm, rate, value in tried]
    write_rows(tmp_path / "rates.jsonl", [*rows, {"name": "new", "arm": "nll", "rate": "1e-3", "budget": 200, "validation": 50.0}])
    monkeypatch.setattr(learning, "RECORDS", tmp_path)
    assert (learning.best_rate("nll", 500), learning.best_rate("default", 500)) == ("6e-4", "3e-4")
    assert (learning.best_rate("nll", 200), learning.best_rate("nll", 2000)) == ("1e-3", "6e-4")
    with pytest.raises(SystemExit):
        learning.best_rate("mdpo", 500)


def test_means_and_intervals_over_seeds():
    def found(value: float) -> dict:
        return {"rate": "3e-4", "steps": 500, "axes": dict.fromkeys(demo_report.AXES, value)}

    head, _, *rows = learning.table(
        dict.fromkeys(demo_report.AXES, 50.0), {("nll", "3e-4"): [found(60.0)], ("default", "3e-4"): [found(70.0), found(80.0)]}
    ).splitlines()
    assert "NLL (3e-4, 500 steps, seeds: 1)" in head and len(rows) == len(demo_report.AXES)
    # deviation 7.07; 12.71 * 7.07 / sqrt(2) = 63.5
    assert rows[0] == "| pairs, habit agrees | 50.0 | 60.0 | 75.0 ± 63.5 |"


def test_the_nll_of_a_set_relative_to_the_base():
    metric = "what colour: NLL"
    assert learning.LIKELIHOODS[metric] == "colour/nll" and len(learning.LIKELIHOODS) == 8

    def found(nll: dict) -> dict:
        return {"rate": "3e-4", "steps": 500, "axes": dict.fromkeys(demo_report.AXES, 60.0) | nll}

    base = dict.fromkeys(demo_report.AXES, 50.0) | {metric: 0.5}
    runs = {
        ("nll", "3e-4"): [found({})],
        ("light", "3e-4"): [found({}), found({metric: 0.45}), found({metric: 0.65})],
        ("default", "3e-4"): [found({metric: 0.46})],
    }
    *_, accuracy, row = learning.table(base, runs).splitlines()
    assert accuracy == "| outside the grammar | 50.0 | 60.0 | 60.0 ± 0.0 | 60.0 |"
    # differences -0.05 and 0.15: mean 0.05, deviation 0.1414; 12.71 * 0.1414 / sqrt(2) = 1.271
    assert row == f"| {metric} | 0.500 |  | +0.050 ± 1.271 (seeds: 2) | -0.040 |"


def test_a_table_per_budget_and_a_column_per_rate(tmp_path):
    assert (learning.Job("nll", "3e-4", 1).name, learning.Job("nll", "3e-4", 1, 200).name) == ("nll-3e-4-seed1", "nll-3e-4-seed1-200")

    def run(arm: str, rate: str, value: float, **more: int) -> dict:
        return {"arm": arm, "rate": rate, "steps": 510, "axes": dict.fromkeys(demo_report.AXES, value)} | more

    old, new, late = (
        run("light", "3e-4", 60.0),
        [run("light", "1e-4", 70.0, budget=500), run("light", "1e-4", 72.0, steps=480)],
        run("nll", "1e-3", 8.0),
    )
    short = run("svco", "1e-3", 55.0, budget=200)
    budgets = learning.by_budget([old, *new, short, late])
    assert budgets == {200: {("svco", "1e-3"): [short]}, 500: {("nll", "1e-3"): [late], ("light", "1e-4"): new, ("light", "3e-4"): [old]}}
    assert learning.by_arm(budgets[500]) == {"nll": [late], "light": new}
    base = dict.fromkeys(demo_report.AXES, 50.0)
    assert "contrast x 0.1 (1e-4, 480/510 steps, seeds: 2) | default" in learning.table(base, budgets[500])
    learning.time_figure(tmp_path / "time.png", base, {budget: learning.by_arm(runs) for budget, runs in budgets.items()})
    assert (tmp_path / "time.png").stat().st_size > 0


def test_the_table_of_a_new_budget_follows_that_of_500_steps_and_is_renewed_in_its_place():
    page = "a\n\n`python benchmarks/learning.py --report`:\n\n| old |\n\nb\n"
    tables = {200: "| 200 |", 500: "| 500 |"}
    once = learning.with_tables(page, tables)
    short = "`python benchmarks/learning.py --report --steps 200`:\n\n| 200 |"
    assert once == f"a\n\n`python benchmarks/learning.py --report`:\n\n| 500 |\n\n{short}\n\nb\n"
    assert learning.with_tables(once, tables) == once
    assert learning.with_tables(once, tables | {200: "| 201 |"}) == once.replace("| 200 |", "| 201 |")


def test_the_demo_prints_its_run_beside_what_was_measured(tmp_path, monkeypatch):
    shipped = json.loads(demo_report.MEASURED.read_text())
    assert {"nll", "light"} <= {*shipped} <= {*learning.DEMO} and all(
        each["mean"].keys() == demo_report.AXES.keys() for each in shipped.values()
    )
    monkeypatch.setattr(demo_report, "MEASURED", tmp_path / "measured.json")
    demo_report.MEASURED.write_text(json.dumps({"nll": {"title": "NLL", "seeds": 3, "mean": dict.fromkeys(demo_report.AXES, 61.04)}}))
    lines = [
        {"step": 0, "eval/agrees/group": 50.0},
        {"step": 3, "loss": 1.0},
        {"step": 9, "eval/agrees/group": 71.0, "eval/pope/f1_macro": 8.0},
    ]
    write_rows(tmp_path / "metrics.jsonl", lines)
    rows = [line.split() for line in demo_report.report(tmp_path).splitlines()]
    assert rows[0] == ["%", "base", "NLL", "this", "run"] and rows[2] == ["pairs,", "habit", "agrees", "50.0", "61.0", "71.0"]
    assert ["POPE's", "form,", "F1", "61.0", "8.0"] in rows
