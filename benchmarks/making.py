"""Benchmark of making data: proposals per second and core, and the CPU time and memory of every step.

    python benchmarks/making.py FOLDER                          # ten thousand, a hundred thousand and a million captions; takes hours
    python benchmarks/making.py FOLDER --rows 2000 20000        # fewer captions
    python benchmarks/making.py FOLDER --rows 1000000 --steps propose edit

The captions describe a thousand pictures. Each caption has a colour, two nouns and a side ("left") that `flip` exchanges. Each street
occurs in twenty captions, among which `mine` finds pairs. Each step runs in its own process. Times are CPU seconds. Memory is the peak
private memory, without mapped files, which all processes share. The script prints the tables in RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from cfvlm_ds.core.files import remove

SIZES = (10_000, 100_000, 1_000_000)
PICTURES, SIDE = 1000, 64
STEPS = ("propose", "edit", "verify", "select")
COLOURS, NOUNS = ("red", "blue", "green", "white"), ("car", "bus", "bicycle", "truck", "tractor", "bench", "table", "chair", "dog", "cat")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="which steps, in their order (default all)")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.folder
    if arguments.one:
        name, rows = arguments.one
        print(json.dumps(measured(ONE[name], folder, int(rows))))
        return
    folder.mkdir(parents=True, exist_ok=True)
    made = fresh(folder, "rules", min(arguments.rows[0], 10_000))
    print(f"rules, one core: {made['edits'] / made['s']:,.0f} proposals/s, {made['captions'] / made['s']:,.0f} captions/s", flush=True)
    sizes, steps = sorted(arguments.rows), [step for step in STEPS if step in arguments.steps]
    found: dict[str, list[dict[str, float]]] = {step: [] for step in steps}
    for rows in sizes:
        captions(folder, rows)
        if steps[0] == STEPS[0]:
            remove(folder / f"W{rows}")
        for step in steps:
            began = time.perf_counter()
            found[step].append(fresh(folder, step, rows))
            print(f"{rows:,} rows: {step}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    print(f"| captions | {' | '.join(f'{rows:,}' for rows in sizes)} |\n|---|{'---:|' * len(sizes)}")
    for step in steps:
        for what, key in (("s of processor time", "s"), ("peak memory, MB", "mb")):
            print(f"| {step}: {what} | {' | '.join(f'{each[key]:,.1f}' for each in found[step])} |")
    print()


def fresh(folder: Path, name: str, rows: int) -> dict[str, float]:
    """Run a measurement in a new process, and return its result."""
    command = [sys.executable, __file__, str(folder), "--one", name, str(rows)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    return found


def measured(part: Callable[[Path, int], dict[str, float]], folder: Path, rows: int) -> dict[str, float]:
    """Run a measurement, and add its CPU time in seconds and its peak private memory in MB to its result."""
    most, over = [private_mb()], threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            most.append(max(most.pop(), private_mb()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began = time.process_time()
    found = part(folder, rows)
    seconds = time.process_time() - began
    over.set()
    watcher.join()
    return {"s": seconds, "mb": most[0]} | found


def private_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1000
    return 0.0


def caption(k: int) -> str:
    chance = random.Random(k // 20 if k % 20 else k)
    first, second = chance.sample(NOUNS, 2)
    colour = COLOURS[k % len(COLOURS)]
    return f"a {colour} {first} to the left of a {second} in street {k // 20}"


def captions(folder: Path, rows: int) -> Path:
    (folder / "pictures").mkdir(exist_ok=True)
    for k in range(PICTURES):
        if not (file := folder / "pictures" / f"{k}.png").exists():
            Image.effect_noise((SIDE, SIDE), 1 + k % 90).convert("RGB").save(file)
    file = folder / f"{rows}.jsonl"
    if not file.exists():
        with file.open("w", buffering=1 << 20) as handle:
            for k in range(rows):
                handle.write(json.dumps({"id": f"r{k}", "image": f"pictures/{k % PICTURES}.png", "caption": caption(k)}) + "\n")
    return file


def rules(folder: Path, rows: int) -> dict[str, float]:
    from cfvlm_ds.counterfactuals.options import TYPES
    from cfvlm_ds.counterfactuals.propose.balance import drawn, prices_of
    from cfvlm_ds.counterfactuals.propose.base import Rejected
    from cfvlm_ds.counterfactuals.propose.rules import Edit, edits_of

    def every(k: int) -> list[Edit]:
        return [] if isinstance(found := edits_of(caption(k), TYPES), Rejected) else found

    prices = prices_of(map(every, range(rows)), TYPES, 1)
    began, edits = time.process_time(), 0
    for k in range(rows):
        found = every(k)
        for kind in TYPES:
            kept = drawn([each for each in found if each.type == kind], prices, 1, k, kind)
            edits += sum(each.proposal() is not None for each in kept)
    return {"edits": edits, "captions": rows, "s": time.process_time() - began}


def step_of(step: str) -> Callable[[Path, int], dict[str, float]]:
    def run(folder: Path, rows: int) -> dict[str, float]:
        from cfvlm_ds.counterfactuals.edit.step import edit
        from cfvlm_ds.counterfactuals.options import EditOptions, ProposeOptions, SelectOptions, VerifyOptions
        from cfvlm_ds.counterfactuals.propose.step import propose
        from cfvlm_ds.counterfactuals.select import select
        from cfvlm_ds.counterfactuals.verify import verify
        from cfvlm_ds.data import open_groups

        out = folder / f"W{rows}"
        if step == "propose":
            propose(open_groups(folder / f"{rows}.jsonl", None, "captions"), out, ProposeOptions(back_ends="rules,mine"), 0, str)
        elif step == "edit":
            edit(out, EditOptions(), 0, str)
        elif step == "verify":
            verify(out, VerifyOptions(), 0, str, None)
        else:
            select(out, folder / f"{rows}.groups.jsonl", SelectOptions(), str)
        return {}

    return run


ONE: dict[str, Callable[[Path, int], dict[str, float]]] = {"rules": rules} | {step: step_of(step) for step in STEPS}

if __name__ == "__main__":
    main()
