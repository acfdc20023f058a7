"""What each objective teaches a pretrained model in equal processor time: NLL, DPO and its relatives, the paper's literal sum, our default,
it minus each term, with negatives of one kind, with adapters, and with in-batch alignment.

    python benchmarks/learning.py --choose_rates --seeds 5      # four rates and two seeds for each arm, the best one, then five seeds
    python benchmarks/learning.py --seeds 8                     # runs what is missing at one rate, one run per core at a time
    python benchmarks/learning.py --arms default nll-all --rates 5e-4 1e-3
    python benchmarks/learning.py --arms default --capabilities default avx2 --threads 1 2     # other ways of rounding sums
    python benchmarks/learning.py --arms default nll-all --steps 550 1000 2800 8300 --seeds 1  # 2, 4, 10 and 30 minutes
    python benchmarks/learning.py --report                      # the tables and the figure of what has been run

Every run is `train.py --config examples/quickstart.yaml` with the options of its arm: one base, one world, one schedule, ZeRO-3.
The default objective takes --steps; the other arms take as many as the same processor seconds allow, by the difference of two short runs.
Rivals that need scores of the base have them from a file that is written once, which their time does not count.
benchmarks/learning/ holds one JSON per run, written as it ends, so that seeds and rates may be added later and on another machine.
--choose_rates decides by the validation split, which no table shows; benchmarks/learning/rates/ holds those runs, a JSON each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
RECORDS = REPO / "benchmarks" / "learning"
DEMO = REPO / "cfvlm_ds" / "demo" / "measured.json"
"""What the demo prints beside its own run: of the base, of NLL on all pairs and of the default objective."""
BASE = RECORDS / "base.json"
"""Group accuracy of the base, of the first run alone."""
RATES = ("3e-4", "6e-4", "1e-3", "2e-3")
CHOICE_SEEDS = 2
VALIDATION = "validation"
NO_CONTRAST = ("--objective.csd.weight=0", "--objective.fcd.weight=0")
PAPER = [
    f"--objective.{term}.{option}={value}"
    for term, margin in (("csd", 0.25), ("fcd", 0.30))
    for option, value in (("weight", 0.5), ("margin", margin), ("link", "hinge"), ("len_norm", "anchor"), ("margin_unit", "per_token"))
]
ALONE = ("--objective.align.weight=0", *NO_CONTRAST)
LORA = tuple(f"--model.{module}.tuning=lora" for module in ("vision_tower", "language_model"))


@dataclass(frozen=True)
class Arm:
    """What one arm changes of examples/quickstart.yaml.

    ``scores``: it needs scores of the base. ``negatives``: it trains on rows whose false ``texts`` or ``images`` alone were kept. ``rates``
    are those that --choose_rates tries.
    """

    title: str
    options: tuple[str, ...] = ()
    scores: bool = False
    negatives: str = ""
    rates: tuple[str, ...] = RATES


ARMS: dict[str, Arm] = {
    "nll-factual": Arm("NLL, factual pairs", ("--objective.align.counterfactual=0", *NO_CONTRAST)),
    "nll-all": Arm("NLL, all pairs", ("--objective.align.counterfactual=1", *NO_CONTRAST)),
    "dpo": Arm("DPO", (*ALONE, "--objective.dpo.weight=1"), scores=True),
    "dpo-nll": Arm("DPO beside NLL of all pairs", (*NO_CONTRAST, "--objective.dpo.weight=1"), scores=True),
    "mdpo": Arm("mDPO", (*ALONE, "--objective.dpo.image_side=1", "--objective.dpo.anchor=1"), scores=True),
    "symmpo": Arm("SymMPO", (*ALONE, "--objective.symmpo.weight=1"), scores=True),
    "misp": Arm("MISP-DPO", (*ALONE, "--objective.misp.weight=1"), scores=True),
    "texts": Arm("default, text negatives only", negatives="texts"),
    "images": Arm("default, image negatives only", negatives="images"),
    "paper": Arm(
        "paper's literal sum",
        ("--objective.align.counterfactual=0", *PAPER, "--objective.csd.mode=matched", "--objective.fcd.symmetric=false"),
    ),
    "default": Arm("default objective"),
    "no-align": Arm("default without align", ("--objective.align.weight=0",)),
    "no-csd": Arm("default without csd", ("--objective.csd.weight=0",)),
    "no-fcd": Arm("default without fcd", ("--objective.fcd.weight=0",)),
    "lora": Arm("default, adapters and projector", LORA, rates=("1e-3", "2e-3", "4e-3", "8e-3")),
    "batch-align": Arm("default and batch_align", ("--objective.batch_align.weight=0.3", "--objective.batch_align.texts=16"), scores=True),
}
CONTROL_ARM = "nll-all"
SHOWN = {"nll": CONTROL_ARM, "default": "default"}
BEST = "best, 1 thread"
"""How sums are rounded where nobody says otherwise."""
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Student's t of a 95 % interval, by number of pairs."""
SHORT, LONG = 20, 140
"""Steps of the two runs whose difference is the time of a step."""
STEPS = 1000
"""Of the default objective; what is not said of a record's ``clock``."""


