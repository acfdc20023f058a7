"""Final table of `make demo`: results on the world with habits before and after a run, and stored results of other objectives trained for
the same time.

python -m cfvlm_ds.demo.report runs/quickstart
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cfvlm_ds.core.journal import records
from cfvlm_ds.core.text import plain_tables

MEASURED = Path(__file__).resolve().parent / "measured.json"
"""Results of `python benchmarks/learning.py --report`: {objective: {"title": text, "seeds": number, "mean": {row: value}}}."""
AXES = {
    "pairs, habit agrees": "agrees/group",
    "pairs, habit contradicted": "contradicts/group",
    "pairs, unseen colours": "combo/group",
    "yes/no, habit agrees": "yes_no_agrees/group",
    "yes/no, habit contradicted": "yes_no_contradicts/group",
    "A or B": "choice/group",
    "how many": "count/group",
    "what colour": "colour/group",
    "POPE's form, F1": "pope/f1_macro",
    "false statements, habit agrees": "habits/hallucinated/agrees",
    "false statements, habit contradicted": "habits/hallucinated/contradicts",
    "things mentioned, habit agrees": "habits/covered/agrees",
    "things mentioned, habit contradicted": "habits/covered/contradicts",
    "outside the grammar": "habits/unparsed",
}
"""Table row -> metric (%) of a run whose evaluation sets are named as in examples/quickstart.yaml."""


def axes_of(run: Path, axes: Mapping[str, str] = AXES) -> list[dict[str, float]]:
    """Return the metrics in ``axes``, one dict per evaluation of the run. Evaluations without the first metric are left out."""
    name = f"eval/{next(iter(axes.values()))}"
    evaluated = [line for line in records(run / "metrics.jsonl", "its evaluations are left out") if name in line]
    return [{axis: line[f"eval/{metric}"] for axis, metric in axes.items() if f"eval/{metric}" in line} for line in evaluated]


def report(run: Path) -> str:
    """Return a table of the results of a run, the base model (if it was evaluated) and other objectives (stored)."""
    measured: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8"))
    if not (found := axes_of(run)):
        return f"{run} was not evaluated, so there is no table (data.evaluation in examples/quickstart.yaml)"
    base = {"base": found[0]} if len(found) > 1 else {}
    columns = {**base, **{each["title"]: each["mean"] for each in measured.values()}, "this run": found[-1]}
    rows = [["%", *columns], ["---", *["---:"] * len(columns)]]
    rows += [[axis, *(f"{values[axis]:.1f}" if axis in values else "" for values in columns.values())] for axis in AXES]
    table = plain_tables("\n".join(f"| {' | '.join(row)} |" for row in rows))
    seeds = ", ".join(f"{each['title']} {each['seeds']}" for each in measured.values())
    return f"{table}\n\n{_NOTE.format(seeds=seeds)}"


_NOTE = """Pairs and questions: share of groups in which both pictures get the right text; a model that ignores the pictures has 0.
False statements: share of what the model states in descriptions; read it beside the share of things that it mentions.
The other objectives trained from the same base in equal processor time, which includes reference scores. Seeds: {seeds}."""


if __name__ == "__main__":
    print(report(Path(sys.argv[1])))
