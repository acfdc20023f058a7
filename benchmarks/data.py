"""Benchmark of large data sets: preparing, opening, starting, reading and resuming, each in its own process and compared with a target.

    python benchmarks/data.py FOLDER                            # ten thousand and a million rows: 2 GB in FOLDER, four minutes
    python benchmarks/data.py FOLDER --rows 10000 10000000      # ten million: 12 GB, half an hour

Each row has two texts and two of a thousand pictures. Times are wall-clock seconds. Memory is the largest resident size of any process
during preparation. "Start" covers everything from a store to a run's first micro-batch: opening the store, mapping token counts,
building the packed sampler, counting its steps, and getting a batch of groups from a data worker. The script prints the table in
RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from cfvlm_ds.core.distributed import isolated_rng
from cfvlm_ds.core.files import remove
from cfvlm_ds.data import GroupSampler, PackedSampler, open_groups
from cfvlm_ds.data.prepare import PrepareOptions, prepare
from cfvlm_ds.data.store import Unraised

SIZES = (10_000, 1_000_000)
PICTURES, READ = 1000, 50_000
STEP = 64  # groups per step, over all ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, *rest = arguments.one
        print(json.dumps(PARTS[name](arguments.folder, *rest)))
        return
    folder, sizes = arguments.folder, sorted(arguments.rows)
    for number in sizes:
        said(f"{number:,} rows: writing", make, folder, number)
        remove(folder / f"{number}.store")
    prepared = [said(f"{number:,} rows: prepare", fresh, folder, "preparing", number) for number in sizes]
    opened = [said(f"{number:,} rows: opening", fresh, folder, "opening", number) for number in sizes]
    started = [said(f"{number:,} rows: start", fresh, folder, "starting", number) for number in sizes]
    read = said(f"{sizes[-1]:,} rows: reading", fresh, folder, "reading", sizes[-1])
    went_on = said(f"{sizes[-1]:,} rows: killed and resumed", resumed, folder, sizes[-1])
    table(sizes, [
        ("prepare, once: s", [each["s"] for each in prepared], "360 for 1 M"),
        ("prepare: s of all processes on a core", [each["processor_s"] for each in prepared], ""),
        ("prepare: MB of memory", [each["mb"] for each in prepared], "1,000"),
        ("opening the store: s", [each["s"] for each in opened], "1 for 1 M, 2 for 10 M"),
        ("reading a random row: us", [each["row_us"] for each in opened], ""),
        ("start: s", [each["s"] for each in started], ""),
    ])  # fmt: skip
    table(sizes[-1:], [("shuffled rows of the store, one worker: per s", [read["rows"]], "at least 5,000")])
    print(f"2 ranks with {sizes[-1]:,} rows, killed and resumed on 1 and on 4: same groups in the same order as without a kill: {went_on}")


def said(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a measurement, print its name and duration in seconds to stderr, and return its result."""
    began = time.perf_counter()
    found = function(*arguments)
    print(f"{what}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    return found


def table(sizes: list[int], rows: list[tuple[str, list[float], str]]) -> None:
    """Print a Markdown table with a column for each number of rows."""
    print(f"| rows | {' | '.join(f'{number:,}' for number in sizes)} | target |")
    print(f"|---|{'---:|' * len(sizes)}---:|")
    for what, values, target in rows:
        shown = (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" for value in values)
        print(f"| {what} | {' | '.join(shown)} | {target} |")
    print()


def fresh(folder: Path, name: str, *arguments: object) -> dict[str, float]:
    """Run a measurement in a new process, and return its result."""
    command = [sys.executable, __file__, str(folder), "--one", name, *map(str, arguments)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    return found


def make(folder: Path, rows: int) -> None:
    """Write a manifest with ``rows`` rows, and a file of random token counts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pictures").mkdir(exist_ok=True)
    chance = random.Random(0)
    for k in range(PICTURES):
        if not (file := folder / "pictures" / f"{k}.png").exists():
            Image.effect_noise((64, 64), 1 + k).convert("RGB").save(file)
    file = folder / f"{rows}.jsonl"
    if file.exists():
        return
    begun = file.with_suffix(".begun")
    with begun.open("w", buffering=1 << 20) as handle:
        for k in range(rows):
            a = int(chance.random() * PICTURES)
            b = (a + 1 + int(chance.random() * (PICTURES - 1))) % PICTURES
            handle.write(
                f'{{"id": "g{k}", "prompt": "Describe the image.", "images": [{{"id": "i0", "path": "pictures/{a}.png"}}, '
                f'{{"id": "i1", "path": "pictures/{b}.png"}}], "texts": [{{"id": "t0", "text": "two dogs run over a lawn in front of house '
                f'{k}"}}, {{"id": "t1", "text": "three dogs run over a lawn in front of house {k}"}}], "match": [["i0", "t0", 1], '
                '["i0", "t1", 0], ["i1", "t0", 0], ["i1", "t1", 1]], "edits": [{"type": "count", "image": "i1", "text": "t1", '
                '"from": "two", "to": "three"}]}\n'
            )
    begun.rename(file)
    np.save(folder / f"{rows}.npy", np.random.default_rng(0).integers(600, 800, rows, np.int32))


def preparing(folder: Path, rows: str) -> dict[str, float]:
    """Measure the time and memory needed to check the data and write a store, on all cores."""
    began = time.perf_counter()
    groups = open_groups(folder / f"{rows}.jsonl")
    report, whole = prepare(groups, folder / f"{rows}.store", rows, PrepareOptions(), str)
    assert whole, report
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "s": time.perf_counter() - began,
        "processor_s": sum(each.ru_utime + each.ru_stime for each in used),
        "mb": max(each.ru_maxrss for each in used) / 1000,
    }


def opening(folder: Path, rows: str) -> dict[str, float]:
    """Measure the time to open a store and the time to read a random row."""
    began = time.perf_counter()
    groups = open_groups(folder / f"{rows}.store")
    seconds = time.perf_counter() - began
    chance, began = random.Random(0), time.perf_counter()
    for _ in range(2000):
        groups[chance.randrange(len(groups))]
    return {"s": seconds, "row_us": (time.perf_counter() - began) / 2000 * 1e6}


def starting(folder: Path, rows: str) -> dict[str, float]:
    """Measure the time from opening a store to the first micro-batch of groups."""
    began = time.perf_counter()
    groups, tokens = open_groups(folder / f"{rows}.store"), np.load(folder / f"{rows}.npy", mmap_mode="r")
    sampler = PackedSampler(tokens=tokens, max_tokens=8192, gradient_accumulation_steps=2, rank=0, world_size=4, seed=0)
    sampler.num_steps(1.0)
    loader: Any = DataLoader(groups, batch_sampler=sampler, collate_fn=list, num_workers=1, generator=isolated_rng())  # type: ignore[arg-type]
    next(iter(loader))
    return {"s": time.perf_counter() - began}


def reading(folder: Path, rows: str) -> dict[str, float]:
    """Measure how many rows per second one data worker reads in a shuffled epoch."""
    groups = open_groups(folder / f"{rows}.store")
    sampler = GroupSampler(num_groups=len(groups), groups_per_micro_batch=8, gradient_accumulation_steps=1, rank=0, world_size=1, seed=0)
    loader: Any = DataLoader(
        Unraised(groups),  # type: ignore[arg-type]  # as in training
        batch_sampler=sampler,
        collate_fn=len,
        num_workers=1,
        prefetch_factor=4,
        generator=isolated_rng(),
    )
    batches = iter(loader)
    next(batches)
    began = time.perf_counter()
    count = sum(islice(batches, READ // 8))
    return {"rows": count / (time.perf_counter() - began)}


# Resuming ----------------------------------------------------------------------------------------------------------------------------


def resumed(folder: Path, rows: int) -> str:
    """Kill a two-rank run, and resume it once on one rank and once on four. Returns "yes" if both resumed runs consume the same groups as
    an uninterrupted run, otherwise "NO".
    """
    whole = consumed(folder, rows, 1, 0, 40)
    out, seen = folder / "ranks", list[list[str]]()
    out.mkdir(exist_ok=True)
    ranks = [start(folder, rows, 2, rank, 0, 10**9, out / f"2-{rank}") for rank in range(2)]
    while min(lines_of(out / f"2-{rank}") for rank in range(2)) < 10:
        assert all(process.poll() is None for process in ranks), "a rank has ended by itself"
        time.sleep(0.05)
    for process in ranks:
        process.send_signal(signal.SIGKILL)
        process.wait()
    for world, first in ((2, 0), (1, 10), (4, 10)):
        if world != 2:
            waiting = [start(folder, rows, world, rank, first, 40, out / f"{world}-{rank}") for rank in range(world)]
            assert not any(process.wait() for process in waiting)
        steps = 10 if world == 2 else 30
        of_ranks = [(out / f"{world}-{rank}").read_text().splitlines()[:steps] for rank in range(world)]
        seen.append([",".join(step) for step in zip(*of_ranks, strict=True)])
    same = seen[0] + seen[1] == whole == seen[0] + seen[2]
    return "yes" if same else "NO"


def start(folder: Path, rows: int, world: int, rank: int, first: int, last: int, out: Path) -> subprocess.Popen[bytes]:
    out.unlink(missing_ok=True)
    command = [sys.executable, __file__, str(folder), "--one", "consuming", rows, world, rank, first, last, out]
    return subprocess.Popen([str(each) for each in command], stdout=subprocess.DEVNULL)


def lines_of(file: Path) -> int:
    return file.read_text().count("\n") if file.exists() else 0


def consumed(folder: Path, rows: int, world: int, first: int, last: int) -> list[str]:
    """Return the groups in each step of an uninterrupted run, in order."""
    start(folder, rows, world, 0, first, last, out := folder / "undisturbed").wait()
    return out.read_text().splitlines()


def consuming(folder: Path, *given: str) -> dict[str, float]:
    """Start from a given step as one rank of a run, and write the groups that this rank consumes in each step."""
    rows, world, rank, first, last = map(int, given[:5])
    groups = open_groups(folder / f"{rows}.store")
    sampler = GroupSampler(
        num_groups=len(groups),
        groups_per_micro_batch=STEP // world,
        gradient_accumulation_steps=1,
        rank=rank,
        world_size=world,
        seed=0,
    )
    sampler.load_state_dict({**sampler.state_dict(), "samples_seen": first * STEP})
    loader: Any = DataLoader(groups, batch_sampler=sampler, collate_fn=list, num_workers=1, generator=isolated_rng())  # type: ignore[arg-type]
    with Path(given[5]).open("w", buffering=1) as out:
        for batch in islice(loader, last - first):
            out.write(",".join(group.id for group in batch) + "\n")
    return {}


PARTS: dict[str, Callable[..., dict[str, float]]] = {part.__name__: part for part in (preparing, opening, starting, reading, consuming)}

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
