"""Benefit of verification when the truth is known: the embedded world, treated like a user's photographs.

    python benchmarks/verified.py --model runs/quickstart --seeds 3     # runs what is missing, then prints the tables
    python benchmarks/verified.py --parts verdicts                      # precision and recall of verdicts, without training
    python benchmarks/verified.py --report                              # the tables of all finished runs

Pictures and captions of the world pass through `data propose --with rules`, an editor that fails in known ways in half of its attempts,
and `data verify` with the package's base and with --model, under each question of TEMPLATES. Verdicts are compared with the truth for each
kind of score, without a margin, and with the margin and drop that are calibrated on the labels of half of the sources; precision and recall
are those of the other half. Then the base is trained on the candidates that the best of these verdicts keep, on candidates without a
verdict, and on exact edits, with the same sources, steps and schedule.
A work folder continues where it was stopped. benchmarks/verified/runs.jsonl gets a line when a run ends. On a core of an EPYC, a source
takes 0.3 s for each scorer and question (about ten candidates), and a training of 1000 steps about 6 minutes, including its evaluation.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import scene_editor as editor
import yaml
from learning import before
from records import RUNS, add_record, read_records

from cfvlm_ds.core.config import ScenesConfig
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.files import replace
from cfvlm_ds.counterfactuals import EDITORS
from cfvlm_ds.counterfactuals.edit.step import edit
from cfvlm_ds.counterfactuals.judge import GOOD, Thresholds, calibrated, verdict
from cfvlm_ds.counterfactuals.options import TEMPLATE, EditOptions, ProposeOptions, SelectOptions, VerifyOptions
from cfvlm_ds.counterfactuals.propose.step import propose
from cfvlm_ds.counterfactuals.select import select
from cfvlm_ds.counterfactuals.verify import verify
from cfvlm_ds.counterfactuals.work_folder import WorkFolder, seed_of
from cfvlm_ds.data import open_groups
from cfvlm_ds.demo.base import write_base
from cfvlm_ds.demo.scenes import build_scenes
from cfvlm_ds.demo.scenes.world import COLOURS, SHAPES

REPO = Path(__file__).resolve().parent.parent
RECORDS = REPO / "benchmarks" / "verified"
TEMPLATES = {"VQAScore": TEMPLATE, "as the world asks": "{text}? Answer yes or no."}
RULES = ("match", "likelihood", "both")
ARMS = {"verified": "verified", "unverified": "unverified", "exact": "exact edits"}
UNJUDGED = Thresholds(rule="checks", changed={"*": (0.0, 1.0)}, largest=0.0, outside=1.0)
"""Thresholds that keep every picture except an unchanged original, with which training is impossible."""
PRECISION = 0.95
TEXTURES = ("striped", "dotted", "hollow")
Truth = dict[tuple[str, int], tuple[bool, str]]
"""(edit, attempt) -> (True if the picture shows the new text and no longer the caption, the fault with which it was drawn)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="", help="a second scorer in addition to the base: a model or run folder, such as runs/quickstart"
    )
    parser.add_argument("--parts", nargs="+", choices=("verdicts", "train"), default=["verdicts", "train"])
    parser.add_argument("--questions", nargs="+", choices=TEMPLATES, default=list(TEMPLATES), help="default: all")
    parser.add_argument("--sources", type=int, default=3000, help="pictures with captions (default 3000)")
    parser.add_argument("--faults", type=float, default=0.5, help="share of the attempts that fail (default 0.5)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each training, from 0 (default 3)")
    parser.add_argument("--steps", type=int, default=1000, help="steps of a training (default 1000)")
    parser.add_argument("--num_test", type=int, default=9000, help="groups of held-out combinations (default 9000: 1000 per edit)")
    parser.add_argument("--num_questions", type=int, default=900, help="groups of each kind of question (default 900)")
    parser.add_argument("--out", type=Path, default=Path("runs/verified"), help="folder of the work (default runs/verified)")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the results (default benchmarks/verified)")
    parser.add_argument("--report", action="store_true", help="only print the tables")
    arguments = parser.parse_args()
    arguments.out, arguments.records = arguments.out.resolve(), arguments.records.resolve()
    if not arguments.report:
        EDITORS["scenes"] = editor.SceneEditor
        arguments.records.mkdir(parents=True, exist_ok=True)
        scenes, work = made(arguments)
        truth = truth_of(work, scenes, arguments.faults)
        if "verdicts" in arguments.parts:
            verdicts(arguments, work, truth)
        if "train" in arguments.parts:
            trainings(arguments, scenes, work, truth)
    report(arguments.records)


