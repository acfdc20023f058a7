"""Learning in equal CPU time: NLL, DPO and its relatives, the paper's literal sum, the default objective, and variants of the default
without each term, with negatives of one kind, with adapters, and with in-batch alignment.

    python benchmarks/learning.py --table parts                 # runs what a table of RESULTS.md lacks, and prints the table
    python benchmarks/learning.py --choose_rates --seeds 5      # four rates of each arm, the two best again, five seeds of the best
    python benchmarks/learning.py --seeds 8                     # runs what is missing at one rate, one run per core
    python benchmarks/learning.py --arms default nll-all --rates 5e-4 1e-3
    python benchmarks/learning.py --arms default --capabilities default avx2 --threads 1 2     # other roundings of sums
    python benchmarks/learning.py --arms default nll-all --steps 550 1000 2800 8300 --seeds 1  # 2, 4, 10 and 30 minutes
    python benchmarks/learning.py --arms default nll-all --groups 250 1000 4000 0              # fewer groups
    python benchmarks/learning.py --arms default nll-all --steps 8300 --groups 100000 --seeds 1  # so many groups that none is seen twice
    python benchmarks/learning.py --arms default nll-all --noise 0 10 30                       # groups with wrong labels
    python benchmarks/learning.py --arms default nll-all calibrated-long --more 14 --num_test 1400   # captions with 14 more sentences
    python benchmarks/learning.py --grid                        # the options of `calibrate` and settings that a user would try
    python benchmarks/learning.py --report                      # the tables and figures of all finished runs

Every run is `train.py --config examples/quickstart.yaml` with the options of its arm: one base, one world, one schedule, ZeRO-3. The
default objective takes --steps steps. The other arms take as many as the same CPU seconds allow, measured by two short runs next to two of
the default. Arms that need scores of the base read them from a file that is written once; its time is not counted.
benchmarks/learning/runs.jsonl gets a line when a run ends, so seeds and rates can be added later and on another machine. A run with a line
there is not repeated; to repeat a table, delete the lines of its runs first. --choose_rates decides with the validation split, which no
table shows; those runs are in benchmarks/learning/rates.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from learning_arms import ARMS, CAPTIONS, CONTROL_ARM, GRID, KNOWN, RECORDS, SHARP, STEPS, VALIDATION, WORLD, Job, lengthened, rows_of
from learning_shown import TABLES, Record, missing, text_of
from learning_tables import BEST, choices, figure, over_time, renew_pages, tables, told
from records import RATE_RUNS, RUNS, add_record, read_records

from cfvlm_ds.evaluation.metrics import MEAN

REPO = Path(__file__).resolve().parent.parent
DEMO = REPO / "cfvlm_ds" / "demo" / "measured.json"
"""Results that the demo prints next to its own: those of the base, of NLL on all pairs and of the default objective."""
BASE = "base"
"""Name of the record with the base's group accuracies, which the first run writes."""
PAGES = (RECORDS.with_name("RESULTS.md"), RECORDS.with_name("TRIALS.md"))
"""Pages into which --report writes tables."""
CHOICE_SEEDS = 2
SHOWN = {"nll": (CONTROL_ARM, "1e-3"), "default": ("default", "3e-4")}
"""Arms of the figure and of the demo's table: the default at the recipe's rate, NLL at its best rate."""
TIMED = (SHOWN["nll"], ("mdpo", "3e-4"), SHOWN["default"])
"""Arms of the figure over time."""
TESTS = 7000
"""Least number of groups in each split of a world; --num_test uses fewer of them."""
CHOICE_COMMAND = "benchmarks/learning.py --choose_rates --seeds 0"
GRID_COMMAND = "benchmarks/learning.py --grid"
SHORT, LONG = 20, 140
"""Steps of the two runs from whose difference the time of a step is computed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = f"which arms (default all except those of the grid and of long captions): {', '.join(KNOWN)}"
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(KNOWN), metavar="ARM", help=text)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each arm, from 0 (default 3)")
    parser.add_argument("--rates", nargs="+", default=["3e-4"], help="learning rates (default 3e-4)")
    text = f"run what these tables of RESULTS.md or TRIALS.md lack, and print the tables: {', '.join(TABLES)}"
    parser.add_argument("--table", nargs="+", choices=list(TABLES), metavar="TABLE", help=text)
    text = f"try the rates of each arm, the two best with {CHOICE_SEEDS} seeds, and run its seeds at the best on the validation split"
    parser.add_argument("--choose_rates", action="store_true", help=text)
    text = f"run the default, the options of `calibrate` and other settings, {CHOICE_SEEDS} seeds, on the validation split only"
    parser.add_argument("--grid", action="store_true", help=text)
    parser.add_argument("--capabilities", nargs="+", default=[""], help="values of ATEN_CPU_CAPABILITY (default: the machine's best)")
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="threads of a run (default 1)")
    parser.add_argument("--steps", nargs="+", type=int, default=[STEPS], help=f"steps of the default objective (default {STEPS})")
    parser.add_argument(
        "--groups", nargs="+", type=int, default=[0], help="groups of the world's 16,000, or of a larger one (default 0: all)"
    )
    parser.add_argument("--noise", nargs="+", type=int, default=[0], help="percentage of groups whose two texts are exchanged (default 0)")
    parser.add_argument("--more", nargs="+", type=int, default=[0], help="true statements added to every caption (default 0)")
    parser.add_argument("--num_test", type=int, default=TESTS, help=f"groups of held-out combinations (default {TESTS}: 1000 per edit)")
    parser.add_argument("--num_questions", type=int, default=900, help="groups of each kind of question (default 900)")
    parser.add_argument("--num_validation", type=int, default=1400, help="groups for the choice of a rate (default 1400: 200 per edit)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (default one per core)")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"), help="folder of the runs (default runs/learning)")
    parser.add_argument("--report", action="store_true", help="only write the tables and the figures")
    arguments = parser.parse_args()
    if arguments.table:
        for name in arguments.table:
            show(arguments, name)
        return
    if not arguments.report:
        run_all(arguments)
    report(arguments)


def show(arguments: argparse.Namespace, name: str) -> None:
    """Run what a table lacks, and print the table. The base's accuracies come from the first run of the default."""
    table = TABLES[name]
    arguments.num_test = table.num_test or arguments.num_test
    done = read_records(RECORDS / RUNS)
    needed = dict.fromkeys([*([] if BASE in done else [Job(*SHOWN["default"], 0)]), *table.jobs])
    run_missing(arguments, list(needed))
    named = read_records(RECORDS / RUNS)
    print(text_of(table, named, named.pop(BASE)) + "\n", flush=True)


