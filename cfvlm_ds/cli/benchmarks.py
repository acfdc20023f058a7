"""``cfvlm-ds evaluate --benchmarks`` and ``cfvlm-ds compare``: public benchmarks, and two models on them side by side."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cfvlm_ds.cli.options import add_command, count, model_of, positive
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.verbosity import shows_progress


def add_options(command: argparse.ArgumentParser) -> None:
    """What ``evaluate`` takes for benchmarks."""
    group = command.add_argument_group(
        "benchmarks",
        "in place of manifests: cfvlm-ds evaluate runs/mine --benchmarks pope,mmvp --benchmark_root /data/benchmarks --out results",
    )
    group.add_argument(
        "--benchmarks", metavar="NAMES", action=_InPlaceOfManifests, help="names of public benchmarks, or of your own, joined by commas"
    )
    group.add_argument("--benchmark_root", metavar="FOLDER", help="folder with a folder of official files for each of them")
    text = "NAME or NAME:OPTION=VALUE, such as match caption:mode=pmi; each asks the benchmarks that it fits (default: each one's own)"
    group.add_argument("--probes", nargs="+", default=[], metavar="PROBE", help=text)
    text = "what comes of an item that cannot be asked: error, or skip it, counted and named (default error)"
    group.add_argument("--on_error", choices=("error", "skip"), default="error", help=text)
    text = "draws of the bootstrap; 0 for no intervals (default: 1000, fewer of benchmarks of over 10,000 items)"
    group.add_argument("--draws", type=count, metavar="N", help=text)
    group.add_argument("--num_workers", type=count, metavar="N", help="processes that prepare batches, per rank (default: spare cores)")
    text = "also send the metrics to MLflow: to the server of MLFLOW_TRACKING_URI, or to mlflow.db in the folder with --out (default none)"
    group.add_argument("--experiment", metavar="NAME", help=text)


def add(commands: Any) -> None:
    """Add the commands to a parser's."""
    text = "two folders of results side by side: differences with intervals, what got better and worse, a page to look at"
    example = "cfvlm-ds compare results/base results/tuned --out page --benchmark_root /data/benchmarks"
    command = add_command(commands, "compare", _compare, text, example)
    command.add_argument("results", nargs="+", help="folder that `cfvlm-ds evaluate --benchmarks` wrote; two to compare, one to look at")
    command.add_argument("--out", metavar="FOLDER", help="page to write, or to write again, of the worst and best items (default none)")
    command.add_argument("--benchmark_root", metavar="FOLDER", help="folder of the benchmarks, from which the page takes the pictures")
    command.add_argument("--sample", type=positive, default=200, metavar="N", help="items of each benchmark on the page (default 200)")
    command.add_argument(
        "--draws", type=count, metavar="N", help="exchanges of the two models' answers that are drawn (default: as draws of evaluate)"
    )


