"""Final table of `make demo`: group accuracy of the base model, of the base model fine-tuned with NLL only and with the default objective
(both over several seeds), and of this run's model.

python -m cfvlm_ds.demo.report runs/quickstart
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

MEASURED = Path(__file__).resolve().parent / "measured.json"
"""Results of `python benchmarks/learning.py --report` on 1000 held-out pairs per edit type, in %, by split and edit type. ``base`` has
those of the base model. ``nll`` (NLL only, on all pairs, in the same CPU time) and ``default`` (this run's objective) have the number of
``seeds``, and ``mean``, ``lowest`` and ``highest`` over them."""


def report(run: Path) -> str:
    """Format the table, with a line per edit type on held-out combinations and one per kind of question."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    rows = json.loads((run / "results.json").read_text(encoding="utf-8"))
    seeds = f"{measured['default']['seeds']} seeds"
    lines = [f"{'group accuracy, %':24}{'base':>8}{'+ NLL':>8}{f'+ default, {seeds}':>22}{'this run':>11}", ""]
    for split, results in rows.items():
        for row in results if split == "combo" else [row for row in results if row["name"] == "all"]:
            edit = row["name"]
            name = edit.replace("_", " ") if split == "combo" else f"questions: {split.replace('_', ' ')}"
            base, control = measured["base"][split][edit], measured["nll"]["mean"][split][edit]
            mean, low, high = (measured["default"][which][split][edit] for which in ("mean", "lowest", "highest"))
            spread = f"{mean:.1f} ({low:.1f} to {high:.1f})"
            lines.append(f"{name:24}{base:>8.1f}{control:>8.1f}{spread:>22}{row['metrics']['group']:>11.1f}")
    pairs = min(row["num"] for row in rows["combo"])
    return "\n".join([*lines, "", _NOTE.format(seeds=measured["nll"]["seeds"], pairs=pairs)])


_NOTE = """Held-out combinations of colour and shape; chance is 16.7 for two captions. NLL: ordinary fine-tuning in the same processor time,
{seeds} seeds. This run is evaluated on {pairs} pairs per edit, the others on 1000: an edit may differ by 14 points, the mean by 4."""


if __name__ == "__main__":
    print(report(Path(sys.argv[1])))