@dataclass(frozen=True)
class Job:
    """One training. ``capability`` is ATEN_CPU_CAPABILITY, which, with the threads, decides how sums are rounded; ``clock`` is how long it
    takes, in steps of the default objective."""

    arm: str
    rate: str
    seed: int
    capability: str = ""
    threads: int = 1
    clock: int = STEPS

    @property
    def name(self) -> str:
        parts = [self.arm, self.rate, f"seed{self.seed}", self.capability, f"{self.threads}threads" if self.threads > 1 else ""]
        parts.append(f"clock{self.clock}" if self.clock != STEPS else "")
        return "-".join(part for part in parts if part)

    @property
    def record(self) -> Path:
        return RECORDS / f"{self.name}.json"

    @property
    def choice(self) -> Path:
        """Of the run by which a rate is chosen."""
        return RECORDS / "rates" / f"{self.name}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="which arms (default all)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each arm, from 0 (default 3)")
    parser.add_argument("--rates", nargs="+", default=["1e-3"], help="learning rates (default 1e-3)")
    text = f"try the rates of each arm with {CHOICE_SEEDS} seeds, and run its seeds at the one that is best on the validation split"
    parser.add_argument("--choose_rates", action="store_true", help=text)
    parser.add_argument("--capabilities", nargs="+", default=[""], help="values of ATEN_CPU_CAPABILITY (default the machine's best)")
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="threads of a run (default 1)")
    parser.add_argument("--steps", nargs="+", type=int, default=[STEPS], help=f"steps of the default objective (default {STEPS})")
    parser.add_argument("--num_test", type=int, default=9000, help="groups of held-out combinations (default 9000: 1000 an edit)")
    parser.add_argument("--num_questions", type=int, default=900, help="groups of each kind of question (default 900)")
    parser.add_argument("--num_validation", type=int, default=1800, help="groups that choose a rate (default 1800: 200 an edit)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (default one per core)")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"), help="folder of the runs (default runs/learning)")
    parser.add_argument("--report", action="store_true", help="only write the tables and the figure")
    arguments = parser.parse_args()
    if not arguments.report:
        run_all(arguments)
    report(arguments)


def run_all(arguments: argparse.Namespace) -> None:
    (RECORDS / "rates").mkdir(parents=True, exist_ok=True)
    if arguments.choose_rates:
        tried = [Job(arm, rate, seed) for seed in range(CHOICE_SEEDS) for arm in arguments.arms for rate in ARMS[arm].rates]
        run_missing(arguments, [job for job in tried if not job.choice.exists()], choose=True)
    rates = {arm: [best_rate(arm)] if arguments.choose_rates else arguments.rates for arm in arguments.arms}
    places = itertools.product(range(arguments.seeds), arguments.steps, arguments.arms, arguments.capabilities, arguments.threads)
    jobs = [Job(arm, rate, seed, capability, threads, clock) for seed, clock, arm, capability, threads in places for rate in rates[arm]]
    run_missing(arguments, [job for job in jobs if not job.record.exists()])


