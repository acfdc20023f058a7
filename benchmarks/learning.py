"""What each objective teaches in the same wall-clock time: controls, the paper's literal sum, our default, and the default minus each term.

    python benchmarks/learning.py --seconds 420 --seeds 3            # about 90 minutes on two cores
    python benchmarks/learning.py --report                           # the table and the figure of what has been run

Every run is `train.py --config examples/quickstart.yaml` with the options of its variant: the same initial weights, data, schedule shape
and ZeRO-3 engine. A short run of each variant measures its seconds per optimizer step, which sets its number of steps. Steps and results
are kept in benchmarks/learning.json: what it holds is not measured or run again, so seeds may be added later, and on another machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
RECORD = REPO / "benchmarks" / "learning.json"
"""Variant -> {steps, seeds: {seed: {split: {edit type: group accuracy in %}}}}."""
NO_CONTRAST = ("--objective.csd.weight=0", "--objective.fcd.weight=0")
PAPER = [
    f"--objective.{term}.{option}={value}"
    for term, margin in (("csd", 0.25), ("fcd", 0.30))
    for option, value in (("weight", 0.5), ("margin", margin), ("link", "hinge"), ("len_norm", "anchor"), ("margin_unit", "per_token"))
]
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "a": ("NLL, factual pairs", ("--objective.align.counterfactual=0", *NO_CONTRAST)),
    "b": ("NLL, all pairs", ("--objective.align.counterfactual=1", *NO_CONTRAST)),
    "c": (
        "paper's literal sum",
        ("--objective.align.counterfactual=0", *PAPER, "--objective.csd.mode=matched", "--objective.fcd.symmetric=false"),
    ),
    "d": ("default objective", ()),
    "e-align": ("default without align", ("--objective.align.weight=0",)),
    "e-csd": ("default without csd", ("--objective.csd.weight=0",)),
    "e-fcd": ("default without fcd", ("--objective.fcd.weight=0",)),
}
CALIBRATION_STEPS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="training time of each run (default 300)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each variant (default 3)")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), help="which variants (default all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each (default one per core)")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"), help="folder of the runs (default runs/learning)")
    parser.add_argument("--report", action="store_true", help="only write the table and the figure")
    arguments = parser.parse_args()
    if not arguments.report:
        run_all(arguments)
    report(arguments)


def run_all(arguments: argparse.Namespace) -> None:
    arguments.out.mkdir(parents=True, exist_ok=True)
    train(arguments.out / "build", ("--train.max_steps=1", "--data.evaluation={}"))  # writes the world and the model once
    record = recorded()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        # Calibrated side by side, as the runs themselves are timed.
        new = [variant for variant in arguments.variants if variant not in record]
        for variant, seconds in zip(new, pool.map(lambda v: seconds_per_step(arguments.out, v), new), strict=True):
            record[variant] = {"steps": round(arguments.seconds / seconds), "seeds": {}}
            print(f"{variant}: {seconds:.3f} s per step", flush=True)
        todo = [(v, seed) for seed in range(arguments.seeds) for v in arguments.variants if str(seed) not in record[v]["seeds"]]
        for variant, seed, found in pool.map(lambda job: run(arguments.out, *job, record[job[0]]["steps"]), todo):
            record[variant]["seeds"][str(seed)] = found
            RECORD.write_text(json.dumps(record, indent=1) + "\n")


def recorded() -> dict[str, Any]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def seconds_per_step(out: Path, variant: str) -> float:
    folder = out / f"calibrate-{variant}"
    options = (f"--train.max_steps={CALIBRATION_STEPS}", f"--train.logging_steps={CALIBRATION_STEPS // 4}", "--data.evaluation={}")
    train(folder, (*options, *VARIANTS[variant][1]))
    times = [row["time"] for row in rows(folder) if "loss" in row]
    return (times[-1] - times[0]) / (CALIBRATION_STEPS - CALIBRATION_STEPS // 4)


def run(out: Path, variant: str, seed: int, steps: int) -> tuple[str, int, dict[str, dict[str, float]]]:
    folder = out / f"{variant}-seed{seed}"
    train(folder, (f"--train.max_steps={steps}", f"--train.seed={seed}", *VARIANTS[variant][1]))
    times = [row["time"] for row in rows(folder) if "loss" in row]
    print(f"{folder.name}: {steps} steps in {times[-1] - times[0]:.0f} s", flush=True)
    splits = json.loads((folder / "results.json").read_text())
    return variant, seed, {s: {row["name"]: row["metrics"]["group"] for row in each} for s, each in splits.items()}


def train(folder: Path, options: tuple[str, ...]) -> None:
    if (folder / "results.json").exists():
        return
    command = [sys.executable, "train.py", "--deepspeed", "ds_configs/z3.json", "--config", "examples/quickstart.yaml"]
    command += [
        f"--train.output_dir={folder}",
        "--tracking.enabled=false",
        "--data.num_workers=0",
        "--train.save_steps=0",
        "--train.eval_steps=0",
        "--train.export=false",
        *options,
    ]
    finished = subprocess.run(command, cwd=REPO, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, capture_output=True, check=False)
    if finished.returncode:
        sys.exit(f"{folder}: exit code {finished.returncode}\n{finished.stdout[-2000:]}{finished.stderr[-2000:]}")


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def report(arguments: argparse.Namespace) -> None:
    record = recorded()
    found = {variant: list(record[variant]["seeds"].values()) for variant in VARIANTS if record.get(variant, {}).get("seeds")}
    if not found:
        sys.exit(f"{RECORD} holds no results; run without --report first")
    text = "\n\n".join(tables(found))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "learning.md").write_text(text + "\n")
    figure(arguments.out / "learning.png", found)
    print(text, f"\nwrote {arguments.out}/learning.md and learning.png")


def tables(found: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Group accuracy, mean and standard deviation over seeds: of the splits together, then of each."""
    first = next(iter(found.values()))[0]
    edits = list(next(iter(first.values())))
    for title, splits in {"mean of all splits": list(first), **{split: [split] for split in first}}.items():
        lines = [f"| {title}: group accuracy, % | seeds | {' | '.join(edits)} |", f"|---|---:|{'---:|' * len(edits)}"]
        for variant, seeds in found.items():
            cells = [spread([statistics.mean(seed[split][edit] for split in splits) for seed in seeds]) for edit in edits]
            lines.append(f"| {variant}: {VARIANTS[variant][0]} | {len(seeds)} | {' | '.join(cells)} |")
        yield "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.0f}" + (f" ± {statistics.stdev(values):.0f}" if len(values) > 1 else "")


