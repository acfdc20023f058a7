"""Benchmarks of a run's evaluation: read and checked before the first step, asked with the training engine, written at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cfvlm_ds.batching.collator import Collator, load_collator
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.data_config import EvaluationSet
from cfvlm_ds.core.distributed import ProgressBarrier, World, run_on_rank0
from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.data.picture_index import PictureTable
from cfvlm_ds.evaluation.asking import Plan, plan
from cfvlm_ds.evaluation.benchmarks import Judged, Outcome, results
from cfvlm_ds.evaluation.benchmarks.base import Values
from cfvlm_ds.evaluation.probes import Generate
from cfvlm_ds.evaluation.suite.bootstrap import drawn_together
from cfvlm_ds.evaluation.suite.item_check import checked_items, example_of
from cfvlm_ds.evaluation.suite.results import Result, recorded, result_folder, write_result
from cfvlm_ds.evaluation.suite.selection import Chosen, choose, load_items
from cfvlm_ds.evaluation.suite.tables import logged
from cfvlm_ds.models import adapter_fingerprint, fingerprint, only_adapters_train

FOLDER = "benchmarks"
"""In a run's folder: the results of its benchmarks, as `cfvlm-ds compare` reads them."""


@dataclass(frozen=True)
class RunBenchmark:
    """A benchmark of a run: how it is asked, with an example, the groups that are scored for it, what its items are recognised by, its
    pictures, and the collator of the model that was found able to take it."""

    chosen: Chosen
    plan: Plan
    identity: Mapping[str, Any]
    notes: tuple[str, ...]
    example: Mapping[str, Any]
    pictures: PictureTable
    collator: Collator

    def metrics(self, outcomes: Sequence[Outcome]) -> dict[str, Values]:
        """Table -> metric -> value."""
        return results(self.chosen.benchmark, outcomes)


Outcomes = Mapping[str, Sequence[Outcome]]
"""Name of the evaluation set -> what the model said of its items."""


def chosen_of(name: str, each: EvaluationSet) -> Chosen:
    """How a set is asked. Raises ConfigError for an unknown benchmark, one that is not asked so, and a way that writes text."""
    try:
        (chosen,) = choose([str(each.benchmark)], Path(str(each.root)), [each.probe] if each.probe else [])
    except ConfigError as error:
        raise ConfigError(f"data.evaluation.{name}: {error}") from error
    if isinstance(chosen.way, Generate):
        raise ConfigError(f"data.evaluation.{name}: a training writes no text; name another probe, and evaluate the export by generate")
    return chosen


def read_benchmarks(config: RunConfig, world: World, collator: Collator | None) -> dict[str, RunBenchmark]:
    """The benchmarks of data.evaluation, every item of which the model can be asked; collective. Raises DataError for the first that it
    cannot."""
    found = {}
    for name, each in config.data.benchmark_sets.items():
        collator = collator or load_collator(config.model, "full", config.data.max_pixels)
        chosen = chosen_of(name, each)
        loaded = run_on_rank0(world, partial(load_items, chosen, world.say, limit=each.limit), ProgressBarrier(world))
        checked = checked_items(loaded.items, chosen.way, collator, world, f"data.evaluation.{name}")
        if checked.left_out:
            more = f" ({len(checked.left_out) - 1} more)" if len(checked.left_out) > 1 else ""
            raise DataError(f"data.evaluation.{name}: {checked.left_out[0][1]}{more}; take that data set out, or correct its files")
        asked = plan(checked.items, chosen.way)  # type: ignore[arg-type]
        world.say(
            f"{chosen.root}: {len(checked.items)} items of {chosen.benchmark.title}, asked by {chosen.label} in {len(asked.groups)} groups"
        )
        example = example_of(checked.items[0], chosen.way, collator)
        found[name] = RunBenchmark(chosen, asked, checked.identity(), loaded.notes, example, checked.pictures, collator)
    return found


def benchmark_metrics(benchmarks: Mapping[str, RunBenchmark], outcomes: Outcomes) -> dict[str, float]:
    """The metrics under the names that they are logged by."""
    flat: dict[str, float] = {}
    for name, found in outcomes.items():
        flat |= logged(name, benchmarks[name].metrics(found))
    return flat


def benchmark_names(benchmarks: Mapping[str, RunBenchmark]) -> set[str]:
    """The names that ``benchmark_metrics`` will have for what is seen: known from the items alone."""
    found = set()
    for name, each in benchmarks.items():
        tied = [Judged(item, ((0.0,) * len(item.texts),) * len(item.images)) for item in each.plan.items]
        found |= {f"eval/{name}/{metric}" for metric in each.chosen.benchmark.metrics(tied)}
    return found


def headline_of(benchmark: RunBenchmark, outcomes: Sequence[Outcome]) -> str:
    """A line for a progress log."""
    tables, metric = benchmark.metrics(outcomes), benchmark.chosen.benchmark.headline
    beside = [
        f"{name} {tables[table][metric]:.1f}" for table, name in (("blank", "blank image"), ("chance", "chance")) if metric in tables[table]
    ]
    value = tables["seen"].get(metric)
    return f"{metric} {'not known' if value is None else f'{value:.1f}'} ({', '.join(beside)})"


def write_benchmarks(
    config: RunConfig, benchmarks: Mapping[str, RunBenchmark], outcomes: Outcomes, world: World, exported: bool
) -> list[Result]:
    """Write the results of every benchmark into the run's folder, on rank 0; collective, since ranks share the bootstrap. The results, on
    rank 0. They name the weights where the model is ``exported``, and so on disk."""
    run_dir, drawn, barrier = Path(config.train.output_dir), dict[str, list[Values]](), ProgressBarrier(world)
    for name, found in outcomes.items():
        drawn[name] = drawn_together(world, found, benchmarks[name].chosen.benchmark.metrics, None, f"evaluating {name}", barrier)
    written = []
    identity = _identity(config, world, barrier.alive) if exported and outcomes and world.is_main else {}
    for name, found in outcomes.items() if world.is_main else ():
        each = benchmarks[name]
        model = {"name": str(run_dir), **{part: identity.get(part) for part in ("weights", "inputs", "adapter")}}
        settings = {"shuffled": config.train.eval_shuffled, "limit": config.data.benchmark_sets[name].limit}
        header = each.chosen.header(model, each.identity, settings)
        record = recorded(each.chosen.benchmark, header, found, drawn[name], (), each.notes, **each.example)
        result = Result(name, each.chosen.label, record, tuple(found))
        write_result(result_folder(run_dir / FOLDER / name / each.chosen.label), result)
        written.append(result)
    return written


def _identity(config: RunConfig, world: World, alive: Callable[[], object]) -> dict[str, str]:
    """What the exported model is recognised by, as `cfvlm-ds evaluate` of the run's folder does."""
    run_dir = Path(config.train.output_dir)
    try:
        if only_adapters_train(config.model):
            return fingerprint(config.model, alive, world.say) | {"adapter": adapter_fingerprint(run_dir / "adapter", alive)}
        return fingerprint(replace(config.model, name_or_path=str(run_dir / "export")), alive, world.say)
    except (OSError, ConfigError) as error:
        world.say(f"warning: the results of benchmarks do not name the weights, which cannot be read ({error})")
        return {}
