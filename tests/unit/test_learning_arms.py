"""The learning benchmark, without a training: its arms are what their titles say, its records are read, a rate is chosen by validation."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import learning
import learning_arms as arms
import learning_shown as pages
import learning_tables as shown
import pytest
from conftest import write_manifest

from cfvlm_ds.core.parsing import parse_config
from cfvlm_ds.data import read_manifest
from cfvlm_ds.data.cfgroup import from_row
from cfvlm_ds.demo import report as demo_report
from cfvlm_ds.demo.scenes.edits import EDITS
from cfvlm_ds.objectives import OBJECTIVES, required_cells

TERMS = {
    "nll-factual": {"align"},
    "nll-all": {"align"},
    "dpo": {"dpo"},
    "dpo-nll": {"align", "dpo"},
    "mdpo": {"dpo"},
    "symmpo": {"symmpo"},
    "misp": {"misp"},
    "no-align": {"csd", "fcd"},
    "no-csd": {"align", "fcd"},
    "no-fcd": {"align", "csd"},
    "batch-align": {"align", "csd", "fcd", "batch_align"},
}


def test_every_arm_is_a_run_and_has_the_terms_of_its_title():
    assert TERMS.keys() < learning.ARMS.keys() and len({arm.title for arm in learning.KNOWN.values()}) == len(learning.KNOWN)
    options = {name: ["--config", "examples/quickstart.yaml", *arm.options] for name, arm in learning.KNOWN.items()}
    configs = {name: parse_config(each, OBJECTIVES) for name, each in options.items()}
    for name, arm in learning.KNOWN.items():
        config = configs[name]
        assert set(config.objective) == TERMS.get(name, {"align", "csd", "fcd"}), name
        assert arm.scores == any(term.needs_reference or term.needs_prior for term in config.objective.values()), name
        assert len(arm.rates) == 4 and all(float(rate) > 0 for rate in arm.rates)
        assert (config.model.language_model.tuning == "lora") == (name == "lora")
    assert (configs["dpo"].objective["dpo"].image_side, configs["mdpo"].objective["dpo"].image_side) == (0, 1)
    assert required_cells(configs["mdpo"].objective) == "star"
    grid = [configs[name].objective for name in learning.GRID]
    settings = [[(each[term].weight, each[term].margin, each[term].beta) for term in ("csd", "fcd")] for each in grid]
    assert all(csd == fcd for csd, fcd in settings) and len({csd for csd, _ in settings}) == len(grid) == 7
    assert grid[0]["fcd"].len_norm == "anchor" and settings[0][0] == (10, 0.5, 3)
    csd = configs["default"].objective["csd"]
    default = (csd.weight, csd.margin, csd.beta)
    assert all(sum(one != other for one, other in zip(tried, default, strict=True)) == 1 for tried, _ in settings[1:])
    for name in learning.SHARP:
        found = configs[name].objective
        assert name == f"sharp-{found['csd'].margin:g}-{found['fcd'].margin:g}" and found["csd"].beta == found["fcd"].beta == 1
    longer = configs["calibrated-long"].objective
    assert [(longer[term].len_norm, longer[term].margin) for term in ("csd", "fcd")] == [("anchor", 0.076)] * 2


def test_rows_with_negatives_of_one_kind(tmp_path):
    """Read as any row: the factual pair, and false texts on its image or edited images for its text, as many as there were."""
    path = write_manifest(tmp_path / "m.jsonl", 9)
    for line, whole in zip(path.read_text().splitlines(), read_manifest(path), strict=True):
        texts, images = (from_row(arms.with_negatives(json.loads(line), kind), tmp_path) for kind in ("texts", "images"))
        assert texts.match == (whole.match[0],) and texts.candidates == whole.candidates and texts.images == whole.images[:1]
        assert images.match == tuple(row[:1] for row in whole.match) and images.images == whole.images
        assert [edit.type for edit in texts.edits] == [edit.type for edit in whole.edits if edit.type != "sham"]
        assert all(edit.image is None for edit in texts.edits) and all(edit.text is None for edit in images.edits)


def test_rows_of_fewer_groups_and_of_wrong_ones(tmp_path):
    """Of 400 groups the first hundred, and a tenth and a third in which each picture has the other's caption, the tenth among the third."""
    texts = [{"id": "t0", "text": "a red car"}, {"id": "t1", "text": "a blue car"}]
    world = [{"id": f"g{k}", "texts": texts, "match": [["i0", "t0", 1], ["i0", "t1", 0]]} for k in range(400)]
    jobs = [arms.Job("default", "1e-3", 0, groups=groups, noise=noise) for groups, noise in ((100, 0), (0, 10), (0, 30), (0, 0))]
    few, some, more, whole = ([*arms.rows_of(job, world)] for job in jobs)
    assert (few, whole) == (world[:100], world)
    wrong = [{row["id"] for row, old in zip(rows, world, strict=True) if row != old} for rows in (some, more)]
    assert 24 <= len(wrong[0]) <= 56 and 92 <= len(wrong[1]) <= 148 and wrong[0] < wrong[1]
    for row, old in zip(more, world, strict=True):
        if row["id"] in wrong[1]:
            assert [text["text"] for text in row["texts"]] == [text["text"] for text in reversed(old["texts"])]
            assert [text["id"] for text in row["texts"]] == ["t0", "t1"] and row["match"] == old["match"]
    names = [job.rows(tmp_path).name for job in (*jobs, arms.Job("texts", "1e-3", 0, groups=50, noise=5))]
    assert [arms.Job(arm, "1e-3", 0).rows(tmp_path).parent.name for arm in ("default", "hardest")] == ["scenes", "scenes-3"]
    larger = arms.Job("default", "1e-3", 0, groups=16_001)
    assert larger.rows(tmp_path) == tmp_path / "scenes-of-16001" / "train.jsonl"
    assert larger.tests(tmp_path, "combo") == jobs[0].tests(tmp_path, "combo") == tmp_path / "scenes" / "test_combo.jsonl"
    assert names == ["train_100.jsonl", "train_noise10.jsonl", "train_noise30.jsonl", "train.jsonl", "train_texts_50_noise5.jsonl"]
    assert len({job.name for job in jobs}) == 4 and jobs[3].name == "default-1e-3-seed0"


