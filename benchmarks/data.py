"""Data of any size: indexing, opening, starting, reading and resuming, each in processes of its own, beside the targets that they have.

    python benchmarks/data.py FOLDER                       # 100,000 rows
    python benchmarks/data.py FOLDER --rows 10000000       # ten million: 5 GB in FOLDER, some minutes

Rows have two pictures out of a thousand and two texts. Seconds are of the clock, memory is what a process has of its own beyond imports.
"Start" is what stands between a checked data set and its first micro-batch: opening, the map of token counts, the packed sampler with its
number of steps, and a batch of groups from a data worker. The check before a first run is measured on some rows, and said for each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
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

from cfvlm_ds.core.distributed import apart
from cfvlm_ds.data import GroupSampler, PackedSampler, check_rows, open_groups
from cfvlm_ds.data.identity import shared_identity
from cfvlm_ds.data.lines import index_files
from cfvlm_ds.data.passes import Share

PICTURES, CHECKED, READ = 1000, 100_000, 20_000
STEP = 64  # groups of all ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, *rest = arguments.one
        print(json.dumps(PARTS[name](arguments.folder, *rest)))
        return
    folder, rows = arguments.folder, arguments.rows
    few = min(10_000, rows)
    for number in {few, min(CHECKED, rows), rows}:
        make(folder, number)
    for file in index_files(folder / f"{rows}.jsonl"):
        file.unlink(missing_ok=True)
    indexed = fresh(folder, "opening", rows)
    opened = fresh(folder, "opening", rows)
    small, large = (fresh(folder, "starting", number) for number in (few, rows))
    checked = fresh(folder, "checking", min(CHECKED, rows))
    packed = fresh(folder, "packing", few)
    read = fresh(folder, "reading")
    say(f"index of {rows:,} rows, s", indexed["s"], "< 60 for 10 M")
    say("opening with an index, s", opened["s"], "< 2")
    say("its memory, MB", opened["mb"], "< 500")
    say("a random row, us", opened["row_us"], "")
    say(f"start with {few:,} rows, s", small["s"], "")
    say(f"start with {rows:,} rows, s", large["s"], f"within 10 % of a first step's time, {large['s'] - small['s']:+.2f} s here")
    say(f"memory, MB more than with {few:,}", large["mb"] - small["mb"], "< 20")
    say("rows looked at, s per million", checked["rows"], "")
    say("identity, s per million", checked["identity"], "")
    say(f"packing {few:,} rows, s", packed["s"], "")
    say("shuffled rows/s of a worker", read["rows"], ">= 5,000 from a packed store")
    say("killed on 2, resumed on 1 and 4", resumed(folder, rows), "the same groups in the same order")


def say(what: str, value: float | str, target: str) -> None:
    shown = value if isinstance(value, str) else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    print(f"{what:<36} {shown:>12}   {target}", flush=True)


def fresh(folder: Path, name: str, *arguments: object) -> dict[str, float]:
    """A measurement in a process of its own."""
    command = [sys.executable, __file__, str(folder), "--one", name, *map(str, arguments)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    return found


def make(folder: Path, rows: int) -> None:
    """A manifest of so many rows, and the map of their token counts."""
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
    with begun.open("w") as handle:
        for k in range(rows):
            a, b = chance.sample(range(PICTURES), 2)
            handle.write(
                f'{{"id": "g{k}", "prompt": "Describe the image.", "images": [{{"id": "i0", "path": "pictures/{a}.png"}}, '
                f'{{"id": "i1", "path": "pictures/{b}.png"}}], "texts": [{{"id": "t0", "text": "two dogs run over a lawn in front of house '
                f'{k}"}}, {{"id": "t1", "text": "three dogs run over a lawn in front of house {k}"}}], "match": [["i0", "t0", 1], '
                '["i0", "t1", 0], ["i1", "t0", 0], ["i1", "t1", 1]], "edits": [{"type": "count", "image": "i1", "text": "t1", '
                '"from": "two", "to": "three"}]}\n'
            )
    begun.rename(file)
    np.save(folder / f"{rows}.npy", np.random.default_rng(0).integers(600, 800, rows, np.int32))


def private_mb() -> float:
    """What this process has for itself; what it maps and shares is not counted."""
    found = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in found if line.startswith("Private_")) / 1000


def opening(folder: Path, rows: str) -> dict[str, float]:
    """Open, which indexes what has no index; and rows at random."""
    before, began = private_mb(), time.perf_counter()
    groups = open_groups(folder / f"{rows}.jsonl")
    seconds = time.perf_counter() - began
    memory = private_mb() - before
    chance, began = random.Random(0), time.perf_counter()
    for _ in range(2000):
        groups[chance.randrange(len(groups))]
    return {"s": seconds, "mb": memory, "row_us": (time.perf_counter() - began) / 2000 * 1e6}


def starting(folder: Path, rows: str) -> dict[str, float]:
    """From a checked data set to the first micro-batch of groups."""
    before, began = private_mb(), time.perf_counter()
    groups, tokens = open_groups(folder / f"{rows}.jsonl"), np.load(folder / f"{rows}.npy", mmap_mode="r")
    sampler = PackedSampler(tokens=tokens, max_tokens=8192, gradient_accumulation_steps=2, rank=0, world_size=4, seed=0)
    sampler.num_steps(1.0)
    loader: Any = DataLoader(groups, batch_sampler=sampler, collate_fn=list, num_workers=1, generator=apart())  # type: ignore[arg-type]
    next(iter(loader))
    return {"s": time.perf_counter() - began, "mb": private_mb() - before}


def checking(folder: Path, rows: str) -> dict[str, float]:
    """What a first start does with every row, on all cores, in seconds per million; pictures and texts are beside."""
    groups, found = open_groups(folder / f"{rows}.jsonl"), {}
    works: dict[str, Callable[[], object]] = {
        "rows": lambda: check_rows(groups, progress=str),
        "identity": lambda: shared_identity(groups, None, Share()),
    }
    for name, work in works.items():
        began = time.perf_counter()
        work()
        found[name] = (time.perf_counter() - began) / len(groups) * 1e6
    return found


def packing(folder: Path, rows: str) -> dict[str, float]:
    """Pack some rows."""
    from cfvlm_ds.core.files import remove
    from cfvlm_ds.data.pack import pack

    remove(folder / "store")
    began = time.perf_counter()
    pack(open_groups(folder / f"{rows}.jsonl"), folder / "store", str, max_pixels=10**6)
    return {"s": time.perf_counter() - began}


def reading(folder: Path) -> dict[str, float]:
    """Rows of a shuffled epoch of the packed store that one data worker gives."""
    groups = open_groups(folder / "store")
    sampler = GroupSampler(num_groups=len(groups), groups_per_micro_batch=8, gradient_accumulation_steps=1, rank=0, world_size=1, seed=0)
    loader: Any = DataLoader(
        groups,  # type: ignore[arg-type]
        batch_sampler=sampler,
        collate_fn=len,
        num_workers=1,
        prefetch_factor=4,
        generator=apart(),
    )
    batches = iter(loader)
    next(batches)
    began = time.perf_counter()
    count = sum(islice(batches, READ // 8))
    return {"rows": count / (time.perf_counter() - began)}


# Resuming ----------------------------------------------------------------------------------------------------------------------------


def resumed(folder: Path, rows: int) -> str:
    """Two ranks are killed; what they had consumed, and then what one rank and what four ranks consume, against an undisturbed run."""
    whole = consumed(folder, rows, 1, 0, 40)
    out, seen = folder / "ranks", list[list[str]]()
    out.mkdir(exist_ok=True)
    ranks = [start(folder, rows, 2, rank, 0, 10**9, out / f"2-{rank}") for rank in range(2)]
    while min(lines_of(out / f"2-{rank}") for rank in range(2)) < 10:
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
    """The groups of each step, in order."""
    start(folder, rows, world, 0, first, last, out := folder / "undisturbed").wait()
    return out.read_text().splitlines()


def consuming(folder: Path, *given: str) -> dict[str, float]:
    """A rank: it starts at a step as if a checkpoint had said so, and writes the groups of each step that it has consumed."""
    rows, world, rank, first, last = map(int, given[:5])
    groups = open_groups(folder / f"{rows}.jsonl")
    sampler = GroupSampler(
        num_groups=len(groups),
        groups_per_micro_batch=STEP // world,
        gradient_accumulation_steps=1,
        rank=rank,
        world_size=world,
        seed=0,
    )
    sampler.load_state_dict({**sampler.state_dict(), "samples_seen": first * STEP})
    loader: Any = DataLoader(groups, batch_sampler=sampler, collate_fn=list, num_workers=1, generator=apart())  # type: ignore[arg-type]
    with Path(given[5]).open("w", buffering=1) as out:
        for batch in islice(loader, last - first):
            out.write(",".join(group.id for group in batch) + "\n")
    return {}


PARTS: dict[str, Callable[..., dict[str, float]]] = {
    part.__name__: part for part in (opening, starting, checking, packing, reading, consuming)
}

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
