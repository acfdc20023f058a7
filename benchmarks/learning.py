"""Comparison of objectives trained from the demo's base model for equal CPU time: NLL, DPO with NLL, mDPO, SymMPO, S-VCO, and the default
objective, alone and with token credit or distillation.

    python benchmarks/learning.py --choose             # tries the learning rates of each arm with one seed, on the validation set
    python benchmarks/learning.py --seeds 3            # runs what is missing at the best rates, one per core
    python benchmarks/learning.py --seeds 3 --steps 2000    # the same with four times the training time
    python benchmarks/learning.py --seeds 1 --data wrong    # the same with wrong labels in a tenth of the training groups
    python benchmarks/learning.py --report             # writes the tables, the figures in docs/ and the demo's table

Each run is one process of `train.py --config examples/quickstart.yaml` with the options of its arm. The default takes ``--steps`` steps.
Other arms take as many steps as fit into the same CPU time, including the time to compute the base's scores if an arm needs them. An arm's
time per step is measured with two short runs, in parallel with two short runs of the default. Each line of benchmarks/learning/runs.jsonl
is a finished run, which is not repeated. rates.jsonl holds the runs from which the rates were chosen.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

from records import RATE_RUNS, RUNS, add_record, half_width, read_records, renewed

from cfvlm_ds.core.files import replace
from cfvlm_ds.demo.habits.build import scenes_in
from cfvlm_ds.demo.habits.grammar import SENTENCES, form, noun, written
from cfvlm_ds.demo.habits.world import ROWS
from cfvlm_ds.demo.report import AXES, MEASURED, axes_of

REPO = Path(__file__).resolve().parent.parent
RECORDS = Path(__file__).resolve().parent / "learning"
COMMAND = "benchmarks/learning.py --report"
BASE = "base"
"""Name of the record with the base's results."""
STEPS, GROUPS = 500, 12
"""Number of the default's steps, and of groups per step in every arm, as in the demo."""
BUDGETS = (200, STEPS, 2000)
"""Training times that can be compared, in steps of the default: about 2, 5 and 20 minutes."""
DATA = PLAIN, WRONG, LONG_TEXTS = "plain", "wrong", "long"
"""Training data: the demo's, either unchanged, with swapped texts in a tenth of the groups, or with longer descriptions."""
SWAPPED, MORE_WORDS = 0.1, 60
RATES = ("1e-4", "3e-4", "1e-3")
CHOOSING = 99
"""Seed of the runs that choose a rate. The runs in the tables have other seeds."""
SHORT, LONG = 10, 50
"""Numbers of steps in two runs. The difference between their times gives the time per step."""
TRAIN, TEST, WRITTEN = 6000, 400, 400
"""Numbers of training groups (as in the demo), of groups per test set, and of pictures to describe."""
LIKELIHOODS = {f"{axis}: NLL": metric.replace("/group", "/nll") for axis, metric in AXES.items() if metric.endswith("/group")}
"""Table row -> metric: the NLL of a set's captions or answers, in nats per token. The arms' columns show the difference from the base."""
FEW = [axis for axis in AXES if "agrees" not in axis and axis != "outside the grammar"]
"""Axes in docs/learning.png and in all tables but the first."""
DEMO = ("nll", "dpo-nll", "mdpo", "default")
"""Arms in the demo's table and in docs/learning.png."""
CURVES = ("pairs, habit contradicted", "yes/no, habit contradicted", "POPE's form, F1", "false statements, habit contradicted")
"""Axes in docs/learning_time.png."""
NO_CONTRAST = ("--objective.csd.weight=0", "--objective.fcd.weight=0")


@dataclass(frozen=True)
class Arm:
    """An objective, as options for examples/quickstart.yaml. ``scores`` is True if it needs the base's scores."""

    title: str
    options: tuple[str, ...] = ()
    scores: bool = False


