"""Training loop state, which a checkpoint stores in addition to the weights, the optimizer and the schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfvlm_ds.core.errors import ConfigError

SCHEMA = 3
"""Version of the files that a run resumes from. It is also increased when a code change alters the loss for the same options."""


@dataclass
class TrainState:
    """Training loop state in a checkpoint.

    Attributes:
        step: number of finished optimizer steps.
        sampler: state of the GroupSampler.
        data: identity (row count and hashes) of the training groups.
        run_id: id of the MLflow run.
        baseline_lp: log-likelihood of the factual pairs at the first measurement, in nats per token.
        best: ``step`` and ``value`` of the best evaluation according to ``train.save_best``.
        worse: number of evaluations since the best evaluation.
        skipped: maps the id of each skipped group to the reason.
        record: the run's options (see option_changes.py).
    """

    step: int = 0
    sampler: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    run_id: str | None = None
    baseline_lp: float | None = None
    best: dict[str, float] | None = None
    worse: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    record: dict[str, Any] | None = None

    def step_done(self, sampler: dict[str, Any]) -> None:
        """Count a finished optimizer step. ``sampler`` is the sampler's state after the step."""
        self.step += 1
        self.sampler = sampler

    def evaluated(self, value: float) -> bool:
        """Record a value of the metric that ``train.save_best`` names, and return True if it is the best so far. NaN is never the best."""
        if math.isnan(value) or (self.best is not None and value <= self.best["value"]):
            self.worse += 1
            return False
        self.best, self.worse = {"step": self.step, "value": value}, 0
        return True

    def note(self, **known: Any) -> None:
        """Set attributes that are known only after construction, such as ``record``, ``data`` or ``run_id``, or reset ``best``."""
        vars(self).update(known)

    def displacement(self, lp: float) -> float:
        """Return by how many nats per token the log-likelihood of the factual pairs has fallen from ``baseline_lp`` to ``lp``. The first
        call sets the baseline.
        """
        if self.baseline_lp is None:
            self.baseline_lp = lp
        return self.baseline_lp - lp


def refuse_other_version(described: Mapping[str, Any], what: Path) -> None:
    """Raise ConfigError if a record's schema is not ``SCHEMA``, that is, if another package version wrote it. The message names ``what``,
    the record's file or run folder.
    """
    if described.get("schema") != SCHEMA:
        raise ConfigError(
            f"{what} was written by another version of cfvlm-ds and cannot be resumed by this one; use that version (environment.json in "
            "the run folder names it), or choose another train.output_dir"
        )
