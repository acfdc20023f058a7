"""``cfvlm-ds evaluate`` and ``compare``: commands that measure accuracies on groups and public benchmarks, and compare models."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any

from cfvlm_ds.cli.models import joined, load_scorer
from cfvlm_ds.cli.options import Count, ImageLimits, OnError, Reading, Scoring, add_function, model_named, say
from cfvlm_ds.core.errors import ConfigError, writing
from cfvlm_ds.core.files import replace
from cfvlm_ds.core.reading import parse_json
from cfvlm_ds.core.text import in_cell
from cfvlm_ds.core.untrusted import own_output, refuse_filled


def add(commands: Any) -> None:
    """Register ``evaluate`` and ``compare``."""
    add_function(commands, _evaluate)
    commands.choices["evaluate"].usage = "%(prog)s MODEL (MANIFEST ... | --benchmarks NAMES --benchmark_root FOLDER --out FOLDER) [OPTIONS]"
    add_function(commands, _compare)


class _InPlaceOfManifests(argparse.Action):
    """An argparse action for --benchmarks that makes the manifest optional.

    Without --benchmarks, the manifest is required: argparse does not accept options between the model and an optional manifest.
    """

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, values)
        for action in parser._actions:
            if action.dest == "manifest":
                action.nargs, action.required = "*", False


Names = Annotated[str, ("action", _InPlaceOfManifests), ("metavar", "NAMES")]


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options for evaluation on benchmarks.

    Args:
        benchmarks: comma-separated names of public or user-defined benchmarks, instead of manifests.
        benchmark_root: folder with one subfolder of official files per benchmark.
        probes: one or more probes (ways to ask the benchmarks' questions), each NAME or NAME:OPTION=VALUE, such as `match` or
            `caption:mode=pmi`. Each is applied to every benchmark that supports it. By default, each benchmark uses its own probe.
        on_error: with skip, leave out benchmark items that the model cannot process, and report their number and names.
        draws: number of bootstrap resamples for the confidence intervals; 0 for no intervals. The default is 1000, or fewer for benchmarks
            with more than 10,000 items.
        num_workers: number of processes per rank that prepare batches; by default, one per spare core.
    """

    benchmarks: Names | None = None
    benchmark_root: str | None = None
    probes: list[str] | None = None
    on_error: OnError = "error"
    draws: Count | None = None
    num_workers: Count | None = None


def _evaluate(
    model: str,
    manifest: list[str],
    *,
    out: str | None = None,
    scoring: Scoring,
    benchmark_options: BenchmarkOptions,
    reading: Reading,
    limits: ImageLimits,
) -> None:
    """Measure accuracies by edit type. Control rows show the accuracies of random scores and of the language prior. To evaluate on public
    benchmarks: cfvlm-ds evaluate runs/mine --benchmarks pope,mmvp --benchmark_root /data/benchmarks --out results

    Example: cfvlm-ds evaluate runs/quickstart/export runs/quickstart/world/test_combo.jsonl

    Args:
        model: model folder or hub name, run folder, or folder of adapters.
        manifest: groups to evaluate, unless --benchmarks is given.
        out: JSON file to write; with --benchmarks, a folder.
    """
    if benchmark_options.benchmarks is not None and manifest:
        raise ConfigError(f"evaluate takes manifests or --benchmarks, not both; leave out {manifest[0]} or --benchmarks")
    if benchmark_options.benchmarks is not None:
        _evaluate_benchmarks(model, benchmark_options, out, scoring=scoring, limits=limits, max_pixels=reading.max_pixels)
        return
    if unusable := [name for name, value in vars(benchmark_options).items() if value != getattr(BenchmarkOptions, name)]:
        raise ConfigError(f"--{unusable[0]} applies only to --benchmarks; leave it out")
    from cfvlm_ds.data import named_apart, sound_groups
    from cfvlm_ds.evaluation import Batching, evaluate, table

    manifests = named_apart(manifest)
    if out:
        of_run = (Path(out).parent / "config.yaml").is_file()  # a run's results.json has the same form
        own_output(Path(out), lambda file: not of_run and _is_evaluated(file), "evaluate", *manifests.values())
    splits = {name: sound_groups(path, reading.root, reading.format, scoring.limit, say) for name, path in manifests.items()}
    scorer, collator, world = load_scorer(*model_named(model, limits), max_pixels=reading.max_pixels, zero3=scoring.zero3)
    batching = Batching(scoring.batch_size, scoring.max_tokens_per_forward, remedy=scoring.remedy)
    results, _ = evaluate(scorer, collator, splits, world, batching)
    if world.is_main:
        print(table(results))
    if out and world.is_main:
        tables = {split: [vars(row) for row in rows] for split, rows in results.items()}
        replace(Path(out), json.dumps(tables, indent=1).encode())