def test_longer_captions_stay_true_and_differ_in_the_same_words(tmp_path):
    """Statements of things that no caption of the row names, the same ones at the same place; questions are as they were."""
    texts = [
        {"id": "t0", "text": "two red circles above a blue star", "key": "k0"},
        {"id": "t1", "text": "two red circles below a blue star", "key": "k1"},
    ]
    world = [{"id": f"g{k}", "texts": texts} for k in range(200)] + [{"id": "q", "texts": [{"id": "t0", "text": "yes"}]}]
    job = arms.Job("default", "1e-3", 0, more=14)
    rows = [*arms.rows_of(job, world)]
    assert rows[-1] == world[-1] and [*arms.rows_of(arms.Job("default", "1e-3", 0), world)] == world
    places = set()
    for row in rows[:-1]:
        first, second = (text["text"].split(" and ") for text in row["texts"])
        (place,) = (k for k, part in enumerate(first) if part == texts[0]["text"])
        others = first[:place] + first[place + 1 :]
        assert len(set(others)) == 14 and all(part.startswith("no ") and part[3:] not in "red circle blue star" for part in others)
        assert second == [*first[:place], texts[1]["text"], *first[place + 1 :]]
        places.add(place)
    assert len(places) > 10 and not {"no red circle", "no blue star"} & {
        part for row in rows[:-1] for part in row["texts"][0]["text"].split(" and ")
    }
    assert job.name == "default-1e-3-seed0-more14" and job.rows(tmp_path).name == "train_more14.jsonl"
    assert [job.tests(tmp_path, split).name for split in ("combo", "yes_no", "validation")] == [
        "test_combo_more14.jsonl",
        "test_yes_no.jsonl",
        "validation_more14.jsonl",
    ]


def test_steps_are_those_of_the_time_of_the_default():
    costs = {("nll-all", 0): 2 / 3, ("nll-all", 14): 5 / 9}
    jobs = [arms.Job(arm, "1e-3", 0, more=more) for arm in ("nll-all", "default", "calibrated") for more in (0, 14)]
    assert [learning.steps_of(job, costs) for job in jobs] == [1500, 1800, 1000, 1000, 1000, 1000]