def run_all(arguments: argparse.Namespace) -> None:
    if arguments.grid:
        tried = [Job(arm, rate, seed) for seed in range(CHOICE_SEEDS) for arm in ("default", *GRID) for rate in arguments.rates]
        run_missing(arguments, tried, choose=True)
        return
    for seed in range(CHOICE_SEEDS if arguments.choose_rates else 0):
        tried = [Job(arm, rate, seed) for arm in arguments.arms for rate in rates_to_try(arm, seed)]
        run_missing(arguments, tried, choose=True)
    rates = {arm: best_rates(arm, CHOICE_SEEDS)[:1] if arguments.choose_rates else arguments.rates for arm in arguments.arms}
    ways = itertools.product(arguments.capabilities, arguments.threads, arguments.steps, arguments.groups, arguments.noise, arguments.more)
    places = itertools.product(range(arguments.seeds), ways, arguments.arms)
    jobs = [Job(arm, rate, seed, *way) for seed, way, arm in places for rate in rates[arm]]
    run_missing(arguments, jobs)


def run_missing(arguments: argparse.Namespace, jobs: list[Job], choose: bool = False) -> None:
    """Run the jobs that have no record, ``arguments.jobs`` at a time."""
    done = read_records(RECORDS / (RATE_RUNS if choose else RUNS))
    if not (jobs := [job for job in jobs if job.name not in done]):
        return
    prepare(arguments, jobs)
    timed = {(job.arm, job.more) for job in jobs if job.arm not in (*GRID, *SHARP, "default")}
    costs = {each: cost(arguments, *each) for each in sorted(timed)}
    print(
        "time of a step relative to the default:", {f"{arm} +{more}": round(value, 3) for (arm, more), value in costs.items()}, flush=True
    )
    one = run_choice if choose else run
    with ThreadPoolExecutor(arguments.jobs) as pool:
        started = [pool.submit(one, arguments, job, steps_of(job, costs)) for job in jobs]
        try:
            for each in as_completed(started):
                each.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def prepare(arguments: argparse.Namespace, jobs: Sequence[Job]) -> None:
    """Write the base and each world once, the rows of each run, and the scores of the base if an arm needs them."""
    timed = [Job(arm, "1e-3", 0, more=job.more) for job in jobs for arm in ("default", job.arm)]  # all groups, with correct labels
    plain = [Job(name, "1e-3", 0) for name in ("default", *KNOWN) if not KNOWN[name].scores and not KNOWN[name].negatives]
    for world, job in {job.world(arguments.out): job for job in (plain[0], *jobs)}.items():
        first = next(each for each in plain if KNOWN[each.arm].counterfactuals == KNOWN[job.arm].counterfactuals)
        larger = job.groups if job.groups > WORLD else 0
        train(arguments, arguments.out / world.name.replace("world", "build"), replace(first, groups=larger), 1)
    for job in {(job.rows(arguments.out), KNOWN[job.arm].scores): job for job in (*jobs, *timed)}.values():
        if not (rows := job.rows(arguments.out)).exists():
            lines = (json.loads(line) for line in (job.world(arguments.out) / "train.jsonl").read_text().splitlines())
            rows.write_text("".join(json.dumps(row) + "\n" for row in rows_of(job, lines)))
        for split in CAPTIONS if job.more else ():
            whole = (json.loads(line) for line in replace(job, more=0).tests(arguments.out, split).read_text().splitlines())
            job.tests(arguments.out, split).write_text("".join(json.dumps(lengthened(row, job.more)) + "\n" for row in whole))
        if KNOWN[job.arm].scores and not (scores := scores_of(rows)).exists():
            command = [sys.executable, "-m", "cfvlm_ds", "score", str(arguments.out / "base"), str(rows), "--out", str(scores)]
            subprocess.run(command, cwd=REPO, check=True)


