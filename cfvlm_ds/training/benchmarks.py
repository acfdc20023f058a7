"""Benchmarks that a run uses as evaluation sets. They are read and checked before the first step, and scored by the training engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.data_config import EvaluationSet
from cfvlm_ds.core.distributed import ProgressBarrier, World, run_on_rank0
from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.progress import Alive, Say
from cfvlm_ds.data.picture_index import PictureTable
from cfvlm_ds.evaluation.asking import Plan, plan
from cfvlm_ds.evaluation.benchmarks import Outcome, results
from cfvlm_ds.evaluation.benchmarks.base import Values, tied
from cfvlm_ds.evaluation.generation import writing_digest
from cfvlm_ds.evaluation.suite.bootstrap import drawn_together
from cfvlm_ds.evaluation.suite.comparing import compare_results, comparison_table
from cfvlm_ds.evaluation.suite.item_check import checked_items, prompt_of
from cfvlm_ds.evaluation.suite.results import Result, result_folder, result_of, write_result
from cfvlm_ds.evaluation.suite.selection import Chosen, choose, load_items, refuse_problems
from cfvlm_ds.evaluation.suite.tables import logged, number
from cfvlm_ds.models import adapter_fingerprint, fingerprint, only_adapters_train

FOLDER = "benchmarks"
"""Subfolder of the run folder for benchmark results, in the format that `cfvlm-ds compare` reads."""
BEFORE = "baseline/benchmarks"
"""Subfolder for benchmark results from before the first step, written if train.eval_on_start is true."""


@dataclass(frozen=True)
class RunBenchmark:
    """A benchmark on which a run evaluates its model.

    ``plan`` holds the groups to score, ``identity`` is a fingerprint of the items, and ``prompt`` is the first item's prompt.
    """

    chosen: Chosen
    plan: Plan
    identity: Mapping[str, Any]
    notes: tuple[str, ...]
    own_files: bool
    prompt: str
    pictures: PictureTable


Benchmarks = Mapping[str, RunBenchmark]
"""Name of an evaluation set -> its benchmark."""
_REMEDY = "remove that evaluation set, or correct its files"
Outcomes = Mapping[str, Sequence[Outcome]]
"""Name of an evaluation set -> outcomes of its items."""


def chosen_of(name: str, evaluation_set: EvaluationSet) -> Chosen:
    """Return an evaluation set's benchmark and probe (the form of its questions). Raises ConfigError if either does not exist."""
    try:
        (chosen,) = choose(
            [str(evaluation_set.benchmark)], Path(str(evaluation_set.root)), [evaluation_set.probe] if evaluation_set.probe else []
        )
    except ConfigError as error:
        raise ConfigError(f"data.evaluation.{name}: {error}") from error
    return chosen


def read_benchmarks(config: RunConfig, world: World, collator: Collator) -> dict[str, RunBenchmark]:
    """Read the items of the benchmarks in data.evaluation. Every rank must call this.

    Raises DataError for the first item that the model cannot process.
    """
    benchmarks = {}
    for name, each in config.data.benchmark_sets.items():
        chosen = chosen_of(name, each)
        label, load = f"data.evaluation.{name}", partial(load_items, chosen, world.say, limit=each.limit, remedy=_REMEDY)
        loaded = run_on_rank0(world, load, ProgressBarrier(world))
        checked = checked_items(loaded.items, chosen.way, collator, world, label)
        refuse_problems(label, [why for _, why in checked.left_out], len(loaded.items), remedy=_REMEDY)
        scoring_plan = plan(checked.items, chosen.way)
        world.say(
            f"{chosen.root}: {len(checked.items)} items of {chosen.benchmark.title}, probe {chosen.label}, in "
            f"{len(scoring_plan.groups)} groups"
        )
        prompt = prompt_of(checked.items[0], chosen.way, collator)
        benchmarks[name] = RunBenchmark(chosen, scoring_plan, checked.identity(), loaded.notes, loaded.own_files, prompt, checked.pictures)
    return benchmarks


def benchmark_metrics(benchmarks: Benchmarks, outcomes: Outcomes) -> dict[str, float]:
    """Return the benchmarks' metrics, keyed by the names under which they are logged."""
    flat: dict[str, float] = {}
    for name, outcome in outcomes.items():
        flat |= logged(name, results(benchmarks[name].chosen.benchmark, outcome))
    return flat