def test_a_run_that_was_stopped_is_not_whole_and_its_time_counts(tmp_path):
    """A process that ends without its last file (stopped), one that fails, one that ends; then nothing is run."""
    script = "import sys, time; b = time.process_time()\nwhile time.process_time() < b + 0.1: pass\n"
    folder = tmp_path / "weight-0.3-run"
    for more in ("", "sys.exit(3)"):
        with pytest.raises(SystemExit, match="exit code 3" if more else "stopped before its end; the same command continues"):
            learning.run_process([sys.executable, "-c", script + more], folder, {}, "finished.json")
    (folder / "finished.json").write_text("{}")
    spent = learning.run_process([sys.executable, "-c", script], folder, {}, "finished.json")
    assert spent > 0.3 and learning.run_process(["no such program"], folder, {}, "finished.json") == pytest.approx(spent, abs=0.01)
    assert {path.name for path in tmp_path.iterdir()} == {"weight-0.3-run", "weight-0.3-run.log"}, "a log of its own"


def test_a_finished_run_of_another_objective_is_not_taken_for_this_one(tmp_path):
    """As it is after a default has changed: the command is the same, and what it means is not."""
    command = ["python", "train.py", "--config", "examples/quickstart.yaml", "--objective.csd.weight=0.5"]
    options = parse_config(command[2:], OBJECTIVES).resolved
    (tmp_path / "processor_seconds").write_text("7.00")
    for beta, taken in ((options["objective"]["csd"]["beta"], True), (1.0, False)):
        changed = {**options["objective"], "csd": {**options["objective"]["csd"], "beta": beta}}
        (tmp_path / "config.yaml").write_text(json.dumps({**options, "objective": changed}, default=str))
        if taken:
            assert learning.run_process(command, tmp_path, {}, "finished.json") == 7
        else:
            with pytest.raises(SystemExit, match="is a run with another objective"):
                learning.run_process(command, tmp_path, {}, "finished.json")


def test_an_arm_gets_scores_of_the_base_whatever_arms_share_its_rows(tmp_path, monkeypatch):
    """One scoring of each manifest on which an arm that needs it trains, be it named first or last."""
    called: list[list[str]] = []
    built: list[tuple[Path, Any]] = []
    monkeypatch.setattr(learning, "train", lambda _, folder, job, steps: built.append((folder, job)) if folder.name != "build" else None)
    monkeypatch.setattr(learning.subprocess, "run", lambda command, **_: called.append(command))
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "train.jsonl").write_text(json.dumps({"id": "g0"}) + "\n")
    for names in (("dpo", "default"), ("default", "dpo", "mdpo"), ("default", "nll-all")):
        learning.prepare(argparse.Namespace(out=tmp_path), [arms.Job(name, "1e-3", 0) for name in names])
    manifest = str(tmp_path / "scenes" / "train.jsonl")
    assert not built, "of the world that every run has"
    (tmp_path / "scenes-of-20000").mkdir()
    (tmp_path / "scenes-of-20000" / "train.jsonl").write_text(json.dumps({"id": "g0"}) + "\n")
    learning.prepare(argparse.Namespace(out=tmp_path), [arms.Job("dpo", "1e-3", 0, groups=20_000)])
    assert [(folder.name, job.arm, job.groups) for folder, job in built] == [("build-of-20000", "default", 20_000)]
    larger = str(tmp_path / "scenes-of-20000" / "train.jsonl")
    wanted = [("score", name) for name in (manifest, manifest, larger, manifest)]  # the last to time a step
    assert [(command[3], command[5]) for command in called] == wanted


def test_a_rate_is_chosen_by_its_mean_on_the_validation_split(tmp_path, monkeypatch):
    """Every rate has one seed, the two best of them a second one; a rate that had luck with the first does not win by it."""
    for module in (arms, learning):
        monkeypatch.setattr(module, "RECORDS", tmp_path)

    def found(arm: str, rate: str, seed: int, value: float) -> None:
        record = {"arm": arm, "rate": rate, "seed": seed, "steps": 7, "validation": value}
        learning.add_record(tmp_path / learning.RATE_RUNS, arms.Job(arm, rate, seed).name, record)

    assert learning.rates_to_try("default", 0) == arms.RATES and learning.best_rates("default", 1) == []
    for rate, value in (("1e-4", 60), ("3e-4", 64), ("6e-4", 64), ("1e-3", 70), ("2e-3", 99)):
        found("default", rate, 0, value)
        found("dpo", rate, 0, 10)
    assert learning.best_rates("default", 1) == ["1e-3", "3e-4", "6e-4", "1e-4"], "of equals the lower; of its rates alone"
    assert learning.best_rates("default", 2) == []
    for rate, value in (("1e-3", 50), ("3e-4", 60)):
        assert learning.rates_to_try("default", 1) == ["1e-3", "3e-4"], "whatever the second seed says of one of them"
        found("default", rate, 1, value)
    assert learning.best_rates("default", 2) == ["3e-4", "1e-3"] and learning.best_rates("dpo", 1)[0] == "1e-4"
    table = shown.choices(list(learning.read_records(tmp_path / learning.RATE_RUNS).values()))
    assert table.splitlines()[0].endswith("| 1e-4 | 3e-4 | 6e-4 | 1e-3 | 2e-3 |")
    assert "| default objective | 7 | 60.0 | 64.0, 60.0 | 64.0 | 70.0, 50.0 | 99.0 |" in table and table.count("\n") == 3


