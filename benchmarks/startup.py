"""Start-up times of commands that users wait for: wall-clock seconds, and CPU seconds of all processes.

    python benchmarks/startup.py [--runs 3]

The model is the demo's, and the data are 1,000 groups of its world. Each number is the median of several runs. The first run fills caches
and is not counted.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cfvlm_ds.core.config import HabitsConfig
from cfvlm_ds.demo.base import write_base
from cfvlm_ds.demo.habits import build_habits

REPO = Path(__file__).resolve().parent.parent


def measured(command: list[str], first: str = "") -> tuple[float, float, float]:
    """Run a command. Returns the wall-clock seconds until its first line that matches ``first`` (0 if none does), the wall-clock seconds
    until its end, and its CPU seconds.
    """
    before, started, seen = os.times(), time.monotonic(), 0.0
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        lines = []
        for line in process.stdout or ():
            lines.append(line)
            if first and not seen and re.search(first, line):
                seen = time.monotonic() - started
    if process.returncode:
        sys.exit("".join(lines[-30:]))
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return seen, time.monotonic() - started, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each command (default: 3)")
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        world = build_habits(HabitsConfig(str(folder / "world"), num_train=1000, num_test=20), progress=lambda line: None)
        common = ["--model.name_or_path", str(write_base(folder / "base")), "--data.train", str(world / "train.jsonl")]
        run = [*common, "--train.output_dir", str(folder / "run"), "--train.max_steps", "1", "--train.eval_on_start", "false"]
        run += ["--train.resume", "restart", "--tracking.enabled", "false"]
        commands = {
            "cfvlm-ds --help": (["cfvlm-ds", "--help"], ""),
            "cfvlm-ds data check, 1,000 rows": (["cfvlm-ds", "data", "check", str(world / "train.jsonl")], ""),
            "dry run": (["cfvlm-ds", "train", *common, "--train.dry_run", "true"], ""),
            "deepspeed train.py": (["deepspeed", "--num_gpus", "1", "train.py", "--deepspeed", "ds_configs/z3.json", *run], r"step 1/1 "),
        }
        print("| command | first step, s | end, s | processor, s |\n|---|---:|---:|---:|")
        for name, (command, first) in commands.items():
            results = []
            for _ in range(runs + 1):
                shutil.rmtree(folder / "run", ignore_errors=True)
                results.append(measured(command, first))
            step, end, used = (statistics.median(column) for column in zip(*results[1:], strict=True))
            print(f"| {name} | {f'{step:.1f}' if first else ''} | {end:.1f} | {used:.1f} |", flush=True)


if __name__ == "__main__":
    main()
