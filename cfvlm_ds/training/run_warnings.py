"""Warnings during training: options that have little or no effect with the run's data, and likelihood displacement (arXiv 2410.08847), in
which a model increases its margins by making every text less likely.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from cfvlm_ds.checkpoint import TrainState
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.progress import Say
from cfvlm_ds.objectives import batch_terms

_LACKS = {
    "retain": ("retain/ratio", "no group without false cells", "add plain captions to data.train, or set objective.retain.rows to all"),
    "symmpo": ("symmpo/accuracy", "no counterfactual image with a text of its own", "without one, the term is dpo with an anchor"),
    "misp": ("misp/accuracy", "no image that the factual text is false of", "without one, the term is dpo"),
}
"""Term -> (metric that is logged only if the data suit the term, what the data lack otherwise, remedy)."""


@dataclass(frozen=True)
class Idle:
    """Detects options that have no effect, and warns about each of them once."""

    config: RunConfig
    say: Say
    warned: set[str] = field(default_factory=set)

    def recorded(self, metrics: Mapping[str, float]) -> None:
        """Check a training record's metrics, and print a warning for each ineffective option that has not been reported yet."""
        for option, why in self._findings(metrics):
            if option not in self.warned:
                self.say(f"warning: {option} {why}")
            self.warned.add(option)

    def _findings(self, metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        for term, (metric, lack, remedy) in _LACKS.items():
            if term in self.config.objective and metric not in metrics:
                yield f"objective.{term}", f"found {lack} in the steps of this record; {remedy}"
        for term in ("contrast_distill", "sham"):
            if term in self.config.objective and f"loss/{term}" not in metrics:
                yield f"objective.{term}", "found no text to compare on two images in the steps of this record; see docs/objectives.md"
        for term, requested in batch_terms(self.config.objective).items():
            if (available := metrics.get(f"{term}/texts")) is not None and 2 * available < requested:
                yield (
                    f"objective.{term}.texts",
                    f"requests {requested} texts per image, but a step has only {available:.1f}: its other groups have no more texts that "
                    "answer the same prompt and may count as false; use larger steps, or request fewer texts",
                )
        if "hard_negatives/proposed" in metrics and metrics["hard_negatives/proposed"] == metrics["hard_negatives/entered"]:
            yield (
                "train.hard_negatives",
                f"{self.config.train.hard_negatives} left nothing out in the steps of this record, because no group with a single prompt "
                "has more counterfactuals; each step still runs the additional forward",
            )


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