def figure(path: Path, found: dict[str, list[dict[str, Any]]], split: str = "combo") -> None:
    """Bars by edit type, one colour per variant, on held-out combinations; whiskers are one standard deviation over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    edits = list(next(iter(found.values()))[0][split])
    shown = [v for v in ("a", "b", "c", "d") if v in found]
    colours = {"a": "#b8b8b8", "b": "#7f8790", "c": "#d9a441", "d": "#1f6f8b"}
    canvas, axes = pyplot.subplots(figsize=(10, 3.6), layout="constrained")
    width = 0.8 / len(shown)
    for k, variant in enumerate(shown):
        values = [[seed[split][edit] for seed in found[variant]] for edit in edits]
        place = [e + (k - (len(shown) - 1) / 2) * width for e in range(len(edits))]
        spreads = [statistics.stdev(v) if len(v) > 1 else 0 for v in values]
        axes.bar(place, [statistics.mean(v) for v in values], 0.92 * width, color=colours[variant], label=VARIANTS[variant][0])
        axes.errorbar(place, [statistics.mean(v) for v in values], spreads, fmt="none", ecolor="#333333", elinewidth=0.8)
    axes.axhline(100 / 6, color="#333333", linewidth=0.8, linestyle=":")
    axes.text(-0.85, 100 / 6 + 1, "chance", fontsize=8)
    axes.set_xticks(range(len(edits)), [edit.replace("_", " ") for edit in edits])
    axes.set_ylim(0, 100)
    axes.set_ylabel("group accuracy, %")
    axes.set_title("Held-out combinations", fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    canvas.legend(frameon=False, fontsize=9, ncols=len(shown), loc="outside upper right")
    canvas.savefig(path, dpi=160)


if __name__ == "__main__":
    main()