def run_missing(arguments: argparse.Namespace, jobs: list[Job], choose: bool = False) -> None:
    if not jobs:
        return
    prepare(arguments, {job.arm for job in jobs})
    arms = sorted({"default", *(job.arm for job in jobs)})
    seconds = {arm: seconds_per_step(arguments, arm) for arm in arms}  # one after the other, so that none disturbs another
    print("processor seconds per step:", {arm: round(value, 3) for arm, value in seconds.items()}, flush=True)
    one = run_choice if choose else run
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda job: one(arguments, job, round(job.clock * seconds["default"] / seconds[job.arm])), jobs))


def prepare(arguments: argparse.Namespace, arms: set[str]) -> None:
    """Write the world and the base once; and, where an arm needs them, scores of the base and rows with negatives of one kind."""
    train(arguments, arguments.out / "build", Job("default", "1e-3", 0), 1)
    rows = arguments.out / "scenes" / "train.jsonl"
    if any(ARMS[arm].scores for arm in arms) and not (scores := scores_file(arguments)).exists():
        command = [sys.executable, "-m", "cfvlm_ds", "score", str(arguments.out / "base"), str(rows), "--out", str(scores)]
        subprocess.run(command, cwd=REPO, check=True)
    for kind in {ARMS[arm].negatives for arm in arms} - {""}:
        lines = [json.dumps(with_negatives(json.loads(line), kind)) for line in rows.read_text().splitlines()]
        rows.with_name(f"train_{kind}.jsonl").write_text("\n".join(lines) + "\n")


def scores_file(arguments: argparse.Namespace) -> Path:
    return Path(arguments.out) / "scenes" / "train.scores.jsonl"


def with_negatives(row: dict[str, Any], kind: str) -> dict[str, Any]:
    """A row with its false ``texts`` alone, on the factual image, or its edited ``images`` alone, with the factual text."""
    kept = {"images": row["images"], "texts": row["texts"]}
    other = "images" if kind == "texts" else "texts"
    kept[other] = kept[other][:1]
    names = {part["id"] for each in kept.values() for part in each}
    edits = [
        {key: value for key, value in edit.items() if key != other[:-1]}
        for edit in row["edits"]
        if kind == "images" or edit["type"] != "sham"
    ]
    return row | kept | {"match": [cell for cell in row["match"] if {cell[0], cell[1]} <= names], "edits": edits}


def best_rate(arm: str) -> str:
    """The rate of the best mean over seeds on the validation split; of equals the lower."""
    found: dict[str, list[float]] = {}
    for path in sorted((RECORDS / "rates").glob("*.json")):
        record = json.loads(path.read_text())
        if record["arm"] == arm:
            found.setdefault(record["rate"], []).append(record[VALIDATION])
    return max(sorted(found, key=float), key=lambda rate: statistics.mean(found[rate]))


def run_choice(arguments: argparse.Namespace, job: Job, steps: int) -> None:
    folder = arguments.out / "rates" / job.name
    spent = train(arguments, folder, job, steps, {VALIDATION: arguments.num_validation})
    found = json.loads((folder / "results.json").read_text())[VALIDATION][-1]["metrics"]["group"]
    record = {**asdict(job), "steps": steps, "processor_seconds": round(spent), "processor": processor(), VALIDATION: found}
    job.choice.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{job.name}: {steps} steps, validation {found:.1f}", flush=True)


def seconds_per_step(arguments: argparse.Namespace, arm: str) -> float:
    short, long = (train(arguments, arguments.out / f"steps-{arm}-{steps}", Job(arm, "1e-3", 0), steps) for steps in (SHORT, LONG))
    return (long - short) / (LONG - SHORT)


