"""The learning benchmark, without a training: its arms, its rows, its budget, its choice of a rate, and its tables by hand."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import learning
import learning_arms as arms
import learning_shown as pages
import learning_tables as shown
import pytest
from conftest import write_manifest

from cfvlm_ds.core.config import HabitsConfig
from cfvlm_ds.core.parsing import parse_config
from cfvlm_ds.data import read_manifest
from cfvlm_ds.data.cfgroup import from_row
from cfvlm_ds.demo import report as demo_report
from cfvlm_ds.demo.habits import build_habits
from cfvlm_ds.objectives import OBJECTIVES

TERMS = {
    "nll-factual": "align", "nll-all": "align", "dpo": "dpo", "dpo-nll": "align dpo", "mdpo": "dpo", "symmpo": "symmpo", "misp": "misp",
    "no-align": "csd fcd", "no-csd": "align fcd", "no-fcd": "align csd", "batch-align": "align csd fcd batch_align",
}  # fmt: skip
"""Of arms that have others than the default's."""


def test_every_arm_has_the_terms_of_its_title():
    options = {name: ["--config", "examples/quickstart.yaml", *arm.options] for name, arm in learning.KNOWN.items()}
    configs = {name: parse_config(each, OBJECTIVES) for name, each in options.items()}
    for name, arm in learning.KNOWN.items():
        objective = configs[name].objective
        assert set(objective) == set(TERMS.get(name, "align csd fcd").split()), name
        assert arm.scores == any(term.needs_reference or term.needs_prior for term in objective.values()), name
        assert (configs[name].model.language_model.tuning == "lora") == (name == "lora")
        if name.startswith("sharp"):
            assert name == f"sharp-{objective['csd'].margin:g}-{objective['fcd'].margin:g}" and objective["csd"].beta == 1
    assert (configs["dpo"].objective["dpo"].image_side, configs["mdpo"].objective["dpo"].image_side) == (0, 1)
    terms = [[configs[name].objective[term] for term in ("csd", "fcd")] for name in ("default", *learning.GRID)]
    default, calibrated, *tried = [[(each.weight, each.margin, each.beta) for each in pair] for pair in terms]
    assert calibrated == [(10, 0.5, 3)] * 2 and len({csd for csd, _ in tried}) == len(tried) == 6
    for csd, fcd in tried:
        assert csd == fcd and sum(one != other for one, other in zip(csd, default[0], strict=True)) == 1, "one setting at a time"


def test_rows_with_negatives_of_one_kind(tmp_path):
    """The factual pair, and false texts on its image or edited images for its text, as many as there were."""
    path = write_manifest(tmp_path / "m.jsonl", 9)
    for line, whole in zip(path.read_text().splitlines(), read_manifest(path), strict=True):
        texts, images = (from_row(arms.with_negatives(json.loads(line), kind), tmp_path) for kind in ("texts", "images"))
        assert texts.match == (whole.match[0],) and texts.candidates == whole.candidates and texts.images == whole.images[:1]
        assert images.match == tuple(row[:1] for row in whole.match) and images.images == whole.images
        assert [edit.type for edit in texts.edits] == [edit.type for edit in whole.edits if edit.type != "sham"]


def test_rows_of_the_world_keep_the_truth_of_questions(tmp_path):
    """Exchanged, every cell is wrong; with edited images only, the factual caption stays and the right answer to each question."""
    world = build_habits(HabitsConfig(str(tmp_path / "world"), num_train=8, num_test=1, num_questions=2), lambda line: None)
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    assert sum(len(row["texts"]) > 2 for row in rows) > 4
    for row in rows:
        whole, wrong, images = (from_row(each, world) for each in (row, arms.exchanged(row), arms.with_negatives(row, "images")))
        truth = [{(each.prompt, each.text): value for each, value in zip(group.candidates, group.match[i], strict=True)}
                 for group in (whole, wrong) for i in (0, 1)]  # fmt: skip
        assert all(truth[i + 2] == {text: 1 - value for text, value in truth[i].items()} for i in (0, 1))
        right = [each for each, value in zip(whole.candidates, whole.match[0], strict=True) if value]
        assert [*images.candidates] == right and len(right) == len(whole.candidates) / 2
        assert images.match == ((1,) * len(right), (0,) * len(right))


