"""State of the training loop, which a checkpoint stores in addition to weights, optimizer and schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfvlm_ds.core.errors import ConfigError

SCHEMA = 1
"""Format version of the files that a run resumes from."""


@dataclass
class TrainState:
    """State of the training loop in a checkpoint.

    ``step`` counts finished optimizer steps; ``sampler`` is GroupSampler's state; ``data`` is the identity of the training groups;
    ``run_id`` is the MLflow run; ``baseline_lp`` is the initial factual log-likelihood per token, against which displacement is measured;
    ``best`` holds the ``step`` and ``value`` of the best evaluation according to ``train.save_best``, and ``worse`` counts the evaluations
    since then; ``skipped`` maps the ids of left-out groups to reasons; ``record`` holds the run's options (see option_changes.py);
    ``retained`` holds the first evaluation of each set in ``train.retention``, with its ``step`` and ``data``.
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
    retained: dict[str, dict[str, Any]] = field(default_factory=dict)

    def step_done(self, sampler: dict[str, Any]) -> None:
        """Count a finished optimizer step. ``sampler`` is the sampler's state after the step."""
        self.step += 1
        self.sampler = sampler

    def evaluated(self, value: float) -> bool:
        """Store a value of the metric ``train.save_best`` if it is the best so far. Returns True if it is. NaN is never the best."""
        if math.isnan(value) or (self.best is not None and value <= self.best["value"]):
            self.worse += 1
            return False
        self.best, self.worse = {"step": self.step, "value": value}, 0
        return True

    def note(self, **known: Any) -> None:
        """Set attributes that become known later, such as ``record``, ``data`` or ``run_id``, or discard ``best``."""
        vars(self).update(known)

    def displacement(self, lp: float) -> float:
        """Return the decrease of the factual log-likelihood since the first value, in nats per token."""
        if self.baseline_lp is None:
            self.baseline_lp = lp
        return self.baseline_lp - lp

    def keep(self, split: str, data: Mapping[str, Any], measured: Mapping[str, float]) -> dict[str, Any]:
        """Store the measurements of a set as the reference for later evaluations. Returns them with ``step`` and ``data`` (the identity of
        its groups).
        """
        self.retained[split] = {"data": dict(data), "step": self.step, **measured}
        return self.retained[split]


def refuse_other_version(described: Mapping[str, Any], what: Path) -> None:
    """Raise ConfigError for a record of another version. ``what`` is its file or run folder."""
    if described.get("schema") != SCHEMA:
        raise ConfigError(
            f"{what} was written by another version of cfvlm-ds and cannot be resumed by this one; use that version (environment.json in "
            "the run folder names it), or choose another train.output_dir"
        )
