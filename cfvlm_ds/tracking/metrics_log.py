"""Metrics log: reading and truncation of metrics.jsonl, which contains one JSON record per line."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cfvlm_ds.core.files import replace
from cfvlm_ds.core.secrets import print_line

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: Path, offset: int, limit: int) -> tuple[list[tuple[str, float, int, int]], int]:
    """Read metrics.jsonl from byte ``offset``. Return points (name, value, time in milliseconds, step) and the new offset.

    Reading stops after the line that brings the number of points to ``limit`` or more.
    """
    points: list[tuple[str, float, int, int]] = []
    if not path.exists():
        return points, offset
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            row = parse_line(line)
            if not line.endswith(b"\n") or len(points) >= limit:
                break
            offset += len(line)
            if row is not None:
                step, milliseconds = row.pop("step"), round(row.pop("time") * 1000)
                points += [(name, float(value), milliseconds, step) for name, value in row.items()]
    return points, offset


def truncate_metrics(path: Path, resume_step: int | None, offset: int) -> tuple[set[str], int]:
    """Remove incomplete lines and the lines of steps after ``resume_step``, or all lines if ``resume_step`` is None.

    Return the names of the metrics recorded at ``resume_step``, and the position in the new file that corresponds to byte ``offset`` of the
    old file.
    """
    if not path.exists():
        return set(), 0
    kept: list[bytes] = []
    names: set[str] = set()
    new_offset = position = 0
    lines = path.read_bytes().splitlines(keepends=True)
    for line in lines:
        position += len(line)
        row = parse_line(line)
        if resume_step is None or row is None or row["step"] > resume_step:
            continue
        kept.append(line)
        if position <= offset:
            new_offset += len(line)
        if row["step"] == resume_step:
            names |= row.keys()
    if kept != lines[: len(kept)]:
        replace(path, b"".join(kept))
    elif len(kept) < len(lines):
        os.truncate(path, sum(map(len, kept)))  # in place, which needs no free space
    return names, new_offset


def last_values(path: Path) -> tuple[dict[str, float], int]:
    """Return the last value of each metric, and the last recorded step (-1 if there is no record)."""
    values: dict[str, float] = {}
    step = -1
    for row in read_rows(path) if path.is_file() else ():
        step = max(step, row.pop("step"))
        values |= {name: float(value) for name, value in row.items() if name != "time"}
    return values, step


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the record in each complete line."""
    with path.open("rb") as file:
        yield from (row for line in file if (row := parse_line(line)) is not None)


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Parse a line of metrics.jsonl. Return None if a killed process or a power loss left the line incomplete."""
    try:
        row: dict[str, Any] | None = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row


def now_ms() -> int:
    return int(time.time() * 1000)


def say(message: str) -> None:
    print_line(f"cfvlm_ds tracking: {message}", error=True)
