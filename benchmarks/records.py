"""Records of benchmark runs (JSON Lines with one named record per line), and the tables of pages that show them."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RUNS, RATE_RUNS = "runs.jsonl", "rates.jsonl"
"""Files in a folder of records: runs shown in tables, and runs from which a learning rate was chosen."""

T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Student's t for a 95 % interval, by number of values."""


def read_records(file: Path) -> dict[str, dict[str, Any]]:
    """Return the records by name, sorted; {} if there is no file. If several records have the same name, the last one counts."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return dict(sorted({row.pop("name"): row for row in rows}.items()))


def add_record(file: Path, name: str, record: dict[str, Any]) -> None:
    """Append a record. Several threads can share a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as handle:
        handle.write(json.dumps({"name": name} | record) + "\n")


def renewed(page: str, tables: Iterable[tuple[str, str]]) -> str:
    """Replace the table after each `` `python COMMAND` `` in ``page``. Each item of ``tables`` is a pair of a command and its table.

    Raises ValueError if the page does not contain a command exactly once.
    """
    for command, table in tables:
        parts = re.split(rf"(`python {re.escape(command)}`(?:(?!^\|).)*?^)(?:\|[^\n]*\n)+", page, flags=re.MULTILINE | re.DOTALL)
        if len(parts) != 3:
            raise ValueError(f"`python {command}` must occur exactly once, before its table")
        page = f"{parts[0]}{parts[1]}{table}\n{parts[2]}"
    return page


def renew_pages(pages: Iterable[Path], tables: Iterable[tuple[str, str]]) -> None:
    """Replace the table of each command in the pages that show it."""
    shown = list(tables)
    for page in pages:
        text = page.read_text()
        page.write_text(renewed(text, [(command, table) for command, table in shown if f"`python {command}`" in text]))


def half_width(values: Sequence[float]) -> float:
    """Return half the width of the 95 % t interval for the mean of two or more values."""
    return T95[min(len(values), max(T95))] * statistics.stdev(values) / len(values) ** 0.5
