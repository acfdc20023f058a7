"""How far a work folder is: shards by step, what they hold, and which are missing or damaged, as sbatch takes them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from cfvlm_ds.core.text import one_line
from cfvlm_ds.counterfactuals.select import ranges
from cfvlm_ds.counterfactuals.work_folder import STEPS, WorkFolder

_MOST = 12
_CHARS = 100


class Status(NamedTuple):
    """A report, and the shards of which something is damaged."""

    text: str
    damaged: list[int]


def status(out: Path, check: bool = False) -> Status:
    """How far it is; with ``check`` also whether what is there is what was written."""
    work = WorkFolder.open(out)
    source = work.about["source"]
    lines = [f"{out}: {one_line(source['path'], 300)} ({one_line(str(source.get('groups')), 20)} rows), {work.shards} shards", ""]
    unfinished: set[int] = set()
    for step in STEPS:
        missing = work.missing(step)
        unfinished |= set(missing)
        counts: Counter[str] = Counter()
        records = 0
        for shard in range(work.shards):
            if (done := work.done(step, shard)) is not None:
                counts.update(done["counts"])
                records += done["records"]
        through = work.shards - len(missing)
        lines.append(f"{step}: {through} of {work.shards} shards, {records} records")
        shown = counts.most_common(_MOST)
        lines += [f"    {one_line(name, _CHARS)}: {count}" for name, count in shown]
        lines += [f"    and {len(counts) - _MOST} more kinds"] * (len(counts) > _MOST)
        if missing and through:
            lines.append(f"    missing: --array={ranges(missing)}")
    lines += ["", "all shards are through" if not unfinished else f"missing: --array={ranges(sorted(unfinished))}"]
    damaged = _checked(work, lines) if check else []
    return Status("\n".join(lines), damaged)


def _checked(work: WorkFolder, lines: list[str]) -> list[int]:
    """Add what was checked and what is damaged to the lines; the shards that are."""
    damaged: dict[int, str] = {}
    for shard in range(work.shards):
        if wrong := next((f"{wrong}; {work.again(step, shard)}" for step in STEPS if (wrong := work.damage(step, shard))), ""):
            damaged[shard] = wrong
    lines.append("checked: journals by their sha256, tars by their length; not checked: pictures, which verify compares with their sha256")
    lines += [f"damaged: {wrong}" for wrong in list(damaged.values())[:_MOST]]
    lines += [f"and {len(damaged) - _MOST} more shards"] * (len(damaged) > _MOST)
    lines.append(f"damaged: --array={ranges(sorted(damaged))}" if damaged else "nothing is damaged")
    return sorted(damaged)
