"""Where a run is: what a checkpoint holds besides weights, optimizer and schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfvlm_ds.core.errors import ConfigError

SCHEMA = 1
"""The form of what a run writes to be continued: another number for another form."""


@dataclass
class TrainState:
    """Where the loop is: what a checkpoint holds besides weights, optimizer and schedule.

    ``step`` counts finished optimizer steps; ``sampler`` is GroupSampler's state; ``data`` the identity of the training groups;
    ``run_id`` the MLflow run; ``baseline_lp`` the factual log-likelihood per token at the start, against which displacement is measured;
    ``best`` the ``step`` and ``value`` of the best evaluation by ``train.save_best``; ``skipped`` the groups left out, and why; ``record``
    its options (see option_changes.py); ``retained`` what the first evaluation of each set of ``train.retention`` has found, at which
    ``step`` and of which ``data``.
    """

    step: int = 0
    sampler: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    run_id: str | None = None
    baseline_lp: float | None = None
    best: dict[str, float] | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    record: dict[str, Any] | None = None
    retained: dict[str, dict[str, Any]] = field(default_factory=dict)

    def step_done(self, sampler: dict[str, Any]) -> None:
        """Note that an optimizer step is finished; ``sampler`` says where the data continue."""
        self.step += 1
        self.sampler = sampler

    def evaluated(self, value: float) -> bool:
        """Whether this value of the metric ``train.save_best`` is the best so far; if so, it is noted."""
        if self.best is not None and value <= self.best["value"]:
            return False
        self.best = {"step": self.step, "value": value}
        return True

    def note(self, **known: Any) -> None:
        """Set what is known by now: the ``record`` of this start, its ``data``, its ``run_id``; or ``best``, to be forgotten."""
        vars(self).update(known)

    def displacement(self, lp: float) -> float:
        """By how many nats per token the factual log-likelihood has fallen since the first value given here."""
        if self.baseline_lp is None:
            self.baseline_lp = lp
        return self.baseline_lp - lp

    def keep(self, split: str, data: Mapping[str, Any], measured: Mapping[str, float]) -> dict[str, Any]:
        """Note what has been measured of a set as what later evaluations are compared with; ``data`` is the identity of its groups."""
        self.retained[split] = {"data": dict(data), "step": self.step, **measured}
        return self.retained[split]


def refuse_other_version(described: Mapping[str, Any], what: Path) -> None:
    """Raise ConfigError for a record of another form; ``what`` is whose record it is."""
    if described.get("schema") != SCHEMA:
        raise ConfigError(
            f"{what} was written by another version of cfvlm-ds, and this one cannot go on from it; use that version (environment.json in "
            "the run folder names it), or choose another train.output_dir"
        )