def run(arguments: argparse.Namespace, job: Job, steps: int) -> None:
    folder = arguments.out / job.name
    limits = {"combo": arguments.num_test, **dict.fromkeys(("yes_no", "choice", "count"), arguments.num_questions)}
    spent = train(arguments, folder, job, steps, limits, start=not BASE.exists() and job.seed == 0 and job.arm == "default")
    found = {
        split: {row["name"]: {"groups": row["num"], "group": row["metrics"]["group"]} for row in rows}
        for split, rows in json.loads((folder / "results.json").read_text()).items()
    }
    if (start := folder / "results_start.json").exists():
        rows = {split: {edit: metrics["group"] for edit, metrics in rows.items()} for split, rows in json.loads(start.read_text()).items()}
        BASE.write_text(json.dumps(rows, indent=1) + "\n")
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    factual = [row["logp/lp_00"] for row in logged if "logp/lp_00" in row]
    record = {
        **asdict(job),
        "steps": steps,
        "processor_seconds": round(spent),
        "processor": processor(),
        "factual_nats_per_token": {"first": round(factual[0], 3), "last": round(factual[-1], 3)},
        "results": found,
        "nll": {split: rows[-1].get("nll") for split, rows in json.loads((folder / "results.json").read_text()).items()},
    }
    job.record.write_text(json.dumps(record, indent=1) + "\n")
    combo = found["combo"]
    print(f"{job.name}: {steps} steps, relation {combo['relation']['group']:.1f}, all {combo['all']['group']:.1f}", flush=True)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def train(
    arguments: argparse.Namespace, folder: Path, job: Job, steps: int, limits: dict[str, int] | None = None, start: bool = False
) -> float:
    """Train to the end; returns processor seconds, start and evaluation (of so many groups of each split in ``limits``) included."""
    command = [sys.executable, "train.py", "--deepspeed", "ds_configs/z3.json", "--config", "examples/quickstart.yaml"]
    command += [f"--build.base={arguments.out / 'base'}", f"--model.name_or_path={arguments.out / 'base'}"]
    world, arm = arguments.out / "scenes", ARMS[job.arm]
    rows = world / (f"train_{arm.negatives}.jsonl" if arm.negatives else "train.jsonl")
    command += [f"--build.scenes.out_dir={world}", f"--build.scenes.num_test={arguments.num_test}", f"--data.train={rows}"]
    splits = {
        name: {"path": str(world / f"{name if name == VALIDATION else f'test_{name}'}.jsonl"), "limit": limit}
        for name, limit in (limits or {}).items()
    }
    command += [f"--data.scores={scores_file(arguments)}"] * arm.scores
    command += [
        f"--data.evaluation={json.dumps(splits)}",
        f"--train.output_dir={folder}",
        f"--train.max_steps={steps}",
        f"--train.seed={job.seed}",
        f"--train.learning_rate={job.rate}",
        "--tracking.enabled=false",
        "--data.num_workers=0",
        "--train.save_steps=0",
        "--train.eval_steps=0",
        f"--train.eval_on_start={str(start).lower()}",
        "--train.eval_shuffled=false",
        "--train.figures=false",
        "--train.export=false",
        *arm.options,
    ]
    return run_process(
        command, folder, {"OMP_NUM_THREADS": str(job.threads)} | ({"ATEN_CPU_CAPABILITY": job.capability} if job.capability else {})
    )


