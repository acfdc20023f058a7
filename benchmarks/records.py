"""Records of benchmark runs: JSON Lines with one named record per line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RUNS, RATE_RUNS = "runs.jsonl", "rates.jsonl"
"""Files in a folder of records: runs that tables show, and those by which a learning rate was chosen."""


def read_records(file: Path) -> dict[str, dict[str, Any]]:
    """Return the records sorted and keyed by name, or {} if there is no file. Of several records with the same name, the last counts."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return dict(sorted({row.pop("name"): row for row in rows}.items()))


def add_record(file: Path, name: str, record: dict[str, Any]) -> None:
    """Append a record; threads may share a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as handle:
        handle.write(json.dumps({"name": name} | record) + "\n")
