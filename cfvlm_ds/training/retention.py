"""Retention: checks that training lowers neither the likelihood of factual texts nor the results on held-out sets.

A model can increase its margins by making every text less likely (likelihood displacement, arXiv 2410.08847). A model that learns one kind
of edit can also forget captions or other kinds of edits. The sets in ``train.retention`` are evaluated before the first step and at every
later evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cfvlm_ds.checkpoint import TrainState
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.data.identity import Identity, changes
from cfvlm_ds.evaluation import Accuracy, headline_metric


@dataclass
class Retention:
    """Monitor that compares metrics with their first values and warns if a likelihood falls by more than ``train.displacement_warning``.

    ``identities`` maps each evaluation set to its identity (hashes of its contents). If a set's contents have changed, it is compared with
    its first evaluation after the change.
    """

    config: RunConfig
    state: TrainState
    identities: Mapping[str, Identity]
    say: Callable[[str], object]
    warned: float = 0.0

    @property
    def _remedy(self) -> str:
        advice = (
            "raise objective.retain.weight"
            if "retain" in self.config.objective
            else "add objective.retain (it keeps the model close to its initial state on plain captions in the training data)"
        )
        return f"{advice}, raise objective.align.weight or lower train.learning_rate"

    def trained(self, metrics: Mapping[str, float]) -> None:
        """Check the likelihood in a training record, and warn if it has dropped too far. The warning is repeated only if the drop has
        doubled since.
        """
        if (warning := self.displacement(metrics)) and (fallen := self._fallen(metrics)) > 2 * self.warned:
            self.warned = fallen
            self.say(warning)

    def displacement(self, metrics: Mapping[str, float]) -> str:
        """Return a warning if a training record's factual log-likelihood is too far below its first value, otherwise ""."""
        if (fallen := self._fallen(metrics)) <= self.config.train.displacement_warning:
            return ""
        return (
            f"warning: likelihood displacement: the factual log-likelihood fell {fallen:.2f} nats per token below its initial value; "
            f"{self._remedy}"
        )

    def _fallen(self, metrics: Mapping[str, float]) -> float:
        return self.state.displacement(metrics["logp/lp_00"]) if "logp/lp_00" in metrics else 0.0

    def evaluated(self, results: Mapping[str, Sequence[Accuracy]]) -> dict[str, float]:
        """Compare an evaluation with the first one. For each set in ``train.retention``, return the change in negative log-likelihood (nats
        per token) and in accuracy (percentage points).
        """
        changed: dict[str, float] = {}
        for split in self.config.train.retention or ():
            if not (rows := results.get(split)):
                continue
            overall, metric = rows[-1], headline_metric(rows)
            measured = {} if overall.nll is None else {"nll": overall.nll}
            measured |= {} if metric is None else {"accuracy": overall.metrics[metric]}
            start = self._start(split, measured)
            deltas = {name: value - start[name] for name, value in measured.items() if name in start}
            changed |= {f"retention/{split}/{name}": change for name, change in deltas.items()}
            if (risen := deltas.get("nll", 0.0)) > self.config.train.displacement_warning:
                since = f"step {start['step']}" if start["step"] else "the start"
                self.say(
                    f"warning: retention: true texts of data.evaluation.{split} lost {risen:.2f} nats per token since {since}; "
                    f"{self._remedy}"
                )
        return changed

    def _start(self, split: str, measured: Mapping[str, float]) -> Mapping[str, Any]:
        """Return a set's first evaluation and its ``step``. If the set is new or has changed, this is the current evaluation."""
        start, data = self.state.retained.get(split), self.identities[split]
        if start is not None and changes(start["data"], data) is None:
            return start
        if self.state.step:
            self.say(f"retention: data.evaluation.{split} is new, or has changed, and is compared with step {self.state.step} from now on")
        return self.state.keep(split, data, measured)
