"""Likelihood displacement (arXiv 2410.08847): a model can increase its margins by making every text less likely."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cfvlm_ds.checkpoint import TrainState
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.progress import Say


@dataclass
class Displacement:
    """Monitor that warns if the factual log-likelihood falls by more than ``train.displacement_warning`` below its first value."""

    config: RunConfig
    state: TrainState
    say: Say
    warned: float = 0.0

    def recorded(self, metrics: Mapping[str, float]) -> None:
        """Check a training record, and warn if the likelihood has dropped too far. The warning is repeated only if the drop has doubled
        since.
        """
        if (warning := self.warning(metrics)) and (fallen := self._fallen(metrics)) > 2 * self.warned:
            self.warned = fallen
            self.say(warning)

    def warning(self, metrics: Mapping[str, float]) -> str:
        """Return a warning if a training record's factual log-likelihood is too far below its first value, otherwise ""."""
        if (fallen := self._fallen(metrics)) <= self.config.train.displacement_warning:
            return ""
        advice = (
            "raise objective.retain.weight"
            if "retain" in self.config.objective
            else "add objective.retain (it keeps the model close to its initial state on plain captions in the training data)"
        )
        return (
            f"warning: likelihood displacement: the factual log-likelihood fell {fallen:.2f} nats per token below its initial value; "
            f"{advice}, raise objective.align.weight or lower train.learning_rate"
        )

    def _fallen(self, metrics: Mapping[str, float]) -> float:
        return self.state.displacement(metrics["logp/lp_00"]) if "logp/lp_00" in metrics else 0.0