ARMS = {
    "nll": Arm("NLL", ("--objective.align.counterfactual=1", *NO_CONTRAST)),
    "dpo-nll": Arm("NLL + DPO", ("--objective.align.counterfactual=1", *NO_CONTRAST, "--objective.dpo.weight=1"), scores=True),
    "mdpo": Arm(
        "mDPO",
        (
            "--objective.align.weight=0",
            *NO_CONTRAST,
            "--objective.dpo.weight=1",
            "--objective.dpo.image_side=1",
            "--objective.dpo.anchor=1",
        ),
        scores=True,
    ),
    "symmpo": Arm("SymMPO", ("--objective.align.weight=0", *NO_CONTRAST, "--objective.symmpo.weight=1"), scores=True),
    "svco": Arm("S-VCO", ("--objective.align.weight=0", *NO_CONTRAST, "--objective.svco.weight=1"), scores=True),
    "default": Arm("default"),
    "credit": Arm("default, token credit", ("--objective.csd.token_credit=true", "--objective.fcd.token_credit=true")),
    "distill": Arm("default, distillation", ("--objective.contrast_distill.weight=0.1",)),
}


@dataclass(frozen=True)
class Job:
    """Training run of one arm with one rate and seed on ``data``, for the CPU time that ``budget`` steps of the default take."""

    arm: str
    rate: str
    seed: int
    budget: int = STEPS
    data: str = PLAIN

    @property
    def name(self) -> str:
        budget, data = f"-{self.budget}" * (self.budget != STEPS), f"-{self.data}" * (self.data != PLAIN)
        return f"{self.arm}-{self.rate}-seed{self.seed}{budget}{data}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each arm, from 0 (default 3)")
    parser.add_argument("--steps", type=int, default=STEPS, choices=BUDGETS, help="steps of the default (default %(default)s)")
    parser.add_argument("--data", default=PLAIN, choices=DATA, help="training data (default %(default)s)")
    parser.add_argument("--rates", nargs="+", help="learning rates instead of the best by --choose")
    parser.add_argument("--choose", action="store_true", help="try the rates of each arm on the validation set")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (default one per core)")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"), help="folder of the runs (default %(default)s)")
    parser.add_argument("--report", action="store_true", help="only write the tables and figures")
    arguments = parser.parse_args()
    if arguments.choose and arguments.data != PLAIN:
        parser.error("--choose trains on plain data, whose rates apply to all")
    if not arguments.report:
        records = RECORDS / (RATE_RUNS if arguments.choose else RUNS)
        jobs = [
            Job(arm, rate, seed, arguments.steps, arguments.data)
            for seed in ([CHOOSING] if arguments.choose else range(arguments.seeds))
            for arm in arguments.arms
            for rate in arguments.rates or (RATES if arguments.choose else [best_rate(arm, arguments.steps)])
        ]
        done = read_records(records)
        run_all(arguments, records, [job for job in jobs if job.name not in done])
    if not arguments.choose:
        report()


def best_rate(arm: str, budget: int) -> str:
    """Return the rate with the highest accuracy on the validation set. A tie goes to the lower rate.

    If no rate was tried with this budget, the rates tried with STEPS steps count.
    """
    runs = [each for each in read_records(RECORDS / RATE_RUNS).values() if each["arm"] == arm]
    at = {steps: {each["rate"]: each["validation"] for each in runs if each.get("budget", STEPS) == steps} for steps in (budget, STEPS)}
    tried = at[budget] or at[STEPS]
    if not tried:
        sys.exit(f"no rate of {arm} was tried: run with --choose, or give --rates")
    return min(tried, key=lambda rate: (-tried[rate], float(rate)))


