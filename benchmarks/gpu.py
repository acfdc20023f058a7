"""Measurements that need a GPU, in one command: attention kernels, the cost of scoring, a training run with its memory, and two ranks.

    python benchmarks/gpu.py                                       # one GPU of 80 GB, at most 8 minutes; writes runs/gpu.json
    python benchmarks/gpu.py --parts card kernels scoring
    python benchmarks/gpu.py --device cpu --small                  # every part at small sizes, to find bugs without a GPU
    python benchmarks/gpu.py --table runs/gpu.json                 # prints the table of the results in this file

The script needs a clone, torch, transformers with accelerate, and deepspeed, but no launcher, MLflow, network or installation.

    card      the GPU, its measured rates for a large matrix product and for a copy, and the attention back ends that it can run
    kernels   attention alone, forward and backward, with the heads of a 7B model: each back end compared with one causal sequence of the
              same length, and its error against float64 relative to dense attention in the same dtype (below 2 counts as exact)
    scoring   K texts on one image through 8 layers of a 7B model (benchmarks/scoring.py): every back end, one sequence per text, and a
              supervised step on the same tokens take turns
    training  50 steps with 4 layers of this model under ZeRO-3, on one rank with NCCL (gloo on a CPU); memory compared with --train.dry_run
    ranks     a smaller model on two ranks that share the GPU, with gloo, because NCCL allows one rank per GPU; losses compared with
              a run on one rank

Everything is in bfloat16. Times are medians, with synchronisation before and after. Rates are relative to the measured matrix product. A
result is written as soon as its case is finished. A failed case is listed in the table; the other cases still run, in a new process if the
previous one crashed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHARES = {"card": 40, "kernels": 120, "scoring": 150, "training": 110, "ranks": 50}
"""Time limit of each part in seconds. A part can also use the time that earlier parts have left."""

Key = tuple[str, str]
Results = dict[Key, dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes, few repeats")
    parser.add_argument("--parts", nargs="+", choices=list(SHARES), default=list(SHARES))
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit, after which the results so far are kept (default 8)")
    parser.add_argument("--json", type=Path, default=Path("runs/gpu.json"), help="file of all results, written when a case ends")
    parser.add_argument("--table", type=Path, help="only print the table of this file")
    arguments = parser.parse_args()
    if arguments.table:
        written = json.loads(arguments.table.read_text())
        print_table({(each["part"], each["case"]): each["result"] for each in written["results"]})
        return 0
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    results = Parts(arguments).run()
    print_table(results)
    failed = [key for key, result in results.items() if "error" in result]
    failed += [key for key, result in results.items() if any("error" in each for each in result.get("layouts", {}).values())]
    print(f"{len(results)} cases, {len(failed)} with an error; all results are in {arguments.json}")
    return 1 if failed else 0


# --- running the parts ------------------------------------------------------------------------------------------------------------------


class Parts:
    """Runs all cases in a separate process. If this process dies, a new one runs the remaining cases."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.results: Results = {}
        self.left: list[Key] | None = None  # unknown until the first process reports it
        self.without: list[str] = []
        self.begun: Key | None = None
        self.at: str | None = None
        scale = (60 * arguments.minutes - 10) / sum(SHARES[part] for part in arguments.parts)
        end, self.ends = time.monotonic(), {}
        for part in SHARES:
            if part in arguments.parts:
                end += scale * SHARES[part]
                self.ends[part] = end

    def run(self) -> Results:
        with tempfile.TemporaryDirectory() as folder:
            number = 0
            while self.left is None or self.left:
                number += 1
                before = len(self.results), len(self.without)
                self.process(Path(folder) / f"{number}.jsonl")
                if (len(self.results), len(self.without)) == before:  # a new process would not get further
                    break
        return self.results

    def process(self, into: Path) -> None:
        """Run one process until it finishes, crashes or times out."""
        into.touch()
        said = into.with_suffix(".txt")
        with said.open("w") as errors:
            child = subprocess.Popen(
                self.command(into), stdout=errors, stderr=subprocess.STDOUT, env=self.environment(), start_new_session=True
            )
        try:
            late = self.follow(child, into)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # also ends its ranks
            child.wait()
        if late is not None:
            self.out_of_time(late)
        elif child.returncode or self.left or self.left is None:
            self.lost(child.returncode, said.read_text(errors="replace"))

    def command(self, into: Path) -> list[str]:
        command = [sys.executable, str(Path(__file__).with_name("gpu_parts.py")), "--device", self.arguments.device, "--into", str(into)]
        command += ["--parts", *self.arguments.parts, *(["--small"] if self.arguments.small else [])]
        command += ["--without", *self.without] if self.without else []
        return command if self.left is None else [*command, "--cases", json.dumps(self.left)]

    def environment(self) -> dict[str, str]:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        return {**environment, "CUDA_VISIBLE_DEVICES": ""} if self.arguments.device == "cpu" else environment

    def follow(self, child: subprocess.Popen[bytes], into: Path) -> str | None:
        """Read the process's results. Returns the part that timed out, or None when the process has exited."""
        taken = 0
        while True:
            ended = child.poll() is not None  # before the last lines are read, so that none is missed
            whole = into.read_text()[taken:].rpartition("\n")[0]
            for line in whole.splitlines():
                self.take(json.loads(line))
            taken += len(whole) + bool(whole)
            if ended:
                return None
            part = self.begun[0] if self.begun else self.left[0][0] if self.left else self.arguments.parts[0]
            if time.monotonic() > self.ends[part]:
                return part
            time.sleep(0.1)

    def take(self, line: dict[str, Any]) -> None:
        if "cases" in line:
            self.left = [(part, case) for part, case in line["cases"]]
        elif "begun" in line:
            self.begun, self.at = (line["begun"][0], line["begun"][1]), None
        elif "at" in line:
            self.at = line["at"]
        else:
            self.end((line["ended"][0], line["ended"][1]), line["result"])
            self.begun = None

    def end(self, key: Key, result: dict[str, Any]) -> None:
        self.results[key] = result
        if self.left and key in self.left:
            self.left.remove(key)
        said = next((result[name] for name in ("error", "unusable") if name in result), "measured")
        print(f"{key[0]}, {key[1]}: {said}", file=sys.stderr, flush=True)
        rows = [{"part": part, "case": case, "result": result} for (part, case), result in self.results.items()]
        command = " ".join(["benchmarks/gpu.py", *sys.argv[1:]])
        whole = self.arguments.json.with_name(self.arguments.json.name + ".part")
        whole.write_text(json.dumps({"command": command, "results": rows}, indent=1) + "\n")
        whole.replace(self.arguments.json)

    def out_of_time(self, part: str) -> None:
        if self.left is None:
            self.end((part, "start"), {"error": "the process did not start within the part's time"})
            self.left = []
        for key in [key for key in self.left if key[0] == part]:
            self.end(
                key, {"error": "unfinished when the part's time was up" if key == self.begun else "not started: the part's time was up"}
            )
        self.begun = None

    def lost(self, code: int, said: str) -> None:
        """Record the case or layout in which the process crashed, and exclude it from now on."""
        last = [line.strip() for line in said.splitlines() if line.strip()][-1:] or ["no output"]
        reason = f"the process ended with exit code {code}: {last[0][:300]}"
        if self.begun is None:
            self.end((self.arguments.parts[0], "start"), {"error": reason})
            self.left = []
        elif self.at is not None and self.at not in self.without:
            self.without.append(self.at)
        else:
            self.end(self.begun, {"error": reason})
        self.begun = None


