"""``cfvlm-ds evaluate`` and ``compare``: accuracies of groups and of public benchmarks, and two models on them side by side."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any

from cfvlm_ds.cli.models import joined, load_scorer
from cfvlm_ds.cli.options import Count, ImageLimits, OnError, Reading, Scoring, add_function, model_named, say
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.files import replace
from cfvlm_ds.core.reading import parse_json
from cfvlm_ds.core.untrusted import own_output


def add(commands: Any) -> None:
    """Add the commands to a parser's."""
    add_function(commands, _evaluate)
    commands.choices["evaluate"].usage = "%(prog)s MODEL (MANIFEST ... | --benchmarks NAMES --benchmark_root FOLDER --out FOLDER) [OPTIONS]"
    add_function(commands, _compare)


class _InPlaceOfManifests(argparse.Action):
    """With benchmarks a manifest is not required. Nor is it without, if it may be left out: argparse would then not wait for it where an
    option stands between it and the model."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, values)
        for action in parser._actions:
            if action.dest == "manifest":
                action.nargs, action.required = "*", False


Names = Annotated[str, ("action", _InPlaceOfManifests), ("metavar", "NAMES")]


@dataclass(frozen=True)
class Asking:
    """How benchmarks are asked.

    Args:
        benchmarks: names of public benchmarks, or of your own, joined by commas, in place of manifests.
        benchmark_root: folder with a folder of official files for each of them.
        probes: NAME or NAME:OPTION=VALUE, such as match caption:mode=pmi; each asks the benchmarks that it fits, by default each one's own.
        on_error: what comes of an item of a benchmark that cannot be asked: error, or skip it, counted and named.
        draws: draws of the bootstrap; 0 for no intervals, by default 1000, fewer of benchmarks of over 10,000 items.
        num_workers: processes that prepare batches of a benchmark, per rank, by default spare cores.
        experiment: also send the metrics of benchmarks to MLflow, to the server of MLFLOW_TRACKING_URI, or to mlflow.db in the folder OUT.
    """

    benchmarks: Names | None = None
    benchmark_root: str | None = None
    probes: list[str] | None = None
    on_error: OnError = "error"
    draws: Count | None = None
    num_workers: Count | None = None
    experiment: str | None = None


def _evaluate(
    model: str,
    manifest: list[str],
    *,
    out: str | None = None,
    scoring: Scoring,
    no_shuffled: bool = False,
    asking: Asking,
    reading: Reading,
    limits: ImageLimits,
) -> None:
    """Measure accuracies by edit type, with rows for chance and for what language alone achieves; or accuracies of public benchmarks:
    cfvlm-ds evaluate runs/mine --benchmarks pope,mmvp --benchmark_root /data/benchmarks --out results

    Example: cfvlm-ds evaluate runs/quickstart/export runs/quickstart/scenes/test_iid.jsonl

    Args:
        model: model folder or hub name, run folder, or folder of adapters.
        manifest: groups to evaluate; or --benchmarks in their place.
        out: JSON file to write, with --benchmarks a folder.
        no_shuffled: leave out the row of another group's image, which costs one more image and its texts per group.
    """
    if asking.benchmarks is not None and manifest:
        raise ConfigError(f"evaluate is given both {manifest[0]} and --benchmarks; give manifests, or benchmarks")
    if asking.benchmarks is not None:
        more: dict[str, Any] = {"shuffled": not no_shuffled, "scoring": scoring, "limits": limits, "max_pixels": reading.max_pixels}
        _ask(model, asking, out, **more)
        return
    if given := [name for name, value in vars(asking).items() if value != getattr(Asking, name)]:
        raise ConfigError(f"--{given[0]} is of --benchmarks, and a manifest is evaluated; leave it out")
    from cfvlm_ds.data import named_apart, sound_groups
    from cfvlm_ds.evaluation import evaluate, table

    manifests = named_apart(manifest)
    if out:
        of_run = (Path(out).parent / "config.yaml").is_file()  # whose own results.json has the same form
        own_output(Path(out), lambda file: not of_run and _is_evaluated(file), "evaluate", *manifests.values())
    splits = {name: sound_groups(path, reading.root, reading.format, scoring.limit, say) for name, path in manifests.items()}
    scorer, collator, world = load_scorer(*model_named(model, limits), max_pixels=reading.max_pixels, zero3=scoring.zero3)
    batches: dict[str, Any] = {"batch_size": scoring.batch_size, "max_tokens": scoring.max_tokens_per_forward, "remedy": scoring.remedy}
    results, _ = evaluate(scorer, collator, splits, world, shuffled=not no_shuffled, **batches)
    if world.is_main:
        print(table(results))
    if out and world.is_main:
        found = {split: [vars(row) for row in rows] for split, rows in results.items()}
        replace(Path(out), json.dumps(found, indent=1).encode())


def _is_evaluated(file: IO[bytes]) -> bool:
    """Whether a file has tables of accuracies by split, and nothing else."""
    found = parse_json(file.read().decode())
    return bool(found) and all(row.keys() >= {"name", "num", "metrics"} for rows in found.values() for row in rows)


def _ask(name: str, asking: Asking, out: str | None, *, shuffled: bool, scoring: Scoring, limits: ImageLimits, max_pixels: int) -> None:
    """Ask a model benchmarks; every rank runs it. Nothing is loaded before the benchmarks' files are read."""
    for option, value in (("benchmark_root", asking.benchmark_root), ("out", out)):
        if not value:
            raise ConfigError(f"--benchmarks needs --{option}, a folder; add it")
    root, folder = Path(str(asking.benchmark_root)), Path(str(out))
    if folder.resolve() == root.resolve():
        raise ConfigError(f"--out {out} is the folder of the benchmarks, whose files results would lie among; name another one")
    from cfvlm_ds.core.distributed import Patience, agreed, default_workers
    from cfvlm_ds.evaluation.suite.asked import MAX_TOKENS, Settings, evaluate_benchmarks, results_held
    from cfvlm_ds.evaluation.suite.chosen import choose, load_items
    from cfvlm_ds.evaluation.suite.tables import omissions, overview, summary
    from cfvlm_ds.models import adapter_fingerprint, fingerprint

    probes = [part for spec in asking.probes or () for part in ([spec] if ":" in spec else spec.split(",")) if part]
    chosen = choose([each.strip() for each in str(asking.benchmarks).split(",") if each.strip()], root, probes)
    model, adapter = model_named(name, limits)
    world, skip = joined(scoring.zero3), asking.on_error == "skip"
    with results_held(folder, world):
        patience = Patience(world)

        def identity() -> dict[str, str]:
            found = fingerprint(model, patience.alive, world.say)
            return found if adapter is None else found | {"adapter": adapter_fingerprint(adapter, patience.alive)}

        loaded = {
            each.name: agreed(world, partial(load_items, each, world.say, limit=scoring.limit, skip=skip), patience)
            for each in {each.name: each for each in chosen}.values()
        }
        weights = agreed(world, identity, patience)
        scorer, collator, world = load_scorer(model, adapter, max_pixels=max_pixels, world=world, zero3=scoring.zero3)
        settings = Settings(
            batch_size=scoring.batch_size,
            max_tokens=scoring.max_tokens_per_forward or MAX_TOKENS,
            num_workers=default_workers() if asking.num_workers is None else asking.num_workers,
            shuffled=shuffled,
            skip=skip,
            draws=asking.draws,
            remedy=scoring.remedy.replace("set --max_tokens", "lower --max_tokens"),
        )
        asked = _asked(name, scoring.zero3, scorer, collator, world, weights)
        results = evaluate_benchmarks(asked, [(each, loaded[each.name]) for each in chosen], folder, settings)
        if asking.experiment and world.is_main:
            track(asking.experiment, results, folder)
    if world.is_main:
        print("\n".join([overview(results), "", *map(summary, results), *(line for each in results for line in omissions(each))]))
        print(f"wrote {folder / 'results.md'}")