def test_rows_of_fewer_groups_of_wrong_ones_and_of_longer_captions(tmp_path):
    """Of 400 groups the first hundred; a tenth and a third whose pictures have each other's captions, the tenth among the third; and
    captions with the same true statements at one place of both texts, about things that neither names."""
    first, second = "There are two red cups. This is a lake scene.", "There are two red cups. This is a night scene."
    texts = [{"id": "t0", "text": first, "key": "k0"}, {"id": "t1", "text": second, "key": "k1"}]
    world = [{"id": f"g{k}", "texts": texts, "match": [["i0", "t0", 1], ["i0", "t1", 0]]} for k in range(400)]
    settings: list[dict[str, int]] = [{"groups": 100}, {}, {"noise": 10}, {"noise": 30}, {"more": 14}]
    jobs = [arms.Job("default", "1e-3", 0, **each) for each in settings]
    few, whole, some, more, longer = ([*arms.rows_of(job, world)] for job in jobs)
    assert (few, whole) == (world[:100], world)
    wrong = [{row["id"] for row in rows if row["texts"] != texts} for rows in (some, more)]
    assert 24 <= len(wrong[0]) <= 56 and 92 <= len(wrong[1]) <= 148 and wrong[0] < wrong[1]
    assert {tuple(text["text"] for text in row["texts"]) for row in more} == {(first, second), (second, first)}
    assert all(row["match"] == world[0]["match"] and [text["id"] for text in row["texts"]] == ["t0", "t1"] for row in more)
    places = set()
    for row in longer:
        said, other = (text["text"] for text in row["texts"])
        before, _, after = said.partition(first)
        absent = re.findall(r"There is no (\w+ \w+)\.", before + after)
        assert len(set(absent)) == 14 and not any("cup" in each for each in absent)
        assert other == before + second + after
        places.add(before.count("."))
    assert len(places) > 10
    assert len({job.name for job in jobs}) == len({job.rows(tmp_path) for job in jobs}) == 5, "no run is taken for another"
    assert {job.tests(tmp_path, "combo").name for job in jobs} == {"test_combo.jsonl", "test_combo_more14.jsonl"}


def test_steps_are_those_of_the_time_of_the_default():
    costs = {("nll-all", 0): 2 / 3, ("nll-all", 14): 5 / 9}
    jobs = [arms.Job(arm, "1e-3", 0, more=more) for arm in ("nll-all", "default", "calibrated") for more in (0, 14)]
    assert [learning.steps_of(job, costs) for job in jobs] == [1500, 1800, 1000, 1000, 1000, 1000]


def test_the_time_of_all_starts_counts_and_a_run_of_another_objective_is_refused(tmp_path):
    """A process that is stopped before its last file, one that fails, one that ends; then none runs, unless a default has changed since."""
    script = "import sys, time; b = time.process_time()\nwhile time.process_time() < b + 0.1: pass\n"
    folder = tmp_path / "run"
    for more in ("", "sys.exit(3)"):
        with pytest.raises(SystemExit):
            learning.run_process([sys.executable, "-c", script + more], folder, {}, "finished.json")
    (folder / "finished.json").write_text("{}")
    spent = learning.run_process([sys.executable, "-c", script], folder, {}, "finished.json")
    assert spent > 0.3 and learning.run_process(["no such program"], folder, {}, "finished.json") == pytest.approx(spent, abs=0.01)
    command = ["python", "train.py", "--config", "examples/quickstart.yaml", "--objective.csd.weight=0.5"]
    options = parse_config(command[2:], OBJECTIVES).resolved
    (folder / "config.yaml").write_text(json.dumps(options, default=str))
    assert learning.run_process(command, folder, {}, "finished.json") == pytest.approx(spent, abs=0.01)
    options["objective"]["csd"]["beta"] += 1
    (folder / "config.yaml").write_text(json.dumps(options, default=str))
    with pytest.raises(SystemExit, match="objective"):
        learning.run_process(command, folder, {}, "finished.json")


def test_a_rate_is_chosen_by_its_mean_on_the_validation_split(tmp_path, monkeypatch):
    """Every rate has one seed, the two best of them a second one; a rate that had luck with the first does not win by it."""
    monkeypatch.setattr(learning, "RECORDS", tmp_path)

    def found(arm: str, seed: int, **values: float) -> None:
        for rate, value in values.items():
            record = {"arm": arm, "rate": rate, "seed": seed, "steps": 7, "validation": value}
            learning.add_record(tmp_path / learning.RATE_RUNS, arms.Job(arm, rate, seed).name, record)

    assert learning.rates_to_try("default", 0) == arms.RATES and learning.best_rates("default", 1) == []
    found("default", 0, **{"1e-4": 60, "3e-4": 64, "6e-4": 64, "1e-3": 70, "2e-3": 99})
    found("dpo", 0, **{"3e-4": 10, "1e-3": 80})
    assert learning.best_rates("default", 1) == ["1e-3", "3e-4", "6e-4", "1e-4"], "of equals the lower; of its rates alone"
    assert learning.best_rates("default", 2) == []
    found("default", 1, **{"1e-3": 50})
    assert learning.rates_to_try("default", 1) == ["1e-3", "3e-4"], "whatever the second seed says of one of them"
    found("default", 1, **{"3e-4": 60})
    assert learning.best_rates("default", 2) == ["3e-4", "1e-3"]


def test_pages_say_what_the_records_say(tmp_path, monkeypatch):
    """Each table of runs in RESULTS.md and TRIALS.md is the one of its command; --report makes it of a page with other figures."""
    originals = [page.read_text() for page in learning.PAGES]
    copies = [tmp_path / page.name for page in learning.PAGES]
    for text, copy in zip(originals, copies, strict=True):
        copy.write_text(re.sub(r"^\| NLL, all pairs \| \d.*\n", "| 0 |\n", text, flags=re.MULTILINE))
        assert copy.read_text() != text
    monkeypatch.setattr(learning, "PAGES", copies)
    records = learning.read_records(learning.RECORDS / learning.RUNS)
    learning.write_pages(records, records.pop(learning.BASE), list(learning.read_records(learning.RECORDS / learning.RATE_RUNS).values()))
    assert [copy.read_text() for copy in copies] == originals, "run benchmarks/learning.py --report"
    for name, table in pages.TABLES.items():
        assert pages.missing(table, records) == []
        assert sum(text.count(f"`python benchmarks/learning.py --table {name}`") for text in originals) == 1, f"{name} is shown"