def run_process(command: Sequence[str], folder: Path, variables: dict[str, str]) -> float:
    """Run to the end unless ``folder`` says that it has been; returns the processor seconds that it took. FOLDER.log has what it said."""
    if (folder / "processor_seconds").exists():
        return float((folder / "processor_seconds").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=REPO, env=os.environ | variables, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{folder}: exit code {process.returncode}\n{log.read_text(errors='replace')[-4000:]}")
    spent = usage.ru_utime + usage.ru_stime
    (folder / "processor_seconds").write_text(f"{spent:.2f}\n")
    return spent


def report(arguments: argparse.Namespace) -> None:
    records = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json")) if path != BASE]
    if not records or not BASE.exists():
        sys.exit(f"{RECORDS} holds no results; run without --report first")
    text = "\n\n".join(tables(records))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "learning.md").write_text(text + "\n")
    figure(arguments.out / "learning.png", records)
    shown = {name: [r["results"] for r in records if told(r) == (arm, "1e-3", BEST)] for name, arm in SHOWN.items()}
    if all(shown.values()):
        DEMO.write_text(json.dumps(for_demo(json.loads(BASE.read_text()), shown), indent=1) + "\n")
    print(text, f"\nwrote {arguments.out}/learning.md and learning.png")


def for_demo(base: dict[str, Any], arms: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The accuracies of the base and, of each arm, the number of seeds and their mean, lowest and highest accuracy, by split and edit."""
    found: dict[str, Any] = {"base": {split: {edit: round(value, 1) for edit, value in rows.items()} for split, rows in base.items()}}
    for arm, seeds in arms.items():
        found[arm] = {"seeds": len(seeds)} | {
            which: {
                split: {edit: round(pick([each[split][edit]["group"] for each in seeds]), 1) for edit in rows}
                for split, rows in seeds[0].items()
            }
            for which, pick in {"mean": statistics.mean, "lowest": min, "highest": max}.items()
        }
    return found


def told(record: dict[str, Any]) -> tuple[str, ...]:
    """What distinguishes the row of a record, beside its seed."""
    rounding = f"{record['capability'] or 'best'}, {record['threads']} thread{'s' if record['threads'] > 1 else ''}"
    longer = f", time of {clock} steps" if (clock := record.get("clock", STEPS)) != STEPS else ""
    return record["arm"], record["rate"], rounding + longer


def tables(records: list[dict[str, Any]]) -> Iterator[str]:
    """Group accuracy by edit on held-out combinations, mean over seeds and half the width of its 95 % t interval; then each seed's."""
    rows: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda r: (list(ARMS).index(r["arm"]), *told(r), r["seed"])):
        rows.setdefault(told(record), []).append(record)
    edits = list(records[0]["results"]["combo"])
    questions = [split for split in records[0]["results"] if split != "combo"]
    head = [*edits, *questions]
    pairs = records[0]["results"]["combo"]["relation"]["groups"]
    yield "\n".join(
        [
            f"| group accuracy, %, {pairs} pairs an edit | rate | sums | seeds | steps | {' | '.join(head)} |",
            f"|---|---:|---|---:|---:|{'---:|' * len(head)}",
            f"| base | | | | | {' | '.join(f'{value:.1f}' for value in base_of(edits, questions))} |",
            *(line(key, found, edits, questions) for key, found in rows.items()),
        ]
    )
    if differences := [each for key, found in rows.items() if (each := paired(key, found, rows, edits))]:
        title = f"| points above {ARMS[CONTROL_ARM].title}, pairs of seeds | rate | seeds | {' | '.join(edits)} |"
        yield "\n".join([title, f"|---|---:|---:|{'---:|' * len(edits)}", *differences])
    yield "\n".join(
        [
            f"| run | steps | processor s | {' | '.join(head)} |",
            f"|---|---:|---:|{'---:|' * len(head)}",
            *(
                f"| {ARMS[r['arm']].title}, {r['rate']}, {told(r)[2]}, seed {r['seed']} | {r['steps']} | {r['processor_seconds']} | "
                f"{' | '.join(f'{value:.1f}' for value in values(r, edits, questions))} |"
                for found in rows.values()
                for r in found
            ),
        ]
    )


def base_of(edits: list[str], questions: list[str]) -> list[float]:
    base = json.loads(BASE.read_text())
    return [base["combo"][edit] for edit in edits] + [base[split]["all"] for split in questions]