# --- the table --------------------------------------------------------------------------------------------------------------------------

HEAD = ("part", "case", "ms", "of matmul", "peak GB", "ratio", "")


def print_table(results: Results) -> None:
    rows = [HEAD, *(row for (part, case), result in results.items() for row in rows_of(part, case, result, results))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD) - 1)]
    print()
    for row in rows:
        cells = [
            f"{cell:<{width}}" if column < 2 else f"{cell:>{width}}" for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        print("  ".join([*cells, row[-1]]).rstrip())
    print()
    for line in answers(results):
        print(line)


def rows_of(part: str, case: str, result: dict[str, Any], results: Results) -> Iterator[tuple[str, ...]]:
    """Yield the table rows of a result: (part, case, ms, share of the matmul rate, peak GB, ratio, remark)."""
    if wrong := unmeasured(result):
        yield part, case, "", "", "", "", wrong
    elif part == "card":
        cans = ", ".join(name for name, can in result["backends"].items() if can == "yes")
        yield (
            part,
            result["device"],
            "",
            "",
            "",
            "",
            f"torch {result['torch']}, transformers {result['transformers']}, {result['commit'][:10]}",
        )
        yield part, "matrix product", "", "", "", "", f"{result['matmul'] / 1e12:.3g} TFLOP/s, bfloat16"
        yield part, "copy", "", "", "", "", f"{result['copy'] / 1e12:.3g} TB/s, read and written"
        yield part, "attention", "", "", "", "", f"can run {cans}; auto selects {result['auto']}"
    elif part == "kernels":
        causal = results.get((part, f"{case.partition(', ')[0]}, causal"), {}).get("time")
        rate = results.get(("card", "this machine"), {}).get("matmul")
        remark = f"forward {1e3 * result['forward']:.3g} ms"
        if "distance" in result:
            remark += f"; {'exact' if result['exact'] else 'NOT EXACT'}, {result['distance']:.2f} x the distance of a dense attention"
        shares = result["flop"] / result["time"] / rate if rate else None
        yield part, case, milliseconds(result), share(shares), gigabytes(result), ratio(result["time"], causal), remark
    elif part == "scoring":
        supervised = result["layouts"].get("supervised", {}).get("time")
        for name, each in result["layouts"].items():
            if wrong := unmeasured(each):
                yield part, f"{case}, {name}", "", "", "", "", wrong
                continue
            remark = f"keeps {each['saved'] / 1e9:.3g} GB" + (f"; loss off by {each['loss_off']:.1e}" if "loss_off" in each else "")
            yield (
                part,
                f"{case}, {name}",
                milliseconds(each),
                share(each["of_matmul"]),
                gigabytes(each),
                ratio(each["time"], supervised),
                remark,
            )
    else:
        plan = result["plan"]["states"] + result["plan"]["working"]
        remark = f"planned {plan / 1e9:.3g} GB ({result['plan']['states'] / 1e9:.3g} states); {result['backend']}; "
        remark += f"losses {result['losses'][0]:.3f} to {result['losses'][-1]:.3f}" + ("" if result["finite"] else ", NOT FINITE")
        remark += f"; differ from those of one rank by {result['loss_off']:.1e}" if "loss_off" in result else ""
        yield part, case, milliseconds(result), share(result.get("of_matmul")), gigabytes(result), ratio(result["peak"], plan), remark


def unmeasured(result: dict[str, Any]) -> str:
    return f"ERROR {result['error']}" if "error" in result else f"not available: {result['unusable']}" if "unusable" in result else ""


def milliseconds(result: dict[str, Any]) -> str:
    return f"{1e3 * result['time']:.3g}"


def gigabytes(result: dict[str, Any]) -> str:
    return f"{result['peak'] / 1e9:.3g}" if "peak" in result else ""


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def ratio(value: float, beside: float | None) -> str:
    return "" if beside is None else f"{value / beside:.2f} x"


def answers(results: Results) -> Iterator[str]:
    """Yield the conclusions: the fastest exact back end for the largest number of texts, compared with the other layouts."""
    yield "ratio: to the causal sequence (kernels), the supervised step (scoring), the planned memory (training, ranks)"
    cases = {case: result["layouts"] for (part, case), result in results.items() if part == "scoring" and "layouts" in result}
    if not cases:
        return
    most = max(cases, key=lambda case: int(case.split()[0]))
    exact: dict[str, bool] = {}
    for (part, case), result in results.items():
        if part == "kernels" and "exact" in result:
            backend = case.rpartition(", ")[2]
            exact[backend] = exact.get(backend, True) and result["exact"]
    timed = {name: each for name, each in cases[most].items() if "time" in each}
    ours = {backend: timed[f"shared prefix, {backend}"] for backend in exact if exact[backend] and f"shared prefix, {backend}" in timed}
    if not ours:
        yield f"{most}: no back end is both exact and timed"
        return
    best = min(ours, key=lambda backend: ours[backend]["time"])
    said = f"{most}: the fastest exact back end is {best}"
    for name, what in (("supervised", "a supervised step"), ("sparse", "one sequence per text")):
        if name in timed:
            quick = ours[best]["time"] / timed[name]["time"]
            said += f", {quick:.2f} x {what}" if quick > 0.5 else f", {1 / quick:.1f} x faster than {what}"
    if "supervised" in timed:
        points = 100 * (timed["supervised"]["of_matmul"] - ours[best]["of_matmul"])
        said += f"; {points:.1f} points of the matmul rate below the supervised step"
    yield said


if __name__ == "__main__":
    sys.exit(main())
