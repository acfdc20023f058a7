"""What a training must not cost: the likelihood of factual texts while it trains, and held-out sets that it is not about.

Margins can be won by making everything less likely (likelihood displacement, arXiv 2410.08847), and a model that learns one kind of edit
may forget captions, or other kinds. The sets of ``train.retention`` are evaluated before the first step and whenever the run evaluates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cfvlm_ds.checkpoint import TrainState
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.data.identity import Identity, changes
from cfvlm_ds.evaluation import Accuracy, headline_metric


class Retention:
    """Compares what is measured with its first value, and warns where it fell by more than ``train.displacement_warning``.

    ``identities`` are those of the evaluation sets: one that has changed is compared with its first evaluation since.
    """

    def __init__(self, config: RunConfig, state: TrainState, identities: Mapping[str, Identity], say: Callable[[str], object]) -> None:
        self._train, self._state, self._say, self._identities = config.train, state, say, identities
        held = (
            "raise objective.retain.weight"
            if "retain" in config.objective
            else "add objective.retain (it holds the model near its start on plain captions among the training data)"
        )
        self._warned = 0.0
        self._remedy = f"{held}, raise objective.align.weight or lower train.learning_rate"

    def trained(self, metrics: Mapping[str, float]) -> None:
        """A record of the training. Said again only of a fall that is twice the last one, not of every record of a hollow."""
        fallen = self._state.displacement(metrics["logp/lp_00"]) if "logp/lp_00" in metrics else 0.0
        if fallen > max(self._train.displacement_warning, 2 * self._warned):
            self._warned = fallen
            self._say(
                f"warning: likelihood displacement: the factual log-likelihood fell {fallen:.2f} nats per token below its start; "
                f"{self._remedy}"
            )

    def evaluated(self, results: Mapping[str, Sequence[Accuracy]]) -> dict[str, float]:
        """An evaluation; returns by how much each set of ``train.retention`` has changed since the first one: nats per token, points."""
        changed: dict[str, float] = {}
        for split in self._train.retention or ():
            if not (rows := results.get(split)):
                continue
            whole, metric = rows[-1], headline_metric(rows)
            measured = {} if whole.nll is None else {"nll": whole.nll}
            measured |= {} if metric is None else {"accuracy": whole.metrics[metric]}
            start = self._start(split, measured)
            found = {name: value - start[name] for name, value in measured.items() if name in start}
            changed |= {f"retention/{split}/{name}": change for name, change in found.items()}
            if (risen := found.get("nll", 0.0)) > self._train.displacement_warning:
                since = f"step {start['step']}" if start["step"] else "the start"
                self._say(
                    f"warning: retention: true texts of data.evaluation.{split} lost {risen:.2f} nats per token since {since}; "
                    f"{self._remedy}"
                )
        return changed

    def _start(self, split: str, measured: Mapping[str, float]) -> Mapping[str, Any]:
        """What a set is compared with: its first evaluation, with the ``step`` of it. In a continued run that may be the present one."""
        start, data = self._state.retained.get(split), self._identities[split]
        what = None if start is None else changes(start["data"], data)
        if start is not None and what is None:
            return start
        if start is not None or self._state.step:
            why = "was not evaluated at the start" if what is None else f"has other contents since ({what})"
            self._say(f"retention: data.evaluation.{split} {why}; it is compared with step {self._state.step} from here on")
        return self._state.keep(split, data, measured)
