"""The learning benchmark, without a training: its arms, its budget, its choice of a rate, its table, and that of the demo, by hand."""

from __future__ import annotations

import learning
import pytest
from conftest import read_json, read_rows, write_json, write_rows

from cfvlm_ds.core.config import HabitsConfig
from cfvlm_ds.demo import report as demo_report
from cfvlm_ds.demo.habits.build import build_habits, scenes_in
from cfvlm_ds.demo.habits.grammar import judge


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


def test_longer_and_swapped_texts(tmp_path):
    build_habits(HabitsConfig(str(tmp_path / "world"), num_train=100, num_test=8, num_questions=1))
    for data, swapped in ((learning.LONG_TEXTS, 0), (learning.WRONG, 5)):
        learning.write_data(tmp_path, data)
        plain, changed = (read_rows(learning.rows_of(tmp_path, each)) for each in (learning.PLAIN, data))
        more = [
            len(new["texts"][0]["text"].split()) - len(old["texts"][0]["text"].split()) for old, new in zip(plain, changed, strict=True)
        ]
        assert (sum(more) / len(more) > 45 and max(more) <= 60) if data == learning.LONG_TEXTS else max(more) < 3
        wrong, known = 0, {text["text"]: text.get("key") for row in plain for text in row["texts"]}
        for row in changed:
            match = {(image, text): value for image, text, value in row["match"]}
            truths = [
                [all(judge(text["text"], scene).statements.values()) for text in row["texts"][:2]] for scene in scenes_in(row["meta"])
            ]
            labels = [[match[f"i{i}", f"t{k}"] for k in range(2)] for i in range(2)]
            wrong += truths != labels
            keys = {text["text"]: text.get("key") for text in row["texts"]}
            assert data == learning.LONG_TEXTS or keys.items() <= known.items()
        assert wrong == swapped


def test_the_nll_of_a_set_relative_to_the_base():
    metric = "what colour: NLL"
    assert learning.LIKELIHOODS[metric] == "colour/nll" and len(learning.LIKELIHOODS) == 8

    def found(nll: dict) -> dict:
        return {"rate": "3e-4", "steps": 500, "axes": dict.fromkeys(demo_report.AXES, 60.0) | nll}

    base = dict.fromkeys(demo_report.AXES, 50.0) | {metric: 0.5}
    runs = {
        ("nll", "3e-4"): [found({})],
        ("default", "3e-4"): [found({}), found({metric: 0.45}), found({metric: 0.65})],
        ("credit", "3e-4"): [found({metric: 0.46})],
    }
    *_, row = learning.table(base, runs).splitlines()
    # differences -0.05 and 0.15: mean 0.05, deviation 0.1414; 12.71 * 0.1414 / sqrt(2) = 1.271
    assert row == f"| {metric} | 0.500 |  | +0.050 ± 1.271 (seeds: 2) | -0.040 |"


def test_the_demo_prints_its_run_beside_what_was_measured(tmp_path, monkeypatch):
    shipped = read_json(demo_report.MEASURED)
    assert {*shipped} == {*learning.DEMO} and all(each["mean"].keys() == demo_report.AXES.keys() for each in shipped.values())
    monkeypatch.setattr(demo_report, "MEASURED", tmp_path / "measured.json")
    write_json(demo_report.MEASURED, {"nll": {"title": "NLL", "seeds": 3, "mean": dict.fromkeys(demo_report.AXES, 61.04)}})
    lines = [
        {"step": 0, "eval/agrees/group": 50.0},
        {"step": 3, "loss": 1.0},
        {"step": 9, "eval/agrees/group": 71.0, "eval/pope/f1_macro": 8.0},
    ]
    write_rows(tmp_path / "metrics.jsonl", lines)
    rows = [line.split() for line in demo_report.report(tmp_path).splitlines()]
    assert rows[0] == ["%", "base", "NLL", "this", "run"] and rows[1] == ["pairs,", "habit", "agrees", "50.0", "61.0", "71.0"]
    assert ["POPE's", "form,", "F1", "61.0", "8.0"] in rows
    write_rows(tmp_path / "metrics.jsonl", lines[1:])
    assert demo_report.report(tmp_path).split()[:4] == ["%", "NLL", "this", "run"]
    write_rows(tmp_path / "metrics.jsonl", lines[1:2])
    assert "not evaluated" in demo_report.report(tmp_path)