_DELIVERED_WITHIN_S = 300.0  # MLflow is imported then, and makes its database


def track(experiment: str, asked: Sequence[Any], out: Path) -> None:
    """Send what a folder of results holds, of which some was ``asked`` now, to MLflow, under the names that a training's have; what cannot
    be delivered waits in the folder.

    A folder is one run of an experiment, however often it is evaluated into: what is new, or has another value, is added to it.
    """
    from cfvlm_ds.core.secrets import without_secrets
    from cfvlm_ds.evaluation.benchmarks import BENCHMARKS
    from cfvlm_ds.evaluation.suite.tables import logged
    from cfvlm_ds.evaluation.suite.written import RESULTS, read_results
    from cfvlm_ds.tracking import going_on, open_tracker

    results, metrics = read_results(out), dict[str, float]()
    for each in results:
        usual = each.name not in BENCHMARKS or each.label == BENCHMARKS[each.name].probes[0]  # no later way renames what was logged
        metrics |= logged(each.called if usual else each.place, each.metrics)
    before, step = going_on(out, experiment) or ({}, None)
    others = {name: value for name, value in metrics.items() if name in before and before[name] != value}
    added = {name: value for name, value in metrics.items() if name not in before}
    record = asked[0].record
    params = {"model": record["model"], "settings": record["settings"]}
    tags = {"benchmarks": ", ".join(each.place for each in results), "cfvlm_ds": record["versions"]["cfvlm-ds"]}
    tags |= {"mlflow.source.name": "cfvlm-ds evaluate", "mlflow.source.type": "LOCAL"}
    options: dict[str, Any] = {"close_timeout": _DELIVERED_WITHIN_S, "resume_step": None if step is None else max(step, 0)}
    with open_tracker(True, out, experiment, without_secrets(out.resolve().name), params, tags, **options) as tracker:
        if added or others:
            tracker.log(max(step or 0, 0) + bool(others), added | others)
        for each in results:
            tracker.artifact(out / each.place / RESULTS, each.place)
        tracker.artifact(out / "results.md")


def _asked(name: str, zero3: bool, scorer: Any, collator: Any, world: Any, identity: Mapping[str, str]) -> Any:
    from cfvlm_ds.evaluation.generation import write, writing_digest
    from cfvlm_ds.evaluation.suite.asked import Asked
    from cfvlm_ds.models import attention

    dtype = scorer.model.dtype
    precision = {
        "dtype": str(dtype).removeprefix("torch."),
        "device": world.device.type,
        "attention": attention("auto", scorer.model.config, dtype),
    }
    writing = None if zero3 else partial(write, scorer.model, collator, world.device, do_sample=False, num_beams=1)
    if writing is not None:
        identity = {**identity, "writing": writing_digest(scorer.model)}
    return Asked(scorer, collator, world, name, identity, precision, writing)


def _compare(before: str, after: str, *, draws: Count | None = None) -> None:
    """Put two folders of results side by side: differences with intervals, and what got better and worse.

    Example: cfvlm-ds compare results/base results/tuned

    Args:
        before: folder that `cfvlm-ds evaluate --benchmarks` wrote.
        after: another one.
        draws: exchanges of the two models' answers that are drawn, by default as draws of evaluate.
    """
    from cfvlm_ds.evaluation.suite.comparing import compare_results, comparison_table

    print(comparison_table(compare_results(Path(before), Path(after), draws, say), before, after))