def test_a_run_takes_the_training_of_the_choice_of_its_rate(tmp_path):
    """All of it but what says that it has ended and what it was evaluated on, if it took as many steps and none has begun by itself."""
    choice, folder = tmp_path / "rates" / "run", tmp_path / "run"
    (choice / "checkpoint-20").mkdir(parents=True)
    for name in ("checkpoint-20/weights", "metrics.jsonl", "finished.json", "results.json", "results.md"):
        (choice / name).write_text(name)
    learning.go_on_from_choice(choice, folder, 20)
    assert not folder.exists(), "it has not ended"
    (choice / "processor_seconds").write_text("7.00\n")
    learning.go_on_from_choice(choice, folder, 21)
    assert not folder.exists(), "of other steps"
    learning.go_on_from_choice(choice, folder, 20)
    taken = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert taken == {"checkpoint-20/weights", "metrics.jsonl", "processor_seconds_so_far"}
    ends = [sys.executable, "-c", f"open({str(folder / 'finished.json')!r}, 'w')"]
    assert learning.run_process(ends, folder, {}, "finished.json") > 7, "the time of the training counts"
    (folder / "metrics.jsonl").write_text("its own")
    learning.go_on_from_choice(choice, folder, 20)
    assert (folder / "metrics.jsonl").read_text() == "its own"


def test_tables_of_records_of_any_age():
    """Those of the repository, one seed alone, and differences from the control by seeds that both have, the interval by hand."""
    named = learning.read_records(learning.RECORDS / learning.RUNS)
    base, records = named.pop(learning.BASE), list(named.values())
    assert {record["arm"] for record in records} >= {"default", "nll-all"}
    means, differences, each = shown.tables(records, base)
    of = {
        arm: {each["seed"] for each in records if shown.told(each) == (arm, rate, shown.BEST)}
        for arm, rate in (("sharp-1-5", "1e-3"), ("nll-all", "1e-3"), *learning.SHOWN.values())
    }
    assert of["default"], "what the figure and the demo show is there"
    assert "| beta 1, margins 1 and 5 | 1e-3 |" in means and " ± " in means
    both = of["sharp-1-5"] & {each["seed"] for each in records if shown.told(each) == ("nll-all", "1e-3", shown.BEST)}
    assert f"| beta 1, margins 1 and 5 | 1e-3 | {len(both)} | " in differences and len(both) > 1
    assert each.count("\n") == len(records) + 1, "a line for each run, and two for the head"
    tables = list(shown.tables([record for record in records if record["seed"] == 0], base))
    assert len(tables) == 2 and " ± " not in tables[0], "one seed makes no interval"

    def seeded(arm: str, seed: int, by: float) -> dict[str, Any]:
        record = next(each for each in records if each["arm"] == "nll-all")
        moved = {edit: row | {"group": row["group"] + by} for edit, row in record["results"]["combo"].items()}
        return record | {"arm": arm, "seed": seed, "results": record["results"] | {"combo": moved}}

    three = [seeded("nll-all", seed, by) for seed, by in enumerate((0.0, 1.0, 5.0))] + [
        seeded("dpo", seed, by) for seed, by in enumerate((2.0, 4.0))
    ]
    table = list(shown.tables(three, base))[1]
    # differences 2 and 3: mean 2.5, deviation 0.71, 12.71 * 0.71 / sqrt(2) = 6.4
    assert "| DPO | 1e-3 | 2 | +2.5 ± 6.4 |" in table and "NLL, all pairs | 1e-3" not in table


