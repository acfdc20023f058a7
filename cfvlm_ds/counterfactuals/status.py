"""Status of a work folder: for each step, the number of finished shards, their counts, and the missing shards in sbatch's notation."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from cfvlm_ds.core.text import one_line
from cfvlm_ds.counterfactuals.select import ranges
from cfvlm_ds.counterfactuals.work_folder import WorkFolder

_MOST = 12
_CHARS = 100


def status(out: Path) -> str:
    """Format the status of a work folder as text for the terminal."""
    work = WorkFolder.open(out)
    source = work.about["source"]
    lines = [f"{out}: {one_line(source['path'], 300)} ({one_line(str(source.get('groups')), 20)} rows), {work.shards} shards", ""]
    unfinished: set[int] = set()
    for step in work.steps:
        missing = work.missing(step)
        unfinished |= set(missing)
        counts: Counter[str] = Counter()
        records = 0
        for shard in range(work.shards):
            if (done := work.done(step, shard)) is not None:
                counts.update(done["counts"])
                records += done["records"]
            elif (journal := work.file(step, shard)).is_file():
                records += journal.read_bytes().count(b"\n")
        through = work.shards - len(missing)
        lines.append(f"{step}: {through} of {work.shards} shards, {records} records")
        shown = counts.most_common(_MOST)
        lines += [f"{count:>9,}  {one_line(name, _CHARS)}" for name, count in shown]
        lines += [f"{len(counts) - _MOST:>9,}  more counts"] * (len(counts) > _MOST)
        if missing and through:
            lines.append(f"    missing: --array={ranges(missing)}")
    lines += ["", "all shards are finished" if not unfinished else f"missing: --array={ranges(sorted(unfinished))}"]
    return "\n".join(lines)