def run_all(arguments: argparse.Namespace, records: Path, jobs: Sequence[Job]) -> None:
    """Run the jobs, ``arguments.jobs`` at a time. Before that, a run of one step writes the data."""
    if not jobs:
        return
    out, budget, data = arguments.out, arguments.steps, arguments.data
    train(out, out / "build", Job("default", RATES[0], 0), 1, {})
    write_data(out, data)
    steps = {"default": budget} | {arm: steps_of(out, arm, budget, data) for arm in sorted({job.arm for job in jobs} - {"default"})}
    print("steps in equal processor time:", steps, flush=True)

    def one(job: Job) -> None:
        world = out / "world"
        sets: dict[str, Any] = {"validation": str(world / "validation.jsonl")} if arguments.choose else evaluation_sets(world, data)
        folder = out / ("rates" if arguments.choose else "runs") / job.name
        known = read_records(records).get(BASE, {"axes": {}})["axes"]
        first = not arguments.choose and job == jobs[0] and not {*AXES, *LIKELIHOODS} <= {*known}
        train(out, folder, job, steps[job.arm], sets, before=first)
        record = asdict(job) | {"steps": steps[job.arm], "processor": processor()}
        if arguments.choose:
            rows = json.loads((folder / "results.json").read_text())["validation"]
            add_record(records, job.name, record | {"validation": rows[-1]["metrics"]["group"]})
            return
        evaluated = axes_of(folder, AXES | LIKELIHOODS)
        if first:
            add_record(records, BASE, {"axes": evaluated[0] | known})
        add_record(records, job.name, record | {"axes": evaluated[-1]})
        print(job.name, flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(one, jobs))


def rows_of(out: Path, data: str) -> Path:
    return out / "world" / ("train.jsonl" if data == PLAIN else f"train_{data}.jsonl")


def write_data(out: Path, data: str) -> None:
    """Make the training rows of ``data`` from the demo's rows, and write them to the same folder, unless they exist."""
    path = rows_of(out, data)
    if not path.exists():
        rng, change = Random(0), {WRONG: with_swapped_texts, LONG_TEXTS: with_longer_texts}[data]
        lines = [json.dumps(change(json.loads(line), rng)) + "\n" for line in rows_of(out, PLAIN).read_text().splitlines()]
        replace(path, "".join(lines).encode())


def with_swapped_texts(row: dict[str, Any], rng: Random) -> dict[str, Any]:
    """With probability SWAPPED, swap the two texts of every prompt in a row, so that the false texts are labelled as true."""
    if rng.random() < SWAPPED:
        for first, second in zip(row["texts"][::2], row["texts"][1::2], strict=True):
            for name in {"text", "key"} & {*first}:
                first[name], second[name] = second[name], first[name]
    return row


def with_longer_texts(row: dict[str, Any], rng: Random) -> dict[str, Any]:
    """Lengthen each description in a row by up to MORE_WORDS words, with sentences about things that no edit of the row changes."""
    scenes, sentences = scenes_in(row["meta"]), list[str]()
    for thing in scenes[0].things:
        if all(thing in scene.things for scene in scenes):
            for name, value in (("colour", thing.colour), ("row", ROWS[thing.row])):
                sentences += [form(name, k, x=noun(thing.kind, thing.number), **{name: value}) for k in range(len(SENTENCES[name]))]
    rng.shuffle(sentences)
    ends = accumulate(len(sentence.split()) for sentence in sentences)
    more = written([sentence for sentence, end in zip(sentences, ends, strict=True) if end <= MORE_WORDS])
    for text in row["texts"][: len(scenes)]:
        text["text"] = f"{text['text']} {more}".rstrip()
    return row


def evaluation_sets(world: Path, data: str) -> dict[str, Any]:
    """Return data.evaluation: the sets of examples/quickstart.yaml with more groups, and longer descriptions if ``data`` is long."""
    splits = ("agrees", "contradicts", "combo", "yes_no_agrees", "yes_no_contradicts", "choice", "count", "colour")
    return {split: str(world / f"test_{split}.jsonl") for split in splits} | {
        "pope": {"benchmark": "pope", "root": str(world)},
        "habits": {
            "benchmark": "habits",
            "root": str(world),
            "probe": f"write:max_new_tokens={160 if data == LONG_TEXTS else 64}",
            "limit": WRITTEN,
        },
    }