def test_a_table_is_what_its_rows_say():
    """Two seeds have no interval and three have one, by hand; differences are of equal seeds; the base is one row without a rate."""

    def found(seed: int, value: float) -> dict[str, Any]:
        cells = {edit: {"group": value, "groups": 9} for edit in ("shape", "relation", "all")}
        return {"steps": 10 + seed, "nll": {"combo": value / 100}, "results": {"combo": cells}}

    rows = [pages.Row("base"), pages.Row("two", "dpo", seeds=(0, 1)), pages.Row("three", "default", "1e-3", (0, 1, 2), groups=50)]
    rows.append(pages.Row("above", "default", "1e-3", (0, 1, 2), above=True, groups=50))
    table = pages.Table(tuple(rows), ("shape", "nats per token: captions"), each=("all",))
    names = [f"dpo-3e-4-seed{k}" for k in range(2)] + [f"{arm}-1e-3-seed{k}-50groups" for arm in ("default", "nll-all") for k in range(3)]
    assert [job.name for job in table.jobs] == names
    values = dict(zip(names, (10.0, 30.0, 61.0, 62.0, 63.0, 60.0, 60.0, 59.0), strict=True))
    records = {name: found(int(name.split("seed")[1][0]), value) for name, value in values.items()}
    base = {"combo": {"shape": 5.0, "all": 6.0, "relation": 5.0}}
    assert pages.missing(table, {name: {} for name in names[1:]}) == names[:1]
    # 61, 62, 63: deviation 1, 4.30 / sqrt(3) = 2.48; differences 1, 2, 4: mean 2.33, deviation 1.53, 3.79
    assert pages.text_of(table, records, base).splitlines()[2:] == [
        "| base | | | | 5.0 | | 6.0 |",
        "| two | 3e-4 | 2 | 10/11 | 20.0 | -0.20 | 10.0, 30.0 |",
        "| three | 1e-3 | 3 | 10/11/12 | 62.0 ± 2.5 | -0.62 ± 0.02 | 61.0, 62.0, 63.0 |",
        "| above | | | | +2.3 ± 3.8 | | |",
    ]
    runs = [("nll-all", 0, 60.0), ("nll-all", 1, 61.0), ("nll-all", 2, 65.0), ("dpo", 0, 62.0), ("dpo", 1, 64.0)]
    every = {"rate": "1e-3", "capability": "", "threads": 1, "processor_seconds": 1}
    means, differences, each = shown.tables([found(seed, value) | every | {"arm": arm, "seed": seed} for arm, seed, value in runs], base)
    # differences 2 and 3: mean 2.5, deviation 0.71, 12.71 * 0.71 / sqrt(2) = 6.4
    assert "| DPO | 1e-3 | 2 | +2.5 ± 6.4 |" in differences and "NLL, all pairs | 1e-3" not in differences
    assert " | 2 | 10/11 | 63.0 ± 12.7 |" in means and each.count("\n") == len(runs) + 1


def test_the_demo_prints_its_run_beside_what_was_measured(tmp_path, monkeypatch):
    def found(relation: float) -> dict[str, Any]:
        rows = {"combo": {"relation": relation, "all": 80.0}, "yes_no": {"relation": 50.0, "all": 60.0}}
        return {split: {edit: {"group": value} for edit, value in edits.items()} for split, edits in rows.items()}

    base = {"combo": {"relation": 62.94, "all": 74.5}, "yes_no": {"relation": 10.0, "all": 34.6}}
    measured = learning.for_demo(base, {"nll": [found(71.0)], "default": [found(value) for value in (86.0, 88.0, 90.6)]})
    shipped = json.loads(demo_report.MEASURED.read_text())
    assert shipped.keys() == measured.keys() and shipped["base"].keys() == {"combo", "yes_no", "choice", "count"}
    monkeypatch.setattr(demo_report, "MEASURED", tmp_path / "measured.json")
    demo_report.MEASURED.write_text(json.dumps(measured))
    run = {"combo": {"relation": 89.0, "all": 81.0}, "yes_no": {"relation": 8.0, "all": 33.0}}
    rows = {split: [{"name": edit, "num": 50, "metrics": {"group": v}} for edit, v in edits.items()] for split, edits in run.items()}
    (tmp_path / "results.json").write_text(json.dumps(rows))
    lines = [line.split() for line in demo_report.report(tmp_path).splitlines() if line]
    assert lines[1] == ["relation", "62.9", "71.0", "88.2", "(86.0", "to", "90.6)", "89.0"]
    assert lines[3][-7:] == ["34.6", "60.0", "60.0", "(60.0", "to", "60.0)", "33.0"]
