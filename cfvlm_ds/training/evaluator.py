"""Evaluation within a run. All splits and benchmarks are scored with the training engine. If one rank votes to stop, all ranks stop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from cfvlm_ds.batching.batch import Batch, blank_view
from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.cluster.signals import Stop, StopRequested, reason, together, worker_deaths
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.distributed import World, gather_objects
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.groups import Groups
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.evaluation import Accuracy, Batching, GroupScores, evaluate, metric_names, rehearse, score_groups
from cfvlm_ds.evaluation.asking import written
from cfvlm_ds.evaluation.benchmarks import Outcome
from cfvlm_ds.evaluation.generation import write
from cfvlm_ds.evaluation.probes import Generate
from cfvlm_ds.evaluation.suite.item_check import token_lengths
from cfvlm_ds.models import adapters_off, only_adapters_train
from cfvlm_ds.training.benchmarks import Benchmarks, RunBenchmark, benchmark_names

Splits = Mapping[str, Groups]
Accuracies = Mapping[str, Sequence[Accuracy]]
"""Name of an evaluation set -> its accuracies: one row per edit type, then their mean."""


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a run's splits and benchmarks with the same token limit as in training."""

    config: RunConfig
    world: World
    engine: Any
    collator: Collator
    splits: Splits
    benchmarks: Benchmarks
    stop: Stop

    def __call__(self, splits: Splits) -> tuple[dict[str, list[Accuracy]], dict[str, Sequence[GroupScores]]]:
        """Evaluate sets of groups, and return the accuracies and scores, each keyed by set.

        Raises StopRequested on all ranks if any rank votes to stop, and WorkerLost on the rank that has lost a data worker.
        """
        with self._evaluating():
            return evaluate(
                self.engine,
                self.collator,
                splits,
                self.world,
                self._batching(),
                objectives=self.config.objective,
                reference=self._reference if only_adapters_train(self.config.model) else None,
            )

    def ask(self) -> dict[str, list[Outcome]]:
        """Evaluate the benchmarks, and return their items' outcomes, keyed by benchmark. Raises the same errors as ``__call__``."""
        outcomes = {}
        with self._evaluating():
            for name, benchmark in self.benchmarks.items():
                if isinstance(benchmark.chosen.way, Generate):
                    outcomes[name] = self._written(name, benchmark, benchmark.chosen.way)
                    continue
                groups, batching = benchmark.plan.groups, self._batching()
                scores = score_groups(self.engine, self.collator, groups, self.world, batching, f"evaluating {name}")
                outcomes[name] = benchmark.plan.outcomes(scores, token_lengths(self.collator))
        return outcomes

    def _written(self, name: str, benchmark: RunBenchmark, way: Generate) -> list[Outcome]:
        """Return the outcomes of items that the model answers with generated text. Each rank generates a share of the distinct answers."""
        items = benchmark.plan.items
        views = [(item, (*item.images, blank_view(len(item.images[0])))) for item in items]
        asked = dict.fromkeys((shown, way.asked(item)) for item, seen in views for shown in seen)
        texts, every = list[str](), list(asked)
        progress = Progress(self.world.say, f"evaluating {name}", len(every), "texts")
        for start in range(0, len(every), self.world.size):
            self._vote()
            shown, prompt = every[min(start + self.world.rank, len(every) - 1)]  # all ranks generate the same number of texts
            options = {"do_sample": False, "synced_gpus": self.world.size > 1}
            model, device = self.engine.module.model, self.world.device
            text = write(model, self.collator, device, shown, prompt, way.max_new_tokens, **options)
            texts += gather_objects(text, self.world)
            progress.advance(min(self.world.size, len(every) - start))
        said: dict[Any, Any] = dict(zip(every, texts, strict=False))
        outcomes = []
        for item, seen in views:
            *answers, blank = (said[shown, way.asked(item)] for shown in seen)
            outcomes.append(written(item, answers, blank, benchmark.chosen.read))
        return outcomes

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.engine.eval()
        hook = self.engine.register_forward_pre_hook(self._vote)  # every rank runs the same number of forward passes
        try:
            with together(), worker_deaths():
                yield
        finally:
            hook.remove()
            self.engine.train()

    def _reference(self, batch: Batch) -> Tensor:
        """Return a batch's scores [G, I, C] in nats under the model without its adapters."""
        with adapters_off(self.engine.module.model):
            return batch.scores(self.engine(**batch.model_inputs)).logp

    def rehearse(self) -> None:
        """Run the largest evaluation batch, so that an out-of-memory error occurs before the first step instead of after training."""
        self.engine.eval()
        splits = {**self.splits, **{name: benchmark.plan.groups for name, benchmark in self.benchmarks.items()}}
        rehearse(self.engine, self.collator, splits, self.world, self._batching())
        self.engine.train()

    def _vote(self, *arguments: Any) -> None:
        votes = self.stop.votes().to(self.world.device)
        dist.all_reduce(votes)
        if (why := reason(votes.tolist())) is not None:
            raise StopRequested(why)

    def _batching(self) -> Batching:
        data, size = self.config.data, self.config.train.per_device_eval_batch_size
        limit = data.max_tokens_per_forward or data.max_tokens_per_micro_batch
        remedy = (
            f"lower train.per_device_eval_batch_size ({size}), set a lower data.max_tokens_per_forward (now {limit or 'none'}) or limits "
            "on visual tokens (model.max_pixels, model.max_tiles)"
        )
        return Batching(size, limit, data.workers, remedy)


def check_best(config: RunConfig, splits: Splits, benchmarks: Benchmarks) -> None:
    """Raise ConfigError if train.save_best names a metric that evaluating this run's data cannot produce."""
    name = config.train.save_best
    if name is not None and name not in (known := metric_names(splits) | benchmark_names(benchmarks)):
        raise ConfigError(
            f"train.save_best {name!r} is not a metric of data.evaluation, or its groups have no comparison for it; leave it unset, or use "
            f"one of: {', '.join(sorted(known)) or 'none'}"
        )