def steps_of(out: Path, arm: str, budget: int, data: str) -> int:
    """Return how many steps of an arm fit into the default's CPU time, together with scoring by the base if the arm needs it."""

    def seconds(one: str) -> float:
        job = Job(one, RATES[0], 0, data=data)
        short, long = (train(out, out / f"steps-{data}-{arm}-{one}-{steps}", job, steps, {}) for steps in (SHORT, LONG))
        return (long - short) / (LONG - SHORT)

    # a third of the scoring is on the blank picture, which only PMI needs
    scored = score(out, data) * 2 / 3 if ARMS[arm].scores else 0.0
    with ThreadPoolExecutor(2) as pool:
        own, default = pool.map(seconds, (arm, "default"))
    return affordable(own, default, scored, budget)


def affordable(own: float, default: float, scored: float, budget: int = STEPS) -> int:
    """Return how many steps of ``own`` seconds fit into the time of ``budget`` steps of ``default`` seconds.

    Scoring all training groups takes ``scored`` seconds, but only the groups that the steps use are counted, each once.
    """
    per_step = own + scored * GROUPS / TRAIN
    steps = budget * default / per_step
    return round(steps if steps * GROUPS <= TRAIN else (budget * default - scored) / own)


def score(out: Path, data: str) -> float:
    """Write the base's scores unless they exist. Returns the CPU time of scoring in seconds."""
    rows = rows_of(out, data)
    command = [sys.executable, "-m", "cfvlm_ds", "score", str(out / "base"), str(rows), "--out", str(rows.with_suffix(".scores.jsonl"))]
    command += ["--dtype", "bfloat16"] if "_bf16" in cpuinfo() else []
    return run_process(command, out / f"score-{data}", {"OMP_NUM_THREADS": "1"})


def train(out: Path, folder: Path, job: Job, steps: int, sets: Mapping[str, Any], before: bool = False) -> float:
    """Run ``job`` to the end. Returns the CPU time in seconds, including start-up and the evaluation on ``sets``."""
    if ARMS[job.arm].scores:
        score(out, job.data)
    options = {
        "build.habits.out_dir": out / "world",
        "build.habits.num_train": TRAIN,
        "build.habits.num_test": TEST,
        "build.base": out / "base",
        "model.name_or_path": out / "base",
        "data.train": rows_of(out, job.data),
        "data.evaluation": json.dumps(sets),
        "data.num_workers": 0,
        "train.output_dir": folder,
        "train.per_device_train_batch_size": GROUPS,
        "train.max_steps": steps,
        "train.seed": job.seed,
        "train.learning_rate": job.rate,
        "train.bf16": str("_bf16" in cpuinfo()).lower(),
        "train.eval_on_start": str(before).lower(),
        "train.eval_steps": 0,
        "train.save_steps": 0,
        "train.samples": 0,
        "train.figures": "false",
        "train.export": "false",
        "tracking.enabled": "false",
    } | ({"data.scores": rows_of(out, job.data).with_suffix(".scores.jsonl")} if ARMS[job.arm].scores else {})
    command = [sys.executable, "train.py", "--deepspeed", "ds_configs/z2.json", "--config", "examples/quickstart.yaml"]
    command += [*(f"--{name}={value}" for name, value in options.items()), *ARMS[job.arm].options]
    return run_process(command, folder, {"OMP_NUM_THREADS": "1"}, "finished.json")


def cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def processor() -> str:
    return next((line.split(":", 1)[1].strip() for line in cpuinfo().splitlines() if line.startswith("model name")), platform.machine())


def run_process(command: Sequence[str], folder: Path, variables: Mapping[str, str] | None = None, leaves: str = "") -> float:
    """Run a command unless it has already finished. Returns the CPU time of all its attempts in seconds.

    The output is written to FOLDER.log, and the times to files next to it. A command that exits without having written the file ``leaves``
    counts as interrupted and can be resumed.
    """
    whole, part, log = (folder.with_name(f"{folder.name}.{kind}") for kind in ("seconds", "seconds_so_far", "log"))
    if whole.exists():
        refuse_other_objective(command, folder)
        return float(whole.read_text())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=REPO, env=os.environ | (variables or {}), stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    spent = usage.ru_utime + usage.ru_stime + (float(part.read_text()) if part.exists() else 0)
    ended = not process.returncode and (not leaves or (folder / leaves).exists())
    (whole if ended else part).write_text(f"{spent:.2f}\n")
    if not ended:
        said = f"exit code {process.returncode}" if process.returncode else "stopped before its end; the same command continues"
        sys.exit(f"{folder}: {said}\n{log.read_text(errors='replace')[-4000:]}")
    return spent