def _is_evaluated(file: IO[bytes]) -> bool:
    """Return whether a file has the format of `evaluate --out`: accuracy tables, one list of rows per split."""
    tables = parse_json(file.read().decode())
    return bool(tables) and all(row.keys() >= {"name", "num", "metrics"} for rows in tables.values() for row in rows)


def _evaluate_benchmarks(
    name: str, options: BenchmarkOptions, out: str | None, *, scoring: Scoring, limits: ImageLimits, max_pixels: int
) -> None:
    """Evaluate a model on benchmarks and print a summary. All ranks must call this. Errors in the benchmarks' files are raised before the
    model is loaded.
    """
    for option, value in (("benchmark_root", options.benchmark_root), ("out", out)):
        if not value:
            raise ConfigError(f"--benchmarks needs --{option}, a folder; add it")
    root, folder = Path(str(options.benchmark_root)), Path(str(out))
    if folder.resolve() == root.resolve():
        raise ConfigError(f"--out {out} is the folder of the benchmarks; name another one")
    from cfvlm_ds.core.distributed import ProgressBarrier, run_on_rank0
    from cfvlm_ds.core.ranks import default_workers
    from cfvlm_ds.demo.habits.writing import register
    from cfvlm_ds.evaluation.suite.runner import MAX_TOKENS, Settings, evaluate_benchmarks, results_held
    from cfvlm_ds.evaluation.suite.selection import choose, load_items
    from cfvlm_ds.evaluation.suite.tables import omissions, overview, summary
    from cfvlm_ds.models import adapter_fingerprint, fingerprint

    register()
    probes = [part for spec in options.probes or () for part in ([spec] if ":" in spec else spec.split(",")) if part]
    chosen = choose([each.strip() for each in str(options.benchmarks).split(",") if each.strip()], root, probes)
    model, adapter = model_named(name, limits)
    world, skip = joined(scoring.zero3), options.on_error == "skip"
    with results_held(folder, world):
        barrier = ProgressBarrier(world)

        def identity() -> dict[str, str]:
            hashes = fingerprint(model, barrier.alive, world.say)
            return hashes if adapter is None else hashes | {"adapter": adapter_fingerprint(adapter, barrier.alive)}

        loaded = {
            each.name: run_on_rank0(world, partial(load_items, each, world.say, limit=scoring.limit, skip=skip), barrier)
            for each in {each.name: each for each in chosen}.values()
        }
        weights = run_on_rank0(world, identity, barrier)
        scorer, collator, world = load_scorer(model, adapter, max_pixels=max_pixels, world=world, zero3=scoring.zero3)
        settings = Settings(
            batch_size=scoring.batch_size,
            max_tokens=scoring.max_tokens_per_forward or MAX_TOKENS,
            num_workers=default_workers() if options.num_workers is None else options.num_workers,
            skip=skip,
            draws=options.draws,
            remedy=scoring.remedy.replace("set --max_tokens", "lower --max_tokens"),
        )
        evaluated = _evaluated_model(name, scoring.zero3, scorer, collator, world, weights)
        results = evaluate_benchmarks(evaluated, [(each, loaded[each.name]) for each in chosen], folder, settings)
    if world.is_main:
        print("\n".join([overview(results), "", *map(summary, results), *(line for each in results for line in omissions(each))]))
        print(f"wrote {folder / 'results.md'}")


