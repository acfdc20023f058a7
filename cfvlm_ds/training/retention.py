"""What a training must not cost: the likelihood of factual texts while it trains, and held-out sets that it is not about.

Margins can be won by making everything less likely (likelihood displacement, arXiv 2410.08847), and a model that learns one kind of edit
may forget captions, or other kinds. The sets of ``train.retention`` are evaluated before the first step and whenever the run evaluates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from cfvlm_ds.checkpoint import TrainState
from cfvlm_ds.core.config import TrainConfig
from cfvlm_ds.evaluation import Accuracy, headline_metric

REMEDY = "add objective.retain (it holds the model near its start), raise objective.align.weight or lower train.learning_rate"


class Retention:
    """Compares what is measured with its first value, and warns where it fell by more than ``train.displacement_warning``."""

    def __init__(self, train: TrainConfig, state: TrainState, say: Callable[[str], object]) -> None:
        self._train, self._state, self._say, self._idle_told = train, state, say, False

    def trained(self, metrics: Mapping[str, float]) -> None:
        """A record of the training."""
        fallen = self._state.displacement(metrics["logp/lp_00"]) if "logp/lp_00" in metrics else 0.0
        if fallen > self._train.displacement_warning:
            self._say(
                f"warning: likelihood displacement: the factual log-likelihood fell {fallen:.2f} nats per token below its start; {REMEDY}"
            )
        if "loss/retain" in metrics and "retain/ratio" not in metrics and not self._idle_told:
            self._idle_told = True
            self._say(
                "warning: objective.retain has found no row in which nothing is false; add plain captions to data.train, or set "
                "objective.retain.rows to all"
            )

    def evaluated(self, results: Mapping[str, Sequence[Accuracy]]) -> dict[str, float]:
        """An evaluation; returns by how much each set of ``train.retention`` has changed since the first one: nats per token, points."""
        changes: dict[str, float] = {}
        for split in self._train.retention or ():
            if not (rows := results.get(split)):
                continue
            whole, metric = rows[-1], headline_metric(rows)
            measured = {} if whole.nll is None else {"nll": whole.nll}
            measured |= {} if metric is None else {"accuracy": whole.metrics[metric]}
            start = self._state.kept(split, measured)
            found = {name: value - start[name] for name, value in measured.items() if name in start}
            changes |= {f"retention/{split}/{name}": change for name, change in found.items()}
            if (risen := found.get("nll", 0.0)) > self._train.displacement_warning:
                self._say(
                    f"warning: retention: true texts of data.evaluation.{split} lost {risen:.2f} nats per token since the start; {REMEDY}"
                )
        return changes
