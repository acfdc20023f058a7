"""Data of any size: indexing, opening, starting, reading and resuming, each in processes of its own, beside the targets that they have.

    python benchmarks/data.py FOLDER                       # ten thousand, a million and ten million rows: 6 GB in FOLDER, about ten minutes
    python benchmarks/data.py FOLDER --rows 10000 100000   # less of it

Rows have two pictures out of a thousand and two texts. Seconds are of the clock, memory is what a process has for itself: pages of
mapped files, which all processes of a machine share, are not counted. "Start" is what stands between a checked data set and its first
micro-batch: opening, the map of token counts, the packed sampler with its number of steps, and a batch of groups from a data worker. What a
first start does with every row (check, identity), packing and reading are measured on a hundred thousand rows. Prints the table of
RESULTS.md.
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
from cfvlm_ds.core.files import remove
from cfvlm_ds.data import GroupSampler, PackedSampler, check_rows, open_groups
from cfvlm_ds.data.identity import store_identity
from cfvlm_ds.data.lines import index_files
from cfvlm_ds.data.pack import pack
from cfvlm_ds.data.passes import Scan
from cfvlm_ds.data.store import Unraised

SIZES = (10_000, 1_000_000, 10_000_000)
PICTURES, LOOKED_AT, READ = 1000, 100_000, 50_000
STEP = 64  # groups of all ranks


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
    some = min(LOOKED_AT, sizes[-1])
    for number in sorted({some, *sizes}):
        said(f"{number:,} rows are written", make, folder, number)
    for number in sizes:
        for file in index_files(folder / f"{number}.jsonl"):
            file.unlink(missing_ok=True)
    indexed = [said(f"{number:,} rows: index", fresh, folder, "opening", number) for number in sizes]
    opened = [said(f"{number:,} rows: opening", fresh, folder, "opening", number) for number in sizes]
    started = [said(f"{number:,} rows: start", fresh, folder, "starting", number) for number in sizes]
    looked = said(f"{some:,} rows: check", fresh, folder, "checking", some)
    packed = said(f"{some:,} rows: packing", fresh, folder, "packing", some)
    read = said(f"{some:,} rows: reading", fresh, folder, "reading")
    went_on = said(f"{sizes[-1]:,} rows: killed and resumed", resumed, folder, sizes[-1])
    table(sizes, [
        ("index, made once: s", [each["s"] for each in indexed], "60 for 10 M"),
        ("opening with it: s", [each["s"] for each in opened], "2"),
        ("memory of it: MB", [each["mb"] for each in opened], "500"),
        ("a row at random: us", [each["row_us"] for each in opened], ""),
        ("start: s", [each["s"] for each in started], ""),
        ("start, more than with the fewest rows: s", [each["s"] - started[0]["s"] for each in started], "10 % of a first step"),
        ("memory, more than with the fewest rows: MB", [each["mb"] - started[0]["mb"] for each in started], "20"),
    ])  # fmt: skip
    table([some], [
        ("rows looked at: s per million", [looked["rows"]], ""),
        ("identity: s per million", [looked["identity"]], ""),
        ("packing: s per million", [packed["s"]], ""),
        ("shuffled rows of the packed store, one worker: per s", [read["rows"]], "at least 5,000"),
    ])  # fmt: skip
    print(f"2 ranks of {sizes[-1]:,} rows killed, resumed on 1 and on 4: the same groups in the same order as undisturbed: {went_on}")


def said(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a measurement, whose name and seconds are told meanwhile."""
    began = time.perf_counter()
    found = function(*arguments)
    print(f"{what}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    return found


def table(sizes: list[int], rows: list[tuple[str, list[float], str]]) -> None:
    """In Markdown, a column for each size."""
    print(f"| rows | {' | '.join(f'{number:,}' for number in sizes)} | target |")
    print(f"|---|{'---:|' * len(sizes)}---:|")
    for what, values, target in rows:
        shown = (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" for value in values)
        print(f"| {what} | {' | '.join(shown)} | {target} |")
    print()


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


def private_mb() -> float:
    """What this process has for itself; pages of files that it maps are everybody's."""
    found = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in found if line.startswith("Anonymous")) / 1000


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
        "identity": lambda: store_identity(groups, None, Scan()),
    }
    for name, work in works.items():
        began = time.perf_counter()
        work()
        found[name] = (time.perf_counter() - began) / len(groups) * 1e6
    return found


def packing(folder: Path, rows: str) -> dict[str, float]:
    """Pack some rows, in seconds per million: their thousand pictures take none of it."""
    remove(folder / "store")
    began = time.perf_counter()
    pack(groups := open_groups(folder / f"{rows}.jsonl"), folder / "store", str, max_pixels=10**6)
    return {"s": (time.perf_counter() - began) / len(groups) * 1e6}


def reading(folder: Path) -> dict[str, float]:
    """Rows of a shuffled epoch of the packed store that one data worker gives."""
    groups = open_groups(folder / "store")
    sampler = GroupSampler(num_groups=len(groups), groups_per_micro_batch=8, gradient_accumulation_steps=1, rank=0, world_size=1, seed=0)
    loader: Any = DataLoader(
        Unraised(groups),  # type: ignore[arg-type]  # as a training has them
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