def refuse_other_objective(command: Sequence[str], folder: Path) -> None:
    """Exit if a finished run had another objective than ``command`` now gives, for instance because a default has changed."""
    if "train.py" not in command or not (folder / "config.yaml").exists():
        return
    from cfvlm_ds.core.parsing import parse_config
    from cfvlm_ds.core.run_folder import recorded_options
    from cfvlm_ds.objectives import OBJECTIVES

    now = parse_config(command[command.index("train.py") + 1 :], OBJECTIVES).resolved["objective"]
    if json.loads(json.dumps(now)) != recorded_options(folder)["objective"]:
        sys.exit(f"{folder} is a run with another objective (see its config.yaml) than its options have now; move it away and start again")


Runs = dict[tuple[str, str], list[dict[str, Any]]]
"""Records by arm and rate, with one record per seed."""


def report() -> None:
    """Write one table per data set and budget to RESULTS.md, save the means in the package for the demo, and draw the figures."""
    records = read_records(RECORDS / RUNS)
    base = records.pop(BASE)["axes"]
    found = by_comparison(records.values())
    main = (PLAIN, STEPS)
    tables = {command(*key): table(base, runs, [*AXES, *LIKELIHOODS] if key == main else FEW) for key, runs in found.items()}
    print(*(f"`python {each}`:\n\n{text}\n" for each, text in tables.items()), sep="\n")
    page = REPO / "benchmarks" / "RESULTS.md"
    page.write_text(with_tables(page.read_text(), tables))
    runs = {arm: each for arm, each in by_arm(found[main]).items() if arm in DEMO}
    means = {
        arm: {
            "title": ARMS[arm].title,
            "seeds": len(each),
            "mean": {axis: round(statistics.mean(values_of(each, axis)), 1) for axis in AXES},
        }
        for arm, each in runs.items()
    }
    MEASURED.write_text(json.dumps(means, indent=1) + "\n")
    figure(REPO / "docs" / "learning.png", base, runs)
    budgets = {budget: by_arm(runs) for (data, budget), runs in found.items() if data == PLAIN}
    time_figure(REPO / "docs" / "learning_time.png", base, budgets)


def by_comparison(records: Iterable[dict[str, Any]]) -> dict[tuple[str, int], Runs]:
    """Group the records by data and budget, then by arm and rate, in the order of DATA, BUDGETS, ARMS and rates."""
    found: dict[tuple[str, int], Runs] = {}
    for each in sorted(records, key=lambda each: ([*ARMS].index(each["arm"]), float(each["rate"]))):
        key = each.get("data", PLAIN), each.get("budget", STEPS)
        found.setdefault(key, {}).setdefault((each["arm"], each["rate"]), []).append(each)
    return dict(sorted(found.items(), key=lambda item: (DATA.index(item[0][0]), item[0][1])))


def command(data: str, budget: int) -> str:
    """Return the command above a comparison's table in RESULTS.md."""
    return COMMAND + f" --steps {budget}" * (budget != STEPS) + f" --data {data}" * (data != PLAIN)


def by_arm(runs: Runs) -> dict[str, list[dict[str, Any]]]:
    """Return each arm's records at the rate with the most seeds."""
    return {arm: max((found for (each, _), found in runs.items() if each == arm), key=len) for arm, _ in runs}


def with_tables(page: str, tables: Mapping[str, str]) -> str:
    """Put each table after its command in ``page``. A new command is added after the table of COMMAND."""
    new = [each for each in tables if f"`python {each}`" not in page]
    added = "".join(f"\n\n`python {each}`:\n\n{tables[each]}" for each in new)
    shown = [(each, text) for each, text in tables.items() if each not in new]
    return renewed(page, shown).replace(tables[COMMAND], tables[COMMAND] + added)


def values_of(found: Sequence[Mapping[str, Any]], axis: str) -> list[float]:
    return [each["axes"][axis] for each in found if axis in each["axes"]]