def test_pages_say_what_the_records_say(tmp_path, monkeypatch):
    """Each table of runs in RESULTS.md and TRIALS.md is the one that its command prints; of a page with other figures --report makes it."""
    originals = [page.read_text() for page in learning.PAGES]
    copies = [tmp_path / page.name for page in learning.PAGES]
    for text, copy in zip(originals, copies, strict=True):
        copy.write_text(re.sub(r"^\| NLL, all pairs \| \d.*\n", "| 0 |\n", text, flags=re.MULTILINE))
    assert all(copy.read_text() != text for text, copy in zip(originals, copies, strict=True))
    monkeypatch.setattr(learning, "PAGES", copies)
    records = learning.read_records(learning.RECORDS / learning.RUNS)
    learning.write_pages(records, records.pop(learning.BASE), list(learning.read_records(learning.RECORDS / learning.RATE_RUNS).values()))
    assert [copy.read_text() for copy in copies] == originals, "run benchmarks/learning.py --report"
    for name, table in pages.TABLES.items():
        assert pages.missing(table, records) == []
        assert sum(text.count(f"`python benchmarks/learning.py --table {name}`") for text in originals) == 1, f"{name} is shown"


def test_a_table_is_what_its_rows_say():
    """Two seeds have no interval and three have one, by hand; differences are of equal seeds; the base is one row without a rate."""

    def found(arm: str, seed: int, value: float) -> dict[str, Any]:
        return {
            "steps": 10 + seed,
            "nll": {"combo": value / 100},
            "results": {"combo": {"shape": {"group": value}, "all": {"group": value}}},
        }

    rows = [pages.Row("base"), pages.Row("two", "dpo", seeds=(0, 1)), pages.Row("three", "default", "1e-3", (0, 1, 2), groups=50)]
    rows.append(pages.Row("above", "default", "1e-3", (0, 1, 2), above=True, groups=50))
    table = pages.Table(tuple(rows), ("shape", "nats per token: captions"), each=("all",))
    names = ["dpo-3e-4-seed0", "dpo-3e-4-seed1", *(f"default-1e-3-seed{k}-50groups" for k in range(3))]
    names += [f"nll-all-1e-3-seed{k}-50groups" for k in range(3)]
    assert [job.name for job in table.jobs] == names
    values = dict(zip(names, (10.0, 30.0, 61.0, 62.0, 63.0, 60.0, 60.0, 59.0), strict=True))
    records = {name: found(name, int(name.split("seed")[1][0]), value) for name, value in values.items()}
    base = {"combo": {"shape": 5.0, "all": 6.0}}
    assert pages.missing(table, {name: {} for name in names[1:]}) == names[:1]
    # 61, 62, 63: deviation 1, 4.30 / sqrt(3) = 2.48; differences 1, 2, 4: mean 2.33, deviation 1.53, 3.79
    assert pages.text_of(table, records, base).splitlines()[2:] == [
        "| base | | | | 5.0 | | 6.0 |",
        "| two | 3e-4 | 2 | 10/11 | 20.0 | -0.20 | 10.0, 30.0 |",
        "| three | 1e-3 | 3 | 10/11/12 | 62.0 ± 2.5 | -0.62 ± 0.02 | 61.0, 62.0, 63.0 |",
        "| above | | | | +2.3 ± 3.8 | | |",
    ]


def test_a_page_has_the_table_of_a_command_once():
    page = "As `python a.py --table x` says, and more\nof it:\n\n| old |\n|---|\n| 1 |\n\nThen `python a.py --table y`:\n\n| two |\n"
    one, two = ("a.py --table x", "| new |\n|---|"), ("a.py --table y", "| 2 |")
    renewed = shown.renewed(page, [one, two])
    assert renewed == page.replace("| old |\n|---|\n| 1 |", "| new |\n|---|").replace("| two |", "| 2 |")
    assert shown.renewed(renewed, [two, one]) == renewed
    for wrong in ("a.py --table", "a.py --table z"):
        with pytest.raises(ValueError, match=f"`python {wrong}` must occur exactly once, before its table"):
            shown.renewed(page, [(wrong, "| 3 |")])
    with pytest.raises(ValueError, match="must occur exactly once"):
        shown.renewed(page + page, [one])


