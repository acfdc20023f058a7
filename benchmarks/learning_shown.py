"""Tables of RESULTS.md and TRIALS.md with runs of benchmarks/learning.py: the runs that each needs, and its rows and columns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from learning_arms import CONTROL_ARM, STEPS, Job
from learning_tables import Base, half_width

Record = dict[str, Any]
Column = Callable[[Record], float]
CONTROL_RATE = "1e-3"
"""Rate at which NLL of all pairs is best on held-out combinations."""
FEW = 3
"""Number of seeds below which no interval is shown, because it says little."""


@dataclass(frozen=True)
class Row:
    """The mean of an arm over ``seeds`` or, with ``above``, of its differences from NLL of all pairs with the same seeds. Without an arm,
    the row shows the base.
    """

    title: str
    arm: str = ""
    rate: str = "3e-4"
    seeds: tuple[int, ...] = (0,)
    above: bool = False
    clock: int = STEPS
    groups: int = 0
    noise: int = 0
    more: int = 0

    @property
    def jobs(self) -> list[Job]:
        return [self._job(self.arm, self.rate, seed) for seed in self.seeds if self.arm]

    @property
    def controls(self) -> list[Job]:
        return [self._job(CONTROL_ARM, CONTROL_RATE, seed) for seed in self.seeds if self.above]

    def _job(self, arm: str, rate: str, seed: int) -> Job:
        return Job(arm, rate, seed, clock=self.clock, groups=self.groups, noise=self.noise, more=self.more)


@dataclass(frozen=True)
class Table:
    """``num_test``: held-out groups of each run, 0 for all. ``each``: edits whose seeds are listed, a column for each."""

    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    each: tuple[str, ...] = ()
    num_test: int = 0

    @property
    def jobs(self) -> list[Job]:
        """The runs that the table needs, each once."""
        return list(dict.fromkeys(job for row in self.rows for job in (*row.jobs, *row.controls)))


def _edit(name: str) -> Column:
    return lambda record: record["results"]["combo"][name]["group"]


def _question(split: str) -> Column:
    return lambda record: record["results"][split]["all"]["group"]


def _nats(split: str) -> Column:
    return lambda record: -record["nll"][split]


NATS = "nats per token: "
COLUMNS: dict[str, Column] = {
    **{
        name.replace("_", " "): _edit(name)
        for name in ("colour", "colour_swap", "count", "depth", "relation", "shape", "shape_swap", "size", "texture", "all")
    },
    **{title: _question(split) for title, split in (("yes/no", "yes_no"), ("A/B", "choice"), ("how many", "count"))},
    **{f"{NATS}{title}": _nats(split) for title, split in (("captions", "combo"), ("yes/no", "yes_no"), ("A/B", "choice"))},
    f"{NATS}how many": _nats("count"),
    f"{NATS}factual text in training": lambda record: record["factual_nats_per_token"]["last"],
}
EDITS = tuple(COLUMNS)[:10]
QUESTIONS = ("yes/no", "A/B", "how many")
_KEPT = (f"{NATS}captions", f"{NATS}factual text in training")
_HARD = ("colour swap", "depth", "relation", "shape", "shape swap", "texture")


def _range(number: int) -> tuple[int, ...]:
    return tuple(range(number))


RIVALS = (
    Row("mDPO", "mdpo", seeds=_range(5)),
    Row("SymMPO", "symmpo", seeds=_range(5)),
    Row("MISP-DPO", "misp", seeds=_range(5)),
    Row("DPO with NLL", "dpo-nll", "6e-4", _range(5)),
    Row("DPO", "dpo", seeds=_range(5)),
)


def _of_data(title: str, groups: int, clock: int = STEPS, rates: Sequence[str] = ("1e-4",), noise: int = 0) -> list[Row]:
    what: dict[str, Any] = {"groups": groups, "clock": clock, "noise": noise}
    return [
        Row(f"{title}: default objective", "default", **what),
        *(Row(f"{title}: NLL, all pairs", CONTROL_ARM, rate, **what) for rate in rates),
    ]


TABLES = {
    "objectives": Table(
        (
            Row("base"),
            Row("NLL, all pairs", CONTROL_ARM, CONTROL_RATE, _range(8)),
            Row("NLL, all pairs", CONTROL_ARM, "1e-4", _range(3)),
            Row("**default objective**", "default", seeds=_range(5)),
            Row("above NLL at 1e-3", "default", seeds=_range(5), above=True),
            *RIVALS,
            Row("β = 1, margins 1 and 5", "sharp-1-5", "1e-3", _range(8)),
            Row("above NLL at 1e-3", "sharp-1-5", "1e-3", _range(8), above=True),
        ),
        (*EDITS, *QUESTIONS),
    ),
    "seeds": Table(
        tuple(
            Row(f"{title}, seed {seed}", arm, rate, (seed,))
            for title, arm, rate in (("default objective", "default", "3e-4"), ("NLL, all pairs", CONTROL_ARM, CONTROL_RATE))
            for seed in range(5)
        ),
        (*_HARD, "all"),
    ),
    "price": Table(
        (
            Row("NLL, all pairs", CONTROL_ARM, CONTROL_RATE, _range(3)),
            Row("NLL, all pairs", CONTROL_ARM, "1e-4", _range(3)),
            Row("**default objective**", "default", seeds=_range(5)),
            *RIVALS,
        ),
        ("all", *(name for name in COLUMNS if name.startswith(NATS))),
    ),
    "parts": Table(
        (
            Row("**default objective**", "default", seeds=_range(2)),
            Row("without `csd`", "no-csd", seeds=_range(2)),
            Row("without `fcd`", "no-fcd", seeds=_range(2)),
            Row("without `align`", "no-align", seeds=_range(2)),
            Row("false texts only, no edited picture", "texts", seeds=_range(2)),
            Row("edited pictures only, no false text", "images", seeds=_range(2)),
            Row("with `batch_align`, 16 texts", "batch-align", seeds=_range(2)),
            Row("three counterfactuals a scene", "three", seeds=_range(2)),
            Row("the hardest of three", "hardest", seeds=_range(2)),
            Row("adapters and projector", "lora", "2e-3", _range(2)),
            Row("the paper's sum", "paper", "1e-4", _range(2)),
            Row("the paper's sum", "paper"),
            Row("NLL, all pairs", CONTROL_ARM, CONTROL_RATE, _range(2)),
            Row("NLL, factual pairs", "nll-factual", seeds=_range(2)),
        ),
        (*_HARD, "all", *QUESTIONS, *_KEPT),
        each=("all",),
    ),
    "groups": Table(
        (
            *_of_data("250", 250, 100),
            *_of_data("250", 250),
            *_of_data("1,000", 1000, 300),
            *_of_data("1,000", 1000, rates=("1e-4", "1e-3")),
            *_of_data("4,000", 4000, rates=("1e-3",)),
            *_of_data("16,000", 0, rates=("1e-4", "1e-3")),
            *_of_data("16,000, 10 % labelled wrongly", 0, noise=10),
            *_of_data("16,000, 30 % labelled wrongly", 0, rates=("1e-4", "1e-3"), noise=30),
        ),
        ("relation", "shape", "all", *_KEPT),
    ),
    "long": Table(
        (
            Row("**default objective**", "default", more=14),
            Row("weights of `csd` and `fcd` 0.3", "weight-0.3", more=14),
            Row("what `calibrate` says", "calibrated-long", more=14),
            Row("NLL, all pairs", CONTROL_ARM, CONTROL_RATE, more=14),
        ),
        (*_HARD, "all", *QUESTIONS, f"{NATS}captions"),
        num_test=1800,
    ),
    "time": Table(
        tuple(
            Row(title, arm, rate, _range(2 if clock == 8300 else 1), clock=clock)
            for clock in (550, STEPS, 2800, 8300)
            for title, arm, rate in (
                ("NLL, all pairs", CONTROL_ARM, CONTROL_RATE),
                ("mDPO", "mdpo", "3e-4"),
                ("**default objective**", "default", "3e-4"),
            )
            if (clock, arm) != (8300, "mdpo")
        ),
        (*EDITS, *QUESTIONS),
    ),
    "passes": Table(
        (
            Row("NLL, all pairs, 16,000 groups", CONTROL_ARM, CONTROL_RATE, _range(2), clock=8300),
            Row("NLL, all pairs, 100,000 groups", CONTROL_ARM, CONTROL_RATE, clock=8300, groups=100_000),
            Row("**default objective**, 16,000 groups", "default", seeds=_range(2), clock=8300),
            Row("the same, weights of `csd` and `fcd` 0.3", "weight-0.3", clock=8300),
            Row("**default objective**, 100,000 groups", "default", clock=8300, groups=100_000),
        ),
        (*_HARD, "all", *QUESTIONS, *(name for name in COLUMNS if name.startswith(NATS))),
    ),
    "margins": Table(
        (
            Row("1, 1", "sharp-1-1", "1e-3", _range(8)),
            Row("1, 5", "sharp-1-5", "1e-3", _range(8)),
            Row("3, 3", "sharp-3-3", "1e-3", _range(2)),
            Row("5, 1", "sharp-5-1", "1e-3"),
            Row("5, 5", "beta-1", "1e-3", _range(2)),
            Row("NLL, all pairs", CONTROL_ARM, CONTROL_RATE, _range(8)),
        ),
        ("relation", "shape", "shape swap", "all", *QUESTIONS, *(f"{NATS}{name}" for name in QUESTIONS)),
    ),
}


def missing(table: Table, records: Mapping[str, Record]) -> list[str]:
    """Return the names of the runs that are missing in ``records``, which are keyed by Job.name."""
    return [job.name for job in table.jobs if job.name not in records]


def text_of(table: Table, records: Mapping[str, Record], base: Base) -> str:
    """Return the table as Markdown: group accuracies in %, means over seeds with half the width of their 95 % t interval."""
    columns = [*table.columns, *(f"{edit}, by seed" for edit in table.each)]
    lines = [f"| group accuracy, % | rate | seeds | steps | {' | '.join(columns)} |", f"|---|---:|---:|---:|{'---:|' * len(columns)}"]
    started = {"results": {split: {edit: {"group": value} for edit, value in rows.items()} for split, rows in base.items()}}
    for row in table.rows:
        found = [records[job.name] for job in row.jobs] or [started]
        how = ["", "", ""]
        if row.arm and not row.above:
            how = [row.rate, str(len(row.seeds)), "/".join(sorted({str(each["steps"]) for each in found}))]
        cells = [_cell(name, row, found, [records[job.name] for job in row.controls]) for name in table.columns]
        each = ["" if row.above else ", ".join(f"{COLUMNS[edit](record):.1f}" for record in found) for edit in table.each]
        lines.append("".join(f"| {cell} " if cell else "| " for cell in (row.title, *how, *cells, *each)) + "|")
    return "\n".join(lines)


def _cell(name: str, row: Row, found: Sequence[Record], controls: Sequence[Record]) -> str:
    if row.above and name not in EDITS:
        return ""
    if name.startswith(NATS) and not all("nll" in each for each in found):
        return ""
    column, digits = COLUMNS[name], 2 if name.startswith(NATS) else 1
    values = [column(each) for each in found]
    if row.above:
        values = [value - column(other) for value, other in zip(values, controls, strict=True)]
    spread = f" ± {half_width(values):.{digits}f}" if len(values) >= FEW else ""
    return f"{statistics.mean(values):{'+' if row.above else ''}.{digits}f}{spread}"