def benchmark_names(benchmarks: Benchmarks) -> set[str]:
    """Return the names of the metrics that ``benchmark_metrics`` returns after an evaluation, except metrics on control images."""
    names = set()
    for name, benchmark in benchmarks.items():
        names |= {f"eval/{name}/{metric}" for metric in benchmark.chosen.benchmark.metrics(tied(benchmark.plan.items))}
    return names


def headline_of(benchmark: RunBenchmark, outcomes: Sequence[Outcome]) -> str:
    """Format a benchmark's headline metrics as a line for the progress log. Each metric is followed by its values for the controls."""
    controls = {"blank": "blank image", "random": "random scores"}
    tables, shown = results(benchmark.chosen.benchmark, outcomes), list[str]()
    for metric in benchmark.chosen.benchmark.headlines:
        found = {name: table[metric] for name, table in tables.items() if metric in table}
        beside = ", ".join(f"{said} {number(found[name])}" for name, said in controls.items() if name in found)
        shown.append(f"{metric} {number(found['seen']) if 'seen' in found else 'not known'} ({beside})")
    return ", ".join(shown)


def write_benchmarks(
    folder: Path,
    config: RunConfig,
    benchmarks: Benchmarks,
    outcomes: Outcomes,
    world: World,
    model: Any,
    *,
    exported: bool = False,
    draws: int | None = None,
) -> list[Result]:
    """On rank 0, write every benchmark's results below ``folder`` and return them. Other ranks return an empty list.

    Every rank must call this, because the ``draws`` bootstrap resamples are divided among the ranks. If ``exported`` is True, the weights
    of ``model`` have been exported, and the results include their fingerprint.
    """
    run_dir, drawn, barrier = Path(config.train.output_dir), dict[str, list[Values]](), ProgressBarrier(world)
    for name, items in outcomes.items():
        drawn[name] = drawn_together(world, items, benchmarks[name].chosen.benchmark.metrics, draws, f"evaluating {name}", barrier)
    written = []
    identity = _identity(config, world, barrier.alive) if exported and outcomes and world.is_main else {}
    identity |= {"writing": writing_digest(model)} if identity else {}
    for name, items in outcomes.items() if world.is_main else ():
        benchmark = benchmarks[name]
        settings = {"limit": config.data.benchmark_sets[name].limit}
        header = benchmark.chosen.header(identity, benchmark.identity, settings)
        result = result_of(
            name,
            benchmark.chosen,
            str(run_dir),
            header,
            items,
            drawn[name],
            benchmark.prompt,
            benchmark.notes,
            own_files=benchmark.own_files,
        )
        write_result(result_folder(folder / result.place), result)
        written.append(result)
    return written


def changes_of_benchmarks(run_dir: Path, benchmarks: Benchmarks, say: Say) -> str:
    """Return the section of results.md that compares the benchmarks before and after training, or "" if there are no earlier results."""
    if not benchmarks or not (run_dir / BEFORE).is_dir():
        return ""
    try:
        compared = compare_results(run_dir / BEFORE, run_dir / FOLDER, say=say)
    except (ConfigError, DataError) as error:
        say(f"warning: the benchmarks before and after training are not compared ({error})")
        return ""
    return f"## Benchmarks before and after training\n\n{comparison_table(compared, 'before', 'after')}"


def _identity(config: RunConfig, world: World, alive: Alive) -> dict[str, str]:
    """Return the exported model's fingerprint, as `cfvlm-ds evaluate` computes it for the run folder. Returns {} if the weights cannot be
    read.
    """
    run_dir = Path(config.train.output_dir)
    try:
        if only_adapters_train(config.model):
            return fingerprint(config.model, alive, world.say) | {"adapter": adapter_fingerprint(run_dir / "adapter", alive)}
        return fingerprint(replace(config.model, name_or_path=str(run_dir / "export")), alive, world.say)
    except (OSError, ConfigError) as error:
        world.say(f"warning: the benchmark results do not identify the weights, because these cannot be read ({error})")
        return {}
