"""How far a work folder is: shards by step, what they hold, and which are missing or damaged, as sbatch takes them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.reading import MIB
from cfvlm_ds.core.text import one_line
from cfvlm_ds.counterfactuals.edit.step import pictures_end
from cfvlm_ds.counterfactuals.select import ranges
from cfvlm_ds.counterfactuals.work_folder import STEPS, WorkFolder

_MOST = 12
_CHARS = 100


class Status(NamedTuple):
    """A report, whether every shard is through every step, and the shards of which something is damaged."""

    text: str
    through: bool
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
        stopped = records = 0
        for shard in range(work.shards):
            if (done := work.done(step, shard)) is not None:
                counts.update(done["counts"])
                stopped += "stopped" in done
                records += done["records"]
        through = work.shards - len(missing)
        lines.append(
            f"{step}: {through} of {work.shards} shards" + f", {records} records" + f", {stopped} cut off by a budget" * bool(stopped)
        )
        shown = counts.most_common(_MOST)
        lines += [f"    {one_line(name, _CHARS)}: {count}" for name, count in shown]
        lines += [f"    and {len(counts) - _MOST} more kinds"] * (len(counts) > _MOST)
        if missing and through:
            lines.append(f"    missing: --array={ranges(missing)}")
    lines += ["", "all shards are through" if not unfinished else f"missing: --array={ranges(sorted(unfinished))}"]
    damaged = _checked(work, lines) if check else []
    return Status("\n".join(lines), not unfinished, damaged)


def _checked(work: WorkFolder, lines: list[str]) -> list[int]:
    """Add what was checked and what is damaged to the lines; the shards that are."""
    journals = tars = size = 0
    damaged: dict[int, str] = {}
    for shard in range(work.shards):
        for step in STEPS:
            if work.done(step, shard) is None:
                continue
            file = work.file(step, shard)
            journals, size = journals + 1, size + file.stat().st_size
            if wrong := work.damage(step, shard):
                damaged[shard] = f"{wrong}; {work.again(step, shard)}"
            elif step == "edit":
                try:
                    end, tar = pictures_end(work, shard), work.tar(shard)
                    tars += bool(end)
                    if end and (there := tar.stat().st_size if tar.is_file() else 0) < end:
                        damaged[shard] = f"{tar} has {there} bytes, and {file} names pictures up to {end}; {work.again(step, shard)}"
                except DataError as error:
                    damaged[shard] = str(error)
            if shard in damaged:
                break
    lines += [
        f"checked: {journals} journals ({size / MIB:.1f} MiB) by their sha256, {tars} tars by their length; not checked: pictures, which "
        "verify compares with their sha256 when it looks at them"
    ]
    for text in list(damaged.values())[:_MOST]:
        lines.append(f"damaged: {text}")
    lines += [f"and {len(damaged) - _MOST} more shards"] * (len(damaged) > _MOST)
    lines.append(f"damaged: --array={ranges(sorted(damaged))}" if damaged else "nothing is damaged")
    return sorted(damaged)
