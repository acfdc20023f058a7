"""``cfvlm-ds data view`` and ``data stats``: look at data, and at what a run made of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cfvlm_ds.cli.options import add_command, add_data_options, add_model_options, model_of, positive
from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.files import whole_file
from cfvlm_ds.core.secrets import print_line
from cfvlm_ds.core.verbosity import shows_progress


def add(data: Any) -> None:
    """Add the commands to those of ``data``."""
    text = "write a page of groups to look at in a browser: pictures, texts, truth tables, scores"
    command = add_command(data, "view", _view, text, "cfvlm-ds data view groups.jsonl --out page")
    text = "manifest; run folder, of which the worst groups by its stored scores are shown; or work folder of `data propose`"
    command.add_argument("source", help=text)
    command.add_argument("--scores", help="file that `cfvlm-ds score` wrote for the manifest, or one of a run's folder scores")
    chosen = command.add_mutually_exclusive_group()
    chosen.add_argument("--sample", type=positive, default=200, metavar="N", help="groups that are shown (default 200)")
    chosen.add_argument("--ids", metavar="FILE", help="show the groups that this file names, one id a line, in its order")
    command.add_argument("--seed", type=int, default=0, help="draws the sample of a manifest (default 0)")
    command.add_argument("--rejected", action="store_true", help="of a work folder: only candidates that are not good, and why")
    command.add_argument("--out", default="page", help="folder to write, or to write again (default page)")
    add_data_options(command)

    text = "count what a manifest holds: groups, lengths, edit types, unknown cells, duplicates"
    command = add_command(data, "stats", _stats, text, "cfvlm-ds data stats groups.jsonl --out stats.png")
    command.add_argument("manifest")
    command.add_argument("--out", metavar="FILE.png", help="figure to write (default: none)")
    add_data_options(command)
    command.add_argument("--model", help="model folder or hub name; lengths are then in its tokens")
    add_model_options(command)


def _view(arguments: argparse.Namespace) -> None:
    out, say = Path(arguments.out), print_line if shows_progress() else lambda line: None
    if (Path(arguments.source) / "run.json").is_file():
        from cfvlm_ds.counterfactuals.looking import view_work

        given = {"root": arguments.root, "scores": arguments.scores, "ids": arguments.ids}
        if useless := [f"--{name}" for name, value in given.items() if value]:
            raise ConfigError(f"{arguments.source} is a work folder, which names its own pictures; leave {', '.join(useless)} out")
        written = view_work(Path(arguments.source), out, rejected=arguments.rejected, sample=arguments.sample, seed=arguments.seed, say=say)
    elif arguments.rejected:
        raise ConfigError(f"{arguments.source} is no work folder, and has no rejected candidates; leave --rejected out")
    else:
        from cfvlm_ds.evaluation import view

        named = ("root", "format", "scores", "sample", "seed", "ids", "max_pixels")
        written = view(arguments.source, out, **{name: getattr(arguments, name) for name in named}, say=say)
    print(f"wrote {out / 'index.html'}: {written.num_items} groups, {written.num_pictures} pictures")
    if written.problems:
        first = next(iter(written.problems.values()))
        print(f"{len(written.problems)} pictures could not be shown, and their places say why; the first: {first}")


def _stats(arguments: argparse.Namespace) -> None:
    from cfvlm_ds.data.stats import statistics

    file = None
    if arguments.out is not None:
        from cfvlm_ds.tracking.data_figure import figure_file

        file = figure_file(arguments.out, "--out")
    lengths = None
    if arguments.model:
        from cfvlm_ds.batching.collator import load_collator

        lengths = load_collator(model_of(arguments)[0], "full", arguments.max_pixels)
    options: dict[str, Any] = {} if shows_progress() else {"progress": lambda line: None}
    found = statistics(arguments.manifest, arguments.root, arguments.format, lengths=lengths, max_pixels=arguments.max_pixels, **options)
    if not found.num_groups and found.problems:
        raise DataError(found.problems[0])
    print(found)
    if file is not None and found.num_groups:
        from cfvlm_ds.tracking.data_figure import data_figure

        with whole_file(file) as handle:
            data_figure(handle, found.histograms, found.bars)
        print(f"wrote {arguments.out}")
