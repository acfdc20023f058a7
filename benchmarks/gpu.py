"""Measurements that need a GPU, in one command: attention kernels, the cost of scoring, the time and memory of a training run, and a
run on two ranks.

    python benchmarks/gpu.py                                       # one GPU of 80 GB, at most 8 minutes; writes runs/gpu.json
    python benchmarks/gpu.py --parts card kernels scoring
    python benchmarks/gpu.py --device cpu --small                  # every part at small sizes, to find bugs without a GPU

The script needs a clone, torch, transformers with accelerate, and deepspeed, but no launcher, MLflow, network or installation.

    card      the GPU, its measured rates for a large matrix product and for a copy, and the attention back ends that it can run
    kernels   attention alone, forward and backward, with the heads of a 7B model: the time of each back end relative to one causal
              sequence of the same length, and its error against float64 relative to that of dense attention in the same dtype (below 2
              counts as exact)
    scoring   K texts on one image through 8 layers of a 7B model (benchmarks/scoring.py), measured in turn: a shared prefix with each
              back end, one sequence per text, and a supervised step on the same tokens
    training  50 steps with 4 layers of this model under ZeRO-3, on one rank with NCCL (gloo on a CPU); memory compared with --train.dry_run
    ranks     a smaller model on two ranks that share the GPU, with gloo, because NCCL allows one rank per GPU; losses compared with
              a run on one rank

Models and attention inputs are in bfloat16, except that `scoring` uses float32 on a CPU. Times are medians, with synchronisation before and
after. Rates are relative to the measured matrix product. Each part runs in its own process with a time limit. The table lists a failed case
with its error. If a process crashes or exceeds its limit, the table lists the part's remaining cases with the reason.
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
"""Time limit of each part in seconds. Time that a part does not use is added to later limits."""

Key = tuple[str, str]
Results = dict[Key, dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes, few repeats")
    parser.add_argument("--parts", nargs="+", choices=list(SHARES), default=list(SHARES))
    parser.add_argument("--json", type=Path, default=Path("runs/gpu.json"), help="file of all results, written when a part ends")
    arguments = parser.parse_args()
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    results, end = Results(), time.monotonic()
    for part in arguments.parts:
        end += SHARES[part]
        results |= run_part(part, end - time.monotonic(), arguments)
        rows = [{"part": part, "case": case, "result": result} for (part, case), result in results.items()]
        arguments.json.write_text(json.dumps({"command": " ".join(sys.argv), "results": rows}, indent=1) + "\n")
    print_table(results)
    failed = [key for key, result in results.items() if "error" in result]
    failed += [key for key, result in results.items() if any("error" in each for each in result.get("layouts", {}).values())]
    print(f"{len(results)} cases, {len(failed)} with an error; all results are in {arguments.json}")
    return 1 if failed else 0


def run_part(part: str, limit: float, arguments: argparse.Namespace) -> Results:
    """Run a part in a new process for at most ``limit`` seconds. A case without a result gets the reason for this as its error."""
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if arguments.device == "cpu" else {})}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    print(f"{part}: at most {limit:.0f} s", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        into, said = Path(folder) / "results.jsonl", Path(folder) / "said.txt"
        command = [sys.executable, Path(__file__).with_name("gpu_parts.py"), "--device", arguments.device, "--part", part, "--into", into]
        with said.open("w") as output:
            child = subprocess.Popen(
                [*command, *(["--small"] if arguments.small else [])],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        try:
            code = child.wait(limit)
            last = [line.strip() for line in said.read_text(errors="replace").splitlines() if line.strip()][-1:] or ["no output"]
            reason = f"the process ended with exit code {code}: {last[0][:300]}"
        except subprocess.TimeoutExpired:
            reason = "no result when the part's time was up"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # also ends its ranks
            child.wait()
        lines = [json.loads(line) for line in into.read_text().splitlines(keepends=True) if line.endswith("\n")] if into.exists() else []
    cases = lines.pop(0)["cases"] if lines else ["start"]
    return {(part, case): {"error": reason} for case in cases} | {(part, line["case"]): line["result"] for line in lines}


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
    print("\nratio: to the causal sequence (kernels), the supervised step (scoring), the planned memory (training, ranks)")


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


if __name__ == "__main__":
    sys.exit(main())
