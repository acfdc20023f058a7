"""What a training must not cost: the likelihood of factual texts while it trains, and held-out sets that it is not about.

Margins can be won by making everything less likely (likelihood displacement, arXiv 2410.08847), and a model that learns one kind of edit
may forget captions, or other kinds. The sets of ``train.retention`` are evaluated before the first step and whenever the run evaluates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from cfvlm_ds.checkpoint import TrainState
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.data.identity import Identity, digest
from cfvlm_ds.evaluation import Accuracy, headline_metric


class Retention:
    """Compares what is measured with its first value, and warns where it fell by more than ``train.displacement_warning``.

    ``identities`` are those of the evaluation sets: one that a continued run reads with other contents is compared from there on.
    """

    def __init__(self, config: RunConfig, state: TrainState, identities: Mapping[str, Identity], say: Callable[[str], object]) -> None:
        self._train, self._state, self._say = config.train, state, say
        self._data = {split: digest(identities[split]) for split in config.train.retention or ()}
        held = (
            "raise objective.retain.weight"
            if "retain" in config.objective
            else "add objective.retain (it holds the model near its start on plain captions among the training data)"
        )
        self._remedy = f"{held}, raise objective.align.weight or lower train.learning_rate"

    def trained(self, metrics: Mapping[str, float]) -> None:
        """A record of the training."""
        fallen = self._state.displacement(metrics["logp/lp_00"]) if "logp/lp_00" in metrics else 0.0
        if fallen > self._train.displacement_warning:
            self._say(
                f"warning: likelihood displacement: the factual log-likelihood fell {fallen:.2f} nats per token below its start; "
                f"{self._remedy}"
            )

    def evaluated(self, results: Mapping[str, Sequence[Accuracy]]) -> dict[str, float]:
        """An evaluation; returns by how much each set of ``train.retention`` has changed since the first one: nats per token, points."""
        changes: dict[str, float] = {}
        for split, data in self._data.items():
            if not (rows := results.get(split)):
                continue
            whole, metric = rows[-1], headline_metric(rows)
            measured = {} if whole.nll is None else {"nll": whole.nll}
            measured |= {} if metric is None else {"accuracy": whole.metrics[metric]}
            start, new = self._state.kept(split, data, measured)
            if new and start["step"]:
                self._say(
                    f"retention: data.evaluation.{split}, as it is now, was not evaluated at the start; it is compared with step "
                    f"{start['step']} from here on"
                )
            found = {name: value - start[name] for name, value in measured.items() if name in start}
            changes |= {f"retention/{split}/{name}": change for name, change in found.items()}
            if (risen := found.get("nll", 0.0)) > self._train.displacement_warning:
                since = f"step {start['step']}" if start["step"] else "the start"
                self._say(
                    f"warning: retention: true texts of data.evaluation.{split} lost {risen:.2f} nats per token since {since}; "
                    f"{self._remedy}"
                )
        return changes
