"""What `make demo` prints last: group accuracy of the base, of plain NLL from it, and of the run that has just ended.

python -m cfvlm_ds.demo.report runs/quickstart
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

CONTROL = Path(__file__).resolve().parent / "control.json"
"""Plain NLL on all pairs, from the same base in the same processor time: split -> edit -> mean group accuracy over seeds; and how many."""


def report(run: Path) -> str:
    """The table, a line per edit type on held-out combinations and one per kind of question."""
    before, rows = (json.loads((run / name).read_text(encoding="utf-8")) for name in ("results_start.json", "results.json"))
    after = {split: {row["name"]: row["metrics"] for row in found} for split, found in rows.items()}
    control = json.loads(CONTROL.read_text(encoding="utf-8"))
    lines = [f"{'group accuracy, %':28}{'base':>8}{'+ NLL':>8}{'+ this run':>12}", ""]
    for split, edits in after.items():
        for edit in edits if split == "combo" else ["all"]:
            name = f"{edit.replace('_', ' ')}" if split == "combo" else f"questions: {split.replace('_', ' ')}"
            values = [f"{_value(found, split, edit):>{width}}" for found, width in ((before, 8), (control["accuracies"], 8), (after, 12))]
            lines.append(f"{name:28}{''.join(values)}")
    seeds = control["seeds"]
    lines += [
        "",
        f"Held-out combinations of colour and shape; chance is 16.7. NLL: ordinary fine-tuning in the same time, mean of {seeds} seeds.",
    ]
    return "\n".join(lines)


def _value(found: dict[str, Any], split: str, edit: str) -> str:
    row = found.get(split, {}).get(edit)
    value = row.get("group") if isinstance(row, dict) else row
    return "" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    print(report(Path(sys.argv[1])))