def values(record: dict[str, Any], edits: list[str], questions: list[str]) -> list[float]:
    found = record["results"]
    return [found["combo"][edit]["group"] for edit in edits] + [found[split]["all"]["group"] for split in questions]


def paired(key: tuple[str, ...], found: list[dict[str, Any]], rows: dict[tuple[str, ...], list[dict[str, Any]]], edits: list[str]) -> str:
    """An arm's differences from the NLL control, mean and half the width of a 95 % t interval over seeds that both have; "" without two.

    The control is taken at its own rate: the one of which most seeds are there.
    """
    control = max((some for other, some in rows.items() if other[0] == CONTROL_ARM and other[2] == key[2]), key=len, default=[])
    of_seed = {record["seed"]: values(record, edits, []) for record in control}
    pairs = [(values(record, edits, []), of_seed[record["seed"]]) for record in found if record["seed"] in of_seed]
    if key[0] == CONTROL_ARM or len(pairs) < 2:
        return ""
    columns = [[own[k] - theirs[k] for own, theirs in pairs] for k in range(len(edits))]
    cells = [f"{statistics.mean(column):+.1f} ± {half_width(column):.1f}" for column in columns]
    return f"| {ARMS[key[0]].title} | {key[1]} | {len(pairs)} | {' | '.join(cells)} |"


def half_width(values: Sequence[float]) -> float:
    """Half the width of the 95 % t interval of the mean of two values or more."""
    return T95[min(len(values), max(T95))] * statistics.stdev(values) / len(values) ** 0.5


def line(key: tuple[str, ...], found: list[dict[str, Any]], edits: list[str], questions: list[str]) -> str:
    columns = zip(*(values(record, edits, questions) for record in found), strict=True)
    cells = [f"{statistics.mean(c):.1f}" + (f" ± {half_width(c):.1f}" if len(c) > 1 else "") for c in columns]
    steps = "/".join(sorted({str(record["steps"]) for record in found}))
    return f"| {ARMS[key[0]].title} | {key[1]} | {key[2]} | {len(found)} | {steps} | {' | '.join(cells)} |"


def figure(path: Path, records: list[dict[str, Any]]) -> None:
    """Bars by edit type on held-out combinations: base, NLL control and ours, means of seeds; whiskers are their 95 % t intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    edits = list(records[0]["results"]["combo"])
    bars: list[tuple[str, str, list[list[float]]]] = [("base", "#c9c9c9", [[value] for value in base_of(edits, [])])]
    for arm, colour in (("nll-all", "#7f8790"), ("default", "#1f6f8b")):
        found = [r for r in records if told(r) == (arm, "1e-3", BEST)]
        if found:
            bars.append((f"+ {ARMS[arm].title}", colour, [[r["results"]["combo"][edit]["group"] for r in found] for edit in edits]))
    canvas, axes = pyplot.subplots(figsize=(10, 3.6), layout="constrained")
    width = 0.8 / len(bars)
    for k, (name, colour, each) in enumerate(bars):
        place = [e + (k - (len(bars) - 1) / 2) * width for e in range(len(edits))]
        means = [statistics.mean(v) for v in each]
        axes.bar(place, means, 0.92 * width, color=colour, label=name)
        if len(each[0]) > 1:
            axes.errorbar(place, means, [half_width(v) for v in each], fmt="none", ecolor="#333333", elinewidth=0.8)
    axes.axhline(100 / 6, color="#333333", linewidth=0.8, linestyle=":")
    axes.text(-0.85, 100 / 6 + 1, "chance", fontsize=8)
    axes.set_xticks(range(len(edits)), [edit.replace("_", " ") for edit in edits])
    axes.set_ylim(0, 100)
    axes.set_ylabel("group accuracy, %")
    axes.set_title("Held-out combinations", fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    canvas.legend(frameon=False, fontsize=9, ncols=len(bars), loc="outside upper right")
    canvas.savefig(path, dpi=160)


if __name__ == "__main__":
    main()