def scores_of(rows: Path) -> Path:
    return rows.with_suffix(".scores.jsonl")


def rates_to_try(arm: str, seed: int) -> Sequence[str]:
    """Return all rates of an arm for the first seed, and the two best of them for the others."""
    return best_rates(arm, 1)[:2] if seed else KNOWN[arm].rates


def best_rates(arm: str, seeds: int) -> list[str]:
    """Return the rates tried with the first ``seeds`` seeds, sorted by their mean on the validation split, best first, lower rate first."""
    found: dict[str, dict[int, float]] = {}
    for record in read_records(RECORDS / RATE_RUNS).values():
        if record["arm"] == arm and record["seed"] < seeds and record["rate"] in KNOWN[arm].rates:
            found.setdefault(record["rate"], {})[record["seed"]] = record[VALIDATION]
    means = {rate: statistics.mean(of_seed.values()) for rate, of_seed in found.items() if len(of_seed) == seeds}
    return sorted(means, key=lambda rate: (-means[rate], float(rate)))


def run_choice(arguments: argparse.Namespace, job: Job, steps: int) -> None:
    folder = arguments.out / "rates" / job.name
    spent = train(arguments, folder, job, steps, {VALIDATION: arguments.num_validation})
    found = json.loads((folder / "results.json").read_text())[VALIDATION][-1]["metrics"]["group"]
    record = {**asdict(job), "steps": steps, "processor_seconds": round(spent), "processor": processor(), VALIDATION: found}
    add_record(RECORDS / RATE_RUNS, job.name, record)
    print(f"{job.name}: {steps} steps, validation {found:.1f}", flush=True)


