"""Stores of small data sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.data import open_groups
from cfvlm_ds.data.prepare import PrepareOptions, prepare, source_stamp, source_state
from cfvlm_ds.data.store import GroupStore


def preparing(
    source: Path | GroupStore, out: Path, shard: int = 0, of: int = 1, say: Callable[[str], object] = str, **options: Any
) -> bool:
    """Prepare a data set. Returns True if its store is complete. Raises DataError with the first problem, unless problems are skipped."""
    groups = source if isinstance(source, GroupStore) else open_groups(source)
    chosen = PrepareOptions(**options)
    stamp = source_stamp(groups.path, source_state(groups.path), groups.roots, groups.format, groups._limit, chosen)
    report, whole = prepare(groups, out, stamp, chosen, say, shard=shard, of=of)
    if report.problems and chosen.on_error == "error":
        raise DataError(report.problems[0])
    return whole