def test_a_table_runs_what_it_lacks(tmp_path, monkeypatch, capsys):
    """The base first, with the default's own first run; of the others those that have no record; then it prints."""
    table = pages.Table((pages.Row("base"), pages.Row("DPO", "dpo", seeds=(0, 1))), ("all",), num_test=90)
    ran, runs = list[tuple[str, int]](), tmp_path / learning.RUNS

    def run(arguments: argparse.Namespace, job: Any, steps: int) -> None:
        ran.append((job.name, arguments.num_test))
        learning.add_record(runs, job.name, {"steps": 3, "results": {"combo": {"all": {"group": 40.0}}}})
        if job.arm == "default":
            learning.add_record(runs, learning.BASE, {"combo": {"all": 20.0}})

    for module in (arms, learning):
        monkeypatch.setattr(module, "RECORDS", tmp_path)
    monkeypatch.setattr(learning, "TABLES", {"x": table})
    for name, function in {"run": run, "prepare": lambda *given: None, "cost": lambda *given: 1.0}.items():
        monkeypatch.setattr(learning, name, function)
    learning.add_record(runs, arms.Job("dpo", "3e-4", 1).name, {"steps": 4, "results": {"combo": {"all": {"group": 50.0}}}})
    for _ in range(2):
        learning.show(argparse.Namespace(num_test=9000, jobs=1), "x")
    assert ran == [("default-3e-4-seed0", 90), ("dpo-3e-4-seed0", 90)]
    assert capsys.readouterr().out.count("| base | | | | 20.0 |\n| DPO | 3e-4 | 2 | 3/4 | 45.0 |\n") == 2


def test_the_demo_prints_its_run_beside_what_was_measured(tmp_path, monkeypatch):
    def found(relation: float) -> dict[str, Any]:
        rows = {"combo": {"relation": relation, "all": 80.0}, "yes_no": {"relation": 50.0, "all": 60.0}}
        return {split: {edit: {"groups": 1000, "group": value} for edit, value in edits.items()} for split, edits in rows.items()}

    base = {"combo": {"relation": 62.94, "all": 74.5}, "yes_no": {"relation": 10.0, "all": 34.6}}
    told = learning.for_demo(base, {"nll": [found(71.0)], "default": [found(value) for value in (86.0, 88.0, 90.6)]})
    assert told["default"]["seeds"] == 3 and told["base"]["combo"]["relation"] == 62.9
    assert [told["default"][which]["combo"]["relation"] for which in ("mean", "lowest", "highest")] == [88.2, 86.0, 90.6]
    monkeypatch.setattr(demo_report, "MEASURED", tmp_path / "measured.json")
    demo_report.MEASURED.write_text(json.dumps(told))
    run = {"combo": {"relation": 89.0, "all": 81.0}, "yes_no": {"relation": 8.0, "all": 33.0}}
    rows = {
        split: [{"name": edit, "num": 50, "metrics": {"group": value}} for edit, value in edits.items()] for split, edits in run.items()
    }
    (tmp_path / "results.json").write_text(json.dumps(rows))
    text = demo_report.report(tmp_path)
    lines = [line.split() for line in text.splitlines() if line]
    assert lines[0][-4:] == ["3", "seeds", "this", "run"]
    assert lines[1] == ["relation", "62.9", "71.0", "88.2", "(86.0", "to", "90.6)", "89.0"]
    assert lines[3] == ["questions:", "yes", "no", "34.6", "60.0", "60.0", "(60.0", "to", "60.0)", "33.0"]
    assert "1 seeds" in text and "This run is evaluated on 50 pairs" in text


def test_the_package_holds_what_the_demo_prints():
    told = json.loads(demo_report.MEASURED.read_text())
    splits = {"combo", "yes_no", "choice", "count"}
    assert all(set(told[arm]["mean"]) == splits == set(told["base"]) for arm in ("nll", "default"))
    assert set(told["base"]["combo"]) == {*EDITS, "all"}


def test_the_figure_over_time_shows_what_its_arms_have(tmp_path, monkeypatch):
    """A line of each arm, of as many points as it has times, in the order of time; an arm that has none draws none."""
    from matplotlib import pyplot

    def found(value: float) -> dict[str, Any]:
        return {"combo": {edit: {"groups": 1000, "group": value} for edit in ("all", "relation", "shape")}}

    canvas, axes = pyplot.subplots(1, 3)
    monkeypatch.setattr(pyplot, "subplots", lambda *_, **__: (canvas, axes))
    lines = {"NLL": {2800: found(78), 1000: found(75)}, "SymMPO": {}, "default": {1000: found(82)}}
    shown.over_time(tmp_path / "time.png", lines, {"combo": {"all": 74.5, "relation": 63.0, "shape": 63.0}})
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes[0].get_lines()[:3]]
    assert drawn == [([1000, 2800], [75, 78]), ([], []), ([1000], [82])]
    assert (tmp_path / "time.png").read_bytes()[:4] == b"\x89PNG"