def cost(arguments: argparse.Namespace, arm: str, more: int) -> float:
    """Return the CPU seconds that a step of the arm takes, relative to the default's. Both run at the same time, so other load slows down
    both.
    """
    name = f"steps-{arm}{f'-more{more}' if more else ''}"

    def seconds(one: str) -> float:
        job = Job(one, "1e-3", 0, more=more)
        short, long = (train(arguments, arguments.out / f"{name}-{one}-{steps}", job, steps) for steps in (SHORT, LONG))
        return (long - short) / (LONG - SHORT)

    with ThreadPoolExecutor(2) as pool:
        own, default = pool.map(seconds, (arm, "default"))
    return own / default


def steps_of(job: Job, costs: Mapping[tuple[str, int], float]) -> int:
    """Return the number of steps in the job's time. Arms of the grid have the terms of the default, and hence its time per step."""
    return round(job.clock / costs.get((job.arm, job.more), 1.0))


def run(arguments: argparse.Namespace, job: Job, steps: int) -> None:
    folder = arguments.out / job.name
    go_on_from_choice(arguments.out / "rates" / job.name, folder, steps)
    limits = {"combo": arguments.num_test, **dict.fromkeys(("yes_no", "choice", "count"), arguments.num_questions)}
    spent = train(
        arguments, folder, job, steps, limits, start=BASE not in read_records(RECORDS / RUNS) and job.seed == 0 and job.arm == "default"
    )
    found = {
        split: {row["name"]: {"groups": row["num"], "group": row["metrics"]["group"]} for row in rows}
        for split, rows in json.loads((folder / "results.json").read_text()).items()
    }
    table = json.loads((folder / "before_after.json").read_text())
    if changes := [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]:
        add_record(RECORDS / RUNS, BASE, before(changes))
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
    add_record(RECORDS / RUNS, job.name, record)
    combo = found["combo"]
    print(f"{job.name}: {steps} steps, relation {combo['relation']['group']:.1f}, all {combo['all']['group']:.1f}", flush=True)