def table(base: Mapping[str, float], runs: Runs, axes: Iterable[str] = (*AXES, *LIKELIHOODS)) -> str:
    """Return a Markdown table of the base and each arm and rate: means over seeds with half the width of the 95 % t interval.

    Old records lack the NLL. A cell without values is empty. If only some seeds have a value, the cell states how many.
    """
    titles = [
        f"{ARMS[arm].title} ({rate}, {'/'.join(sorted({str(each['steps']) for each in found}))} steps, seeds: {len(found)})"
        for (arm, rate), found in runs.items()
    ]
    lines = [f"| % | base | {' | '.join(titles)} |", f"|---|---:|{'---:|' * len(titles)}"]
    for axis in (axis for axis in axes if axis in base):
        start, sign, digits = (base[axis], "+", ".3f") if axis in LIKELIHOODS else (0.0, "", ".1f")
        cells = []
        for found in runs.values():
            values = [value - start for value in values_of(found, axis)]
            cell = f"{statistics.mean(values):{sign}{digits}}" if values else ""
            cell += f" ± {half_width(values):{digits}}" if len(values) > 1 else ""
            cells.append(cell + (f" (seeds: {len(values)})" if 0 < len(values) < len(found) else ""))
        lines.append(f"| {axis} | {base[axis]:{digits}} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(path: Path, base: Mapping[str, float], runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Draw a bar chart of the base's and each arm's results on pictures that contradict habit: means over seeds with 95 % t intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars: list[tuple[str, list[list[float]]]] = [("base", [[base[axis]] for axis in FEW])]
    bars += [(f"+ {ARMS[arm].title}", [[each["axes"][axis] for each in found] for axis in FEW]) for arm, found in runs.items()]
    canvas, axes = pyplot.subplots(figsize=(10, 3.8), layout="constrained")
    width = 0.8 / len(bars)
    for k, (name, each) in enumerate(bars):
        place = [x + (k - (len(bars) - 1) / 2) * width for x in range(len(FEW))]
        means = [statistics.mean(values) for values in each]
        widths = [half_width(values) for values in each] if len(each[0]) > 1 else None
        axes.bar(place, means, 0.92 * width, yerr=widths, color=f"C{k - 1}" if k else "#c9c9c9", label=name)
    axes.set_xticks(range(len(FEW)), [axis.replace(", ", ",\n") for axis in FEW], fontsize=7)
    axes.set_ylim(0, 100)
    axes.set_ylabel("%")
    axes.spines[["top", "right"]].set_visible(False)
    canvas.legend(frameon=False, fontsize=9, ncols=len(bars), loc="outside upper right")
    canvas.savefig(path, dpi=160)


def time_figure(path: Path, base: Mapping[str, float], budgets: Mapping[int, Mapping[str, Sequence[Mapping[str, Any]]]]) -> None:
    """Plot each arm's results against training time with 95 % t intervals, in one panel per evaluation axis in CURVES."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, panels = pyplot.subplots(1, len(CURVES), figsize=(13, 3.8), layout="constrained")
    for panel, axis in zip(panels, CURVES, strict=True):
        panel.axhline(base[axis], color="#c9c9c9", label="base")
        for arm in ARMS:
            points = {budget: values_of(runs[arm], axis) for budget, runs in budgets.items() if arm in runs}
            widths = [half_width(values) if len(values) > 1 else 0.0 for values in points.values()]
            if points:
                means = [statistics.mean(values) for values in points.values()]
                panel.errorbar([*points], means, widths, marker=".", label=f"+ {ARMS[arm].title}")
        panel.set_xscale("log")
        panel.set_xticks([*budgets], [str(budget) for budget in budgets])
        panel.minorticks_off()
        panel.set_title(axis, fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("%")
    canvas.supxlabel("CPU time, as steps of the default", fontsize=9)
    canvas.legend(*panels[0].get_legend_handles_labels(), frameon=False, ncols=5, loc="outside upper center")
    canvas.savefig(path, dpi=160)


if __name__ == "__main__":
    main()