# data -----------------------------------------------------------------------------------------------------------------------------------


def made(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Make the folder of scenes and a work folder with proposed and edited pictures, and return both."""
    scenes = arguments.out / "scenes"
    build_scenes(ScenesConfig(str(scenes), num_train=arguments.sources, num_test=max(arguments.num_test, arguments.num_questions)))
    return scenes, edited(arguments.out, scenes, "W", arguments.faults, 2)


def edited(out: Path, scenes: Path, name: str, faults: float, attempts: int) -> Path:
    """Make a work folder with pictures drawn by the embedded world, some of them wrong, and return it."""
    nouns = [form for shape in SHAPES for form in (shape, f"{shape}{'es' if shape.endswith('s') else 's'}")]
    words = {"colour": list(COLOURS), "count": ["one", "two", "three"], "object": nouns, "texture": list(TEXTURES)}
    replace(out / "words.yaml", yaml.safe_dump(words).encode())
    work = out / name
    propose(open_groups(scenes / "train.jsonl"), work, ProposeOptions(words=str(out / "words.yaml")), 0, print)
    options = EditOptions(back_ends="scenes", folder=str(scenes), options=f"faults={faults}", attempts=attempts)
    edit(work, options, 0, print)
    return work


def truth_of(work: Path, scenes: Path, faults: float) -> Truth:
    config, folder, truth = editor.config_in(scenes), WorkFolder.open(work), Truth()
    texts = {each["id"]: (line["source"], each["text"]) for line in folder.records("propose", 0) for each in line.get("edits", ())}
    for record in folder.records("edit", 0):
        if not record.get("picture"):
            continue
        source, text = texts[record["edit"]]
        drawn = editor.drawn_group(config, source)
        wanted = editor.shown_by(drawn, text)
        if wanted is None:
            raise SystemExit(f"{record['edit']}: the world has no scene for this text")
        fault = editor.fault_of(record["seed"], faults)
        scene = editor.failed(drawn.scenes[0], wanted, fault, record["seed"])
        truth[record["edit"], record["attempt"]] = editor.is_right(drawn, text, scene), fault or "none"
    return truth


# verdicts -------------------------------------------------------------------------------------------------------------------------------


def verdicts(arguments: argparse.Namespace, work: Path, truth: Truth) -> None:
    """Verify with each scorer under each question, and compare the verdicts with the truth."""
    scorers = {"base": str(write_base(arguments.out / "base"))} | ({Path(arguments.model).name: arguments.model} if arguments.model else {})
    judged(arguments, work, truth, "pixels", "", "", ("checks",))
    for scorer, model in scorers.items():
        for question in arguments.questions:
            judged(arguments, work, truth, scorer, model, question, RULES)


def judged(arguments: argparse.Namespace, work: Path, truth: Truth, scorer: str, model: str, question: str, rules: tuple[str, ...]) -> None:
    name = "-".join(["verdicts", scorer, *question.lower().split()])
    file, own = arguments.records / RUNS, arguments.out / name
    if name in read_records(file):
        return
    if not (own / "edit.json").exists():  # the same candidates, verified separately
        shutil.rmtree(own, ignore_errors=True)
        shutil.copytree(work, own, ignore=shutil.ignore_patterns("edit.json"))
        shutil.copy(work / "edit.json", own)
    began = time.process_time()
    options = VerifyOptions(scorer=model, **({"template": TEMPLATES[question]} if question else {}))
    if model:
        from cfvlm_ds.cli.making import _scoring

        score, identity = _scoring(model, options.batch_size)
        verify(own, options, 0, print, score, None, identity)
    else:
        verify(own, options, 0, print, None)
    seconds = time.process_time() - began
    records = [each for each in WorkFolder.open(own).records("verify", 0) if (each["edit"], each["attempt"]) in truth]
    about = {"scorer": scorer, "question": question, "work": name, "processor_seconds": round(seconds, 1)}
    found = about | {"candidates": len(records), "faults": Counter(fault for _, fault in truth.values()), "processor": processor()}
    found |= {"right": sum(truth[each["edit"], each["attempt"]][0] for each in records)}
    found |= {"rules": {rule: by_rule(records, truth, rule) for rule in rules}}
    add_record(file, name, found)


def by_rule(records: list[dict[str, Any]], truth: Truth, rule: str) -> dict[str, Any]:
    """Return the results for a kind of score without a margin, and with the margin calibrated on half of the sources."""
    halves: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for record in records:
        halves[seed_of("half", record["source"]) % 2].append(record)
    plain = Thresholds(rule=rule)
    found: dict[str, Any] = {"plain": counts(records, truth, plain), "kept_of_fault": of_faults(records, truth, plain), "calibrated": None}
    if rule != "checks":
        try:
            fitted = calibrated([(each, truth[each["edit"], each["attempt"]][0]) for each in halves[0]], plain, PRECISION)
            found["calibrated"] = counts(halves[1], truth, fitted.thresholds) | {
                "margin": fitted.thresholds.margin,
                "drop": fitted.thresholds.drop,
                "good_kept_of_labels": fitted.good_kept,
                "kept_of_fault": of_faults(halves[1], truth, fitted.thresholds),
            }
        except ConfigError as error:
            found["why_not"] = str(error)
    return found


def counts(records: list[dict[str, Any]], truth: Truth, thresholds: Thresholds) -> dict[str, Any]:
    kept = [truth[each["edit"], each["attempt"]][0] for each in records if verdict(each, thresholds).reason == GOOD]
    right = sum(truth[each["edit"], each["attempt"]][0] for each in records)
    return {
        "kept": len(kept),
        "right_kept": sum(kept),
        "right": right,
        "precision": ratio(sum(kept), len(kept)),
        "recall": ratio(sum(kept), right),
    }


def of_faults(records: list[dict[str, Any]], truth: Truth, thresholds: Thresholds) -> dict[str, float | None]:
    """Return the share of kept candidates for each fault."""
    there, kept = Counter[str](), Counter[str]()
    for each in records:
        fault = truth[each["edit"], each["attempt"]][1]
        there[fault] += 1
        kept[fault] += verdict(each, thresholds).reason == GOOD
    return {fault: ratio(kept[fault], there[fault]) for fault in ("none", *editor.FAULTS)}


def ratio(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


# trainings ------------------------------------------------------------------------------------------------------------------------------


def trainings(arguments: argparse.Namespace, scenes: Path, work: Path, truth: Truth) -> None:
    """Train the base on each set of groups, with one edit per source, the same sources and the same number of steps."""
    best = best_verdict(arguments.records)
    exact = edited(arguments.out, scenes, "exact", 0.0, 1)
    verify(exact, VerifyOptions(), 0, print, None)
    chosen = Thresholds(rule=best["rule"], margin=best["margin"], drop=best["drop"])
    options = {}
    for name, thresholds in {"judged": chosen, "unjudged": UNJUDGED}.items():
        (file := arguments.out / f"{name}.json").write_text(json.dumps(asdict(thresholds)) + "\n")
        options[name] = SelectOptions(thresholds=str(file), per_source=1)
    sets = {
        "verified": (arguments.out / best["work"], options["judged"], truth),
        "unverified": (arguments.out / "verdicts-pixels", options["unjudged"], truth),
        "exact": (exact, options["unjudged"], truth_of(exact, scenes, 0.0)),
    }
    for arm, (folder, choice, known) in sets.items():
        file = arguments.out / f"{arm}.jsonl"
        survival = select(folder, file, choice, print)
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        right = [known[each["edit"]["edit"], each["edit"]["attempt"]][0] for row in rows for each in row["meta"]["edits"]]
        about = {"arm": arm, "groups": len(rows), "right": ratio(sum(right), len(right)), "survival": survival.table()}
        about |= {"verdict": {key: best[key] for key in ("scorer", "question", "rule", "margin", "drop")}} if arm == "verified" else {}
        for seed in range(arguments.seeds):
            if (name := f"train-{arm}-seed{seed}") not in read_records(arguments.records / RUNS):
                add_record(arguments.records / RUNS, name, about | trained(arguments, scenes, file, arm, seed, arguments.records / RUNS))


def best_verdict(records: Path) -> dict[str, Any]:
    """Return the scorer, question, kind of score, margin and drop that keep the most right candidates of the labelled half at PRECISION. If
    none reaches PRECISION, return the most precise one without a margin.
    """
    listed = [record for name, record in read_records(records / RUNS).items() if name.startswith("verdicts-")]
    ways = [(each, rule, found) for each in listed if each["question"] for rule, found in each["rules"].items()]
    if not ways:
        raise SystemExit(f"{records} contains no verdicts; run the part verdicts first")
    fitted = [way for way in ways if way[2]["calibrated"]]
    if fitted:
        each, rule, found = max(fitted, key=lambda way: way[2]["calibrated"]["good_kept_of_labels"])
        return {**each, "rule": rule, "margin": found["calibrated"]["margin"], "drop": found["calibrated"]["drop"]}
    each, rule, _ = max(ways, key=lambda way: way[2]["plain"]["precision"] or 0.0)
    return {**each, "rule": rule, "margin": 0.0, "drop": None}


def trained(arguments: argparse.Namespace, scenes: Path, groups: Path, arm: str, seed: int, records: Path) -> dict[str, Any]:
    """Train in a new process, like the quickstart, and return a record with the CPU seconds and group accuracies."""
    folder = arguments.out / f"train-{arm}-seed{seed}"
    config = yaml.safe_load((REPO / "examples" / "quickstart.yaml").read_text())
    del config["build"]
    limits = {"combo": arguments.num_test, **dict.fromkeys(("yes_no", "choice", "count"), arguments.num_questions)}
    config["model"] = {"name_or_path": str(write_base(arguments.out / "base"))}
    config["data"] = {"train": str(groups), "num_workers": 0} | {
        "evaluation": {name: {"path": str(scenes / f"test_{name}.jsonl"), "limit": limit} for name, limit in limits.items()}
    }
    config["tracking"] = {"enabled": False}
    config["train"] |= {
        "output_dir": str(folder), "max_steps": arguments.steps, "seed": seed, "save_steps": 0, "eval_steps": 0, "eval_shuffled": False,
        "eval_on_start": "base" not in read_records(records), "figures": False, "export": False,
    }  # fmt: skip
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "train.py", "--deepspeed", "ds_configs/z3.json", "--config", str(file)]
    log = folder.with_suffix(".log")
    with log.open("wb") as said:
        process = subprocess.Popen(command, cwd=REPO, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{folder}: exit code {process.returncode}\n{log.read_text(errors='replace')[-4000:]}")
    table = json.loads((folder / "before_after.json").read_text())
    if changes := [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]:
        add_record(records, "base", before(changes))
    results = json.loads((folder / "results.json").read_text())
    accuracies = {split: {row["name"]: row["metrics"]["group"] for row in rows} for split, rows in results.items()}
    spent = round(usage.ru_utime + usage.ru_stime)
    return {"seed": seed, "steps": arguments.steps, "processor_seconds": spent, "processor": processor(), "results": accuracies}


# tables ---------------------------------------------------------------------------------------------------------------------------------


def report(records: Path) -> None:
    named = read_records(records / RUNS)
    judgements, runs = ([record for name, record in named.items() if name.startswith(of)] for of in ("verdicts-", "train-"))
    if not judgements:
        sys.exit(f"{records} contains no results; run without --report first")
    print(
        "\n\n".join(
            "\n".join(table) for table in (verdict_table(judgements), fault_table(judgements), *training_tables(named.get("base"), runs))
        )
    )


def verdict_table(judgements: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield a table of precision and recall against the truth, in %."""
    yield "| scorer | question | scores | candidates | right | precision | recall | margin | drop | precision, held | recall, held |"
    yield "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for each in judgements:
        for rule, found in each["rules"].items():
            plain, fitted = found["plain"], found["calibrated"] or {}
            numbers = [percent(plain["precision"]), percent(plain["recall"])]
            numbers += ["" if fitted.get(name) is None else f"{fitted[name]:.2f}" for name in ("margin", "drop")]
            numbers += [percent(fitted.get("precision")), percent(fitted.get("recall"))]
            head = [each["scorer"], each["question"], rule, f"{each['candidates']:,}", percent(each["right"] / each["candidates"])]
            yield f"| {' | '.join([*head, *numbers])} |"


def fault_table(judgements: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield a table with the share of kept candidates that have each fault, in %, without a margin and with the calibrated one."""
    yield f"| kept, % | {' | '.join(('no fault', *editor.FAULTS))} |"
    yield f"|---|{'---:|' * (1 + len(editor.FAULTS))}"
    for each in judgements:
        for rule, found in each["rules"].items():
            for how, kept in (("", found["kept_of_fault"]), (", margin", (found["calibrated"] or {}).get("kept_of_fault"))):
                if kept:
                    name = " ".join(part for part in (each["scorer"], each["question"], rule) if part)
                    yield f"| {name}{how} | {' | '.join(percent(value) for value in kept.values())} |"


def training_tables(base: dict[str, Any] | None, runs: list[dict[str, Any]]) -> Iterator[Iterator[str]]:
    """Yield tables of group accuracy over seeds for each set of groups, and of the candidates' fates."""
    if not runs:
        return
    yield accuracy_table(base, runs)
    for arm in ARMS:
        if found := [run for run in runs if run["arm"] == arm]:
            yield iter([f"Fate of the edits, {ARMS[arm]} ({json.dumps(found[0].get('verdict', {}))}):", "", found[0]["survival"]])


def accuracy_table(base: dict[str, Any] | None, runs: list[dict[str, Any]]) -> Iterator[str]:
    kinds = list(runs[0]["results"]["combo"])
    questions = [split for split in runs[0]["results"] if split != "combo"]
    yield f"| group accuracy, %, held-out combinations | groups | right | seeds | steps | {' | '.join([*kinds, *questions])} |"
    yield f"|---|---:|---:|---:|---:|{'---:|' * (len(kinds) + len(questions))}"
    if base:
        values = [base["combo"][kind] for kind in kinds] + [base[split]["all"] for split in questions]
        yield f"| base | | | | | {' | '.join(f'{value:.1f}' for value in values)} |"
    for arm, name in ARMS.items():
        if found := [run for run in runs if run["arm"] == arm]:
            rows = [[run["results"]["combo"][kind] for kind in kinds] + [run["results"][s]["all"] for s in questions] for run in found]
            cells = [spread(column) for column in zip(*rows, strict=True)]
            head = [name, f"{found[0]['groups']:,}", percent(found[0]["right"]), str(len(found)), str(found[0]["steps"])]
            yield f"| {' | '.join([*head, *cells])} |"


def spread(values: tuple[float, ...]) -> str:
    return f"{statistics.mean(values):.1f}" + (f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else "")


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


if __name__ == "__main__":
    main()