def before(changes: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return accuracies before the training by set and edit, by the first metric of each set."""
    found: dict[str, dict[str, float]] = {}
    for row in changes:
        of_set = found.setdefault(row["set"], {"all": row["before"]})
        if row["edit"] != MEAN:
            of_set.setdefault(row["edit"], row["before"])
    return found


def go_on_from_choice(choice: Path, folder: Path, steps: int) -> None:
    """Continue from the checkpoint of the same training if it has chosen a rate, so that only the evaluation runs. Its time is counted."""
    if folder.exists() or not (choice / "processor_seconds").exists() or not (choice / f"checkpoint-{steps}").exists():
        return
    shutil.copytree(choice, folder, ignore=shutil.ignore_patterns("finished.json", "results.*", "processor_seconds"))
    (folder / "processor_seconds_so_far").write_text((choice / "processor_seconds").read_text())


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def train(
    arguments: argparse.Namespace, folder: Path, job: Job, steps: int, limits: dict[str, int] | None = None, start: bool = False
) -> float:
    """Train to the end, and return the CPU seconds, including the start and the evaluation (``limits``: groups of each split)."""
    command = [sys.executable, "train.py", "--deepspeed", "ds_configs/z3.json", "--config", "examples/quickstart.yaml"]
    command += [f"--build.base={arguments.out / 'base'}", f"--model.name_or_path={arguments.out / 'base'}"]
    arm, rows = KNOWN[job.arm], job.rows(arguments.out)
    command += [f"--build.habits.out_dir={job.world(arguments.out)}", f"--build.habits.num_counterfactuals={arm.counterfactuals}"]
    command += [f"--build.habits.num_test={max(arguments.num_test, TESTS)}", f"--build.habits.num_train={max(job.groups, WORLD)}"]
    command += [f"--data.train={rows}"]
    splits = {name: {"path": str(job.tests(arguments.out, name)), "limit": limit} for name, limit in (limits or {}).items()}
    command += [f"--data.scores={scores_of(rows)}"] * arm.scores
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
    variables = {"OMP_NUM_THREADS": str(job.threads)} | ({"ATEN_CPU_CAPABILITY": job.capability} if job.capability else {})
    return run_process(command, folder, variables, "finished.json")


def run_process(command: Sequence[str], folder: Path, variables: dict[str, str], leaves: str = "") -> float:
    """Run a command to the end unless ``folder`` records that it has ended, and return the CPU seconds of all its starts. Its output is in
    FOLDER.log. If the file ``leaves`` is missing at the end, the command has only been stopped.
    """
    whole, part, log = folder / "processor_seconds", folder / "processor_seconds_so_far", folder.with_name(f"{folder.name}.log")
    if whole.exists():
        refuse_other_objective(command, folder)
        return float(whole.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=REPO, env=os.environ | variables, stdout=output, stderr=subprocess.STDOUT)
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
    """Exit if a finished run has another loss than its command has now, because a default may have changed since."""
    if "train.py" not in command or not (folder / "config.yaml").exists():
        return
    from cfvlm_ds.core.parsing import parse_config
    from cfvlm_ds.core.run_folder import recorded_options
    from cfvlm_ds.objectives import OBJECTIVES

    now = parse_config(command[command.index("train.py") + 1 :], OBJECTIVES).resolved["objective"]
    if json.loads(json.dumps(now)) != recorded_options(folder)["objective"]:
        sys.exit(f"{folder} is a run with another objective (see its config.yaml) than its options have now; move it away and start again")


def report(arguments: argparse.Namespace) -> None:
    named = read_records(RECORDS / RUNS)
    base = named.pop(BASE, None)
    records = list(named.values())
    if not records or base is None:
        sys.exit(f"{RECORDS} contains no results; run without --report first")
    chosen = list(read_records(RECORDS / RATE_RUNS).values())
    text = "\n\n".join([*tables(records, base), *([choices(chosen)] if chosen else [])])
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "learning.md").write_text(text + "\n")
    shown = {name: [r["results"] for r in records if told(r) == (*arm, BEST)] for name, arm in SHOWN.items()}
    figure(arguments.out / "learning.png", shown, base)
    of_time = [r for r in records if r["seed"] == 0 and told(r | {"clock": STEPS}) in [(*arm, BEST) for arm in TIMED]]
    lines = {KNOWN[arm].title: {r.get("clock", STEPS): r["results"] for r in of_time if r["arm"] == arm} for arm, _ in TIMED}
    over_time(arguments.out / "learning_time.png", lines, base)
    if all(shown.values()):
        DEMO.write_text(json.dumps(for_demo(base, shown), indent=1) + "\n")
    print(text, f"\nwrote {arguments.out}/learning.md, learning.png and learning_time.png")
    write_pages(named, base, chosen)


def write_pages(records: Mapping[str, Record], base: dict[str, Any], chosen: list[dict[str, Any]]) -> None:
    """Write the tables into the pages that show them. A table that lacks a run is left unchanged and named."""
    tried = [each for each in chosen if each["arm"] in ARMS]
    settings = [each for each in chosen if each["arm"] in (*GRID, "default") and each["rate"] == SHOWN["default"][1]]
    commands = {CHOICE_COMMAND: choices(tried), GRID_COMMAND: choices(settings)}
    for name, table in TABLES.items():
        if lacking := missing(table, records):
            print(f"--table {name} lacks {len(lacking)} runs, such as {lacking[0]}, and is left unchanged")
        else:
            commands[f"benchmarks/learning.py --table {name}"] = text_of(table, records, base)
    renew_pages(PAGES, commands.items())


def for_demo(base: dict[str, Any], arms: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the accuracies of the base and, for each arm, the number of seeds and the mean, lowest and highest accuracy, by split and
    edit.
    """
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


if __name__ == "__main__":
    main()