def _evaluated_model(name: str, zero3: bool, scorer: Any, collator: Any, world: Any, identity: Mapping[str, str]) -> Any:
    from cfvlm_ds.evaluation.generation import write, writing_digest
    from cfvlm_ds.evaluation.suite.runner import Asked
    from cfvlm_ds.models import attention

    dtype = scorer.model.dtype
    precision = {
        "dtype": str(dtype).removeprefix("torch."),
        "device": world.device.type,
        "attention": attention("auto", scorer.model.config, dtype),
    }
    writing = None if zero3 else partial(write, scorer.model, collator, world.device, do_sample=False)
    if writing is not None:
        identity = {**identity, "writing": writing_digest(scorer.model)}
    return Asked(scorer, collator, world, name, identity, precision, writing)


def _compare(before: str, after: list[str], *, draws: Count | None = None, out: Path | None = None) -> None:
    """Compare accuracies of models on evaluation sets or benchmarks, paired by group or item. If several results follow the first, their
    mean is also compared with it.

    Example: cfvlm-ds compare runs/base runs/seed0 runs/seed1

    Args:
        before: run folder, file from `cfvlm-ds evaluate --out`, or folder from `cfvlm-ds evaluate --benchmarks`.
        after: further results of the same kind; each is compared with the first.
        draws: number of draws in the permutation test on each benchmark. The default is the same as in `cfvlm-ds evaluate`.
        out: folder for the tables (results.md), a figure of the differences and their intervals, and an HTML page with both.
    """
    from cfvlm_ds.demo.habits.writing import register
    from cfvlm_ds.evaluation.before_after import compare_results as compare_sets
    from cfvlm_ds.evaluation.before_after import comparison_tables, is_results
    from cfvlm_ds.evaluation.suite.comparing import compare_results, comparison_table

    register()
    if repeated := next((name for at, name in enumerate(after) if name in after[:at]), None):
        raise ConfigError(f"{repeated} is given twice; give each result once")
    if out is not None:
        refuse_filled(out, except_for=_COMPARISON)
    of_sets = {name: is_results(Path(name)) for name in (before, *after)}
    if len(set(of_sets.values())) > 1:
        sets, benchmarks = (next(name for name, found in of_sets.items() if found == kind) for kind in (True, False))
        raise ConfigError(f"{sets} has results of evaluation sets, but {benchmarks} has results of benchmarks; compare results of one kind")
    if of_sets[before]:
        if draws is not None:
            raise ConfigError("--draws applies only to benchmarks; leave it out")
        changes = compare_sets(Path(before), [Path(name) for name in after], say)
        text = comparison_tables(Path(before), changes)
        differences = {
            label: {
                f"{each.set}, {each.edit}, {each.metric}": (each.difference, None if each.low is None else (each.low, each.high))
                for each in rows
            }
            for label, rows in changes.items()
        }
    else:
        compared = {name: compare_results(Path(before), Path(name), draws, say) for name in after}
        text = "\n\n".join(comparison_table(pairs, before, name) for name, pairs in compared.items())
        differences = {
            name: {f"{pair.before.place}: {metric}": difference for pair in pairs for metric, difference in pair.headlines.items()}
            for name, pairs in compared.items()
        }
    print(text)
    if out is not None:
        _write_comparison(out, f"{', '.join(after)} compared with {before}", text, differences)


_COMPARISON = ("results.md", "differences.png", "results.html")


def _write_comparison(out: Path, title: str, text: str, differences: Mapping[str, Any]) -> None:
    from cfvlm_ds.page.report import write_report_page
    from cfvlm_ds.tracking.figures import differences_figure

    table, figure, page = (out / name for name in _COMPARISON)
    with writing(out, "choose another --out"):
        out.mkdir(parents=True, exist_ok=True)
        markdown = f"# {in_cell(title, 200)}\n\n{text}\n"
        replace(table, markdown.encode())
        differences_figure(figure, title, differences)
        write_report_page(page, title, f"{markdown}\n![differences with 95 % intervals]({figure.name})\n")
    say(f"page: {page}")
