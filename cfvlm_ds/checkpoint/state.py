"""Where a run is: what a checkpoint holds besides weights, optimizer and schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.text import quoted


@dataclass
class TrainState:
    """Where the loop is: what a checkpoint holds besides weights, optimizer and schedule.

    ``step`` counts finished optimizer steps; ``sampler`` is GroupSampler's state; ``data`` the identity of the training groups;
    ``run_id`` the MLflow run; ``baseline_lp`` the factual log-likelihood per token at the start, against which displacement is measured;
    ``best`` the ``step`` and ``value`` of the best evaluation by ``train.save_best``; ``skipped`` the groups left out, and why; ``record``
    its options (see option_changes.py); ``retained`` what the first evaluation of each set of ``train.retention`` has found, at which
    ``step`` and of which ``data``, which the first revision that kept it did not say.
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

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def step_done(self, sampler: dict[str, Any]) -> None:
        """Note that an optimizer step is finished; ``sampler`` says where the data continue."""
        self.step += 1
        self.sampler = sampler

    def configured_by(self, record: dict[str, Any]) -> None:
        """The record of this start's options."""
        self.record = record

    def trained_on(self, data: dict[str, Any]) -> None:
        """Note the identity of the groups that are trained on from here."""
        self.data = data

    def tracked_as(self, run_id: str | None) -> None:
        """Note the MLflow run, once its server has answered."""
        self.run_id = run_id

    def evaluated(self, value: float) -> bool:
        """Whether this value of the metric ``train.save_best`` is the best so far; if so, it is noted."""
        if self.best is not None and value <= self.best["value"]:
            return False
        self.best = {"step": self.step, "value": value}
        return True

    def forget_best(self) -> None:
        """Forget the best evaluation: it was by another metric."""
        self.best = None

    def displacement(self, lp: float) -> float:
        """By how many nats per token the factual log-likelihood has fallen since the first value given here."""
        if self.baseline_lp is None:
            self.baseline_lp = lp
        return self.baseline_lp - lp

    def keep(self, split: str, data: Mapping[str, Any], measured: Mapping[str, float]) -> dict[str, Any]:
        """Note what has been measured of a set as what later evaluations are compared with; ``data`` is the identity of its groups."""
        self.retained[split] = {"data": dict(data), "step": self.step, **measured}
        return self.retained[split]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; fields that an older revision did not save keep their defaults.

        Raises ConfigError if it lacks a field without a default, or has one that this revision does not know.
        """
        if lacking := sorted({"step", "sampler", "data"} - state.keys()):
            raise ConfigError(f"its state has no {', '.join(lacking)}; resume from another checkpoint, or with the revision that wrote it")
        if unknown := sorted(state.keys() - vars(self).keys()):
            raise ConfigError(f"its state has {', '.join(unknown)}, which a newer revision must have written; resume with that one")
        if odd := sorted(name for name, value in state.items() if not isinstance(value, _KINDS[name]) or isinstance(value, bool)):
            raise ConfigError(f"its state has a {odd[0]} of type {type(state[odd[0]]).__name__}; resume from another checkpoint")
        if wrong := _wrong_inside(state.get("best"), state.get("retained", {})):
            raise ConfigError(f"its state has {wrong}; resume from another checkpoint")
        for name, value in state.items():
            setattr(self, name, value)


def _wrong_inside(best: Mapping[str, Any] | None, retained: Mapping[str, Any]) -> str | None:
    """What evaluations have not left as it is: its parts are used when the next one is over, hours after the start."""
    if best is not None and not all(_is_number(best.get(name)) for name in ("step", "value")):
        return "a best evaluation without a number as its step or value"
    for split, start in retained.items():
        if not isinstance(start, dict) or not isinstance(start.get("data", {}), dict):
            return f"no first evaluation of {quoted(split)} where there should be one"
        if odd := [name for name in {"step", *start} - {"data"} if not _is_number(start.get(name))]:
            return f"a first evaluation of {quoted(split)} without a number as its {quoted(min(odd))}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_KINDS: dict[str, Any] = {
    "step": int,
    **dict.fromkeys(("sampler", "record"), (dict, type(None))),
    "data": (dict, str, type(None)),  # of an older revision, one hash
    "run_id": (str, type(None)),
    "baseline_lp": (int, float, type(None)),
    "best": (dict, type(None)),
    **dict.fromkeys(("skipped", "retained"), dict),
}