class _InPlaceOfManifests(argparse.Action):
    """With benchmarks a manifest is not required. Nor is it without, if it may be left out: argparse would then not wait for it where an
    option stands between it and the model."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, values)
        for action in parser._actions:
            if action.dest == "manifest":
                action.nargs, action.required = "*", False


def asked_for(arguments: argparse.Namespace) -> bool:
    """Whether benchmarks are to be evaluated, and not manifests. Raises ConfigError for both."""
    if arguments.benchmarks is not None and arguments.manifest:
        raise ConfigError(f"evaluate is given both {arguments.manifest[0]} and --benchmarks; give manifests, or benchmarks")
    alone = ("benchmark_root", "probes", "draws", "experiment")
    if arguments.manifest and (given := [name for name in alone if getattr(arguments, name)]):
        raise ConfigError(f"--{given[0]} is of --benchmarks, and a manifest is evaluated; leave it out")
    return arguments.benchmarks is not None


def evaluate(
    arguments: argparse.Namespace,
    joined: Callable[[bool], Any],
    load_scorer: Callable[..., tuple[Any, Any, Any]],
    batches: Mapping[str, Any],
) -> None:
    """Ask a model benchmarks; every rank runs it. Nothing is loaded before the benchmarks' files are read."""
    for name in ("benchmark_root", "out"):
        if not getattr(arguments, name):
            raise ConfigError(f"--benchmarks needs --{name}, a folder; add it")
    if Path(arguments.out).resolve() == Path(arguments.benchmark_root).resolve():
        raise ConfigError(f"--out {arguments.out} is the folder of the benchmarks, whose files results would lie among; name another one")
    from cfvlm_ds.core.distributed import Patience, agreed, default_workers
    from cfvlm_ds.evaluation.suite.asked import MAX_TOKENS, Settings, evaluate_benchmarks, results_held
    from cfvlm_ds.evaluation.suite.chosen import choose, load_items
    from cfvlm_ds.evaluation.suite.tables import omissions, overview, summary

    probes = [part for spec in arguments.probes for part in ([spec] if ":" in spec else spec.split(",")) if part]
    names = [name.strip() for name in arguments.benchmarks.split(",") if name.strip()]
    chosen = choose(names, Path(arguments.benchmark_root), probes)
    model, adapter = model_of(arguments)
    world, out, skip = joined(arguments.zero3), Path(arguments.out), arguments.on_error == "skip"
    with results_held(out, world):
        patience = Patience(world)
        loaded = {
            name: agreed(world, partial(load_items, each, world.say, limit=arguments.limit, skip=skip), patience)
            for name, each in {each.name: each for each in chosen}.items()
        }
        identity = agreed(world, lambda: _identity(model, adapter, patience.alive, world.say), patience)
        options = {"max_pixels": arguments.max_pixels, "world": world, "zero3": arguments.zero3}
        scorer, collator, world = load_scorer(model, adapter, **options)
        asked = _asked(arguments, scorer, collator, world, identity)
        settings = Settings(
            batch_size=arguments.batch_size,
            max_tokens=arguments.max_tokens_per_forward or MAX_TOKENS,
            num_workers=default_workers() if arguments.num_workers is None else arguments.num_workers,
            shuffled=not arguments.no_shuffled,
            skip=skip,
            draws=arguments.draws,
            remedy=batches["remedy"].replace("set --max_tokens", "lower --max_tokens"),
        )
        results = evaluate_benchmarks(asked, [(each, loaded[each.name]) for each in chosen], out, settings)
        if arguments.experiment and world.is_main:
            track(arguments.experiment, results, out)
    if world.is_main:
        print("\n".join([overview(results), "", *map(summary, results), *(line for each in results for line in omissions(each))]))
        print(f"wrote {out / 'results.md'}")


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


def _identity(model: Any, adapter: Path | None, alive: Callable[[], object], say: Callable[[str], object]) -> dict[str, str]:
    from cfvlm_ds.models import adapter_fingerprint, fingerprint

    found = fingerprint(model, alive, say)
    return found if adapter is None else found | {"adapter": adapter_fingerprint(adapter, alive)}


def _asked(arguments: argparse.Namespace, scorer: Any, collator: Any, world: Any, identity: Mapping[str, str]) -> Any:
    import torch

    from cfvlm_ds.evaluation.generation import write, writing_digest
    from cfvlm_ds.evaluation.suite.asked import Asked
    from cfvlm_ds.models import attention

    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    precision = {
        "dtype": str(dtype).removeprefix("torch."),
        "device": world.device.type,
        "attention": attention("auto", scorer.model.config),
    }
    say = None if arguments.zero3 else partial(write, scorer.model, collator, world.device, do_sample=False, num_beams=1)
    if say is not None:
        identity = {**identity, "writing": writing_digest(scorer.model)}
    return Asked(scorer, collator, world, arguments.model, identity, precision, say)


def _compare(arguments: argparse.Namespace) -> None:
    from cfvlm_ds.core.secrets import print_line
    from cfvlm_ds.evaluation.suite.comparing import compare_results, comparison_table
    from cfvlm_ds.evaluation.suite.tables import overview, summary
    from cfvlm_ds.evaluation.suite.written import read_results

    if len(arguments.results) > 2:
        raise ConfigError(f"compare takes one or two folders of results, not {len(arguments.results)}; name two at a time")
    if arguments.out and not arguments.benchmark_root:
        raise ConfigError("--out needs --benchmark_root, the folder of the benchmarks, from which the page takes the pictures; add it")
    say: Callable[[str], object] = print_line if shows_progress() else lambda line: None
    first, *more = (Path(each) for each in arguments.results)
    if arguments.out:
        from cfvlm_ds.page import refuse_foreign_folder

        refuse_foreign_folder(Path(arguments.out))
    if not more:
        found: Any = read_results(first)
        print("\n".join([overview(found), "", *map(summary, found)]))
    else:
        found = compare_results(first, more[0], arguments.draws, say)
        print(comparison_table(found, *arguments.results))
    if arguments.out:
        from cfvlm_ds.evaluation.suite.comparison_page import results_page

        written = results_page(
            found, arguments.results, Path(arguments.benchmark_root), Path(arguments.out), sample=arguments.sample, say=say
        )
        print(f"wrote {Path(arguments.out) / 'index.html'}: {written.num_items} items, {written.num_pictures} pictures")
        if written.problems:
            print(f"{len(written.problems)} pictures could not be shown; the first: {next(iter(written.problems.values()))}")
