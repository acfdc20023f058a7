"""``cfvlm-ds data`` and ``cfvlm-ds tiny``: commands that prepare data, and a command that writes small models for tests."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfvlm_ds.cli import making
from cfvlm_ds.cli.making import Part
from cfvlm_ds.cli.options import ImageLimits, OnError, Positive, Reading, add_function, model_named, say
from cfvlm_ds.core.errors import ConfigError, DataError, writing
from cfvlm_ds.core.secrets import print_line

if TYPE_CHECKING:
    from cfvlm_ds.data import CheckReport


def add(commands: Any) -> None:
    """Register ``data`` with its subcommands, and ``tiny``."""
    text, example = "make, check, convert, prepare and look at data", "cfvlm-ds data convert captions.csv --root images --out groups.jsonl"
    command = commands.add_parser("data", help=text, description=text, epilog=f"example: {example}")
    data = command.add_subparsers(dest="action", required=True)
    for function in (_check, _formats, _convert, _download, _prepare, _view):
        add_function(data, function)
    making.add(data)
    add_function(commands, _tiny)


def _tiny(family: str, out_dir: str) -> None:
    """Write a small model: one with random weights for smoke tests, or the demo's base model, which is pretrained to describe drawn scenes.

    Example: cfvlm-ds tiny qwen2_5_vl runs/tiny-qwen

    Args:
        family: a model type such as llava, llava_onevision, qwen2_vl, qwen3_vl or internvl; or base for the demo's base model.
        out_dir: folder to write.
    """
    from cfvlm_ds.demo.family_checkpoints import write_small

    print(f"wrote {write_small(family, Path(out_dir))}")


def _prepare(
    manifest: str | None = None,
    *,
    config: str | None = None,
    out: str | None = None,
    limit: Positive | None = None,
    pack: bool = False,
    on_error: OnError = "error",
    part: Part,
    reading: Reading,
) -> None:
    """Check a data set and write it as a store, a folder that training opens within a second. To divide the work among N processes, start
    one with --shard I/N for every I, wait until all have finished, and start all of them again. The first round checks the pictures. The
    second round writes the rows, and the last process to finish completes the store.

    Example: cfvlm-ds data prepare groups.jsonl --out STORE --pack

    Args:
        manifest: data in any known format.
        config: configuration file of a run, instead of a manifest. All data of the run are prepared in its run folder, as at the run's
            first start.
        out: folder to write; work that an earlier call finished is not repeated.
        limit: write only the first N groups.
        pack: copy the pictures into tar files in the store; otherwise the rows refer to the original files.
        on_error: with skip, leave out rows that are invalid or have an unusable picture, and list them in OUT/left_out.jsonl.
    """
    if config is not None:
        others = {"manifest": manifest, "out": out, "limit": limit, "pack": pack, "on_error": on_error != "error", "shard": part.shard}
        others |= {name: value != getattr(Reading, name) for name, value in vars(reading).items()}
        _prepare_run(config, [name for name, value in others.items() if value])
        return
    if manifest is None or out is None:
        raise ConfigError("name a manifest and --out FOLDER, or --config RUN.yaml")
    from cfvlm_ds.data import data_roots, open_groups
    from cfvlm_ds.data.manifest import local_path
    from cfvlm_ds.data.prepare import LEFT_OUT, PrepareOptions, prepare, source_stamp, source_state
    from cfvlm_ds.data.stored import StoredRows

    folder, (shard, of) = Path(out), part.shard or (0, 1)
    if of is None:
        raise ConfigError(f"--shard {shard} lacks the number of shards; write --shard {shard}/N")
    options = PrepareOptions(pack, True, reading.max_pixels, on_error)
    path = local_path(manifest)
    state = source_state(path)
    groups = open_groups(manifest, reading.root, reading.format, limit=limit, progress=print_line)
    stamp = source_stamp(path, state, data_roots(path, reading.root), groups.format, limit, options)
    with writing(folder, "free some space, or change --out; finished work is kept"):
        report, is_complete = prepare(groups, folder, stamp, options, print_line, shard=shard, of=of)
    if report.problems:
        print(report)
        if options.on_error == "error":
            _refuse(report)
    if is_complete:
        store = StoredRows(folder)
        without = f"; {left_out} rows were left out and are listed in {folder / LEFT_OUT}" if (left_out := store.found["left_out"]) else ""
        print(f"prepared {store.identity['rows']} groups in {folder}{without}; use this folder as a data set, for example as data.train")


def _prepare_run(config: str, other_options: list[str]) -> None:
    import torch

    from cfvlm_ds.cli.train import build
    from cfvlm_ds.core.distributed import World
    from cfvlm_ds.core.parsing import parse_config
    from cfvlm_ds.objectives import OBJECTIVES
    from cfvlm_ds.training.run import prepare
    from cfvlm_ds.training.validation import validate

    if other_options:
        raise ConfigError(f"--config cannot be combined with {', '.join(other_options)}; set them in {config}")
    run = parse_config(["--config", config], OBJECTIVES)
    world = World(0, 1, torch.device("cpu"))
    validate(run, world)
    build(run.build)
    prepare(run, world)
    print(f"prepared the data of {config} in {run.train.output_dir}/prepared")


def _refuse(report: CheckReport) -> None:
    if report.problems:
        more = len(report.problems) - 1
        raise DataError(report.problems[0] + (f" ({more} more, listed above)" if more else ""))


def _formats() -> None:
    """List the known row formats and file containers.

    Example: cfvlm-ds data formats
    """
    from cfvlm_ds.data.containers.kinds import CONTAINERS
    from cfvlm_ds.data.formats import FORMATS

    print(f"Containers, detected from the file extension or the contents of a folder: jsonl, {', '.join(CONTAINERS)}\n")
    for name, read in FORMATS.items():
        print(f"{name}: {sys.modules[read.__module__].__doc__}")
    print("Without --format, the keys of the first row select the format.")


def _convert(manifest: str, *, out: str, on_error: OnError = "error", reading: Reading) -> None:
    """Convert data in any known format to groups, one JSON object per line.

    Example: cfvlm-ds data convert llava_665k.json --root /data/coco --out groups.jsonl

    Args:
        manifest: data in any known format.
        out: file to write.
        on_error: with skip, leave out rows that are invalid or have an unusable picture, and list them in OUT.skipped.jsonl.
    """
    from cfvlm_ds.data.convert import convert

    file = Path(out)
    done = convert(Path(manifest), reading.root, reading.format, file, on_error, print, reading.max_pixels)
    where = "its folder" if done.root == file.parent.absolute() else f"{done.root}; pass that folder as root"
    print(f"wrote {file}: {done.groups} groups; picture paths are relative to {where}")


def _download(manifest: str, *, out: str, on_error: OnError = "error", threads: Positive = 16) -> None:
    """Download pictures that rows give as URLs, decode pictures given as base64 text, and write the rows with file paths instead.

    Example: cfvlm-ds data download rows.jsonl --out local.jsonl

    Args:
        manifest: data in any known format.
        out: JSON Lines file to write; the pictures go to the folder OUT.pictures next to it.
        on_error: with skip, leave out rows whose pictures cannot be fetched, and list them in OUT.skipped.jsonl.
        threads: number of parallel downloads.
    """
    from cfvlm_ds.data.download import COLUMNS, download

    done = download(Path(manifest), Path(out), on_error, threads, print)
    print(f"wrote {out}: {done.rows} rows with {done.pictures} pictures in {Path(out).name}.pictures")
    if not done.pictures:
        print(
            f"no row has an address in the columns {', '.join(sorted(COLUMNS))}; if another column has addresses, rename it to one of these"
        )


def _check(manifest: str, *, reading: Reading, model: str | None = None, limits: ImageLimits) -> None:
    """Report the contents of a manifest and all its problems.

    Example: cfvlm-ds data check groups.jsonl

    Args:
        manifest: data in any known format.
        model: model folder or hub name; if given, count tokens, and check that every text fits into the model's context window.
    """
    from cfvlm_ds.data import check_manifest

    collator = None
    if model:
        from cfvlm_ds.batching.collator import load_collator

        collator = load_collator(model_named(model, limits)[0], reading.max_pixels)
    report = check_manifest(manifest, reading.root, reading.format, lengths=collator, max_pixels=reading.max_pixels)
    if report.num_groups or len(report.problems) > 1:
        print(report)
    _refuse(report)


def _view(
    source: str,
    *,
    scores: str | None = None,
    sample: Positive | None = None,
    ids: str | None = None,
    seed: int = 0,
    rejected: bool = False,
    out: str = "page",
    reading: Reading,
) -> None:
    """Write an HTML page that shows groups with their pictures, texts, truth tables and scores.

    Example: cfvlm-ds data view groups.jsonl --out page

    Args:
        source: manifest, or work folder of `data propose`.
        scores: file that `cfvlm-ds score` wrote for the manifest, or a file in a run's scores folder.
        sample: number of groups to show; by default 200.
        ids: file with the ids of the groups to show, one per line. The groups are shown in this order.
        seed: seed for selecting the sample.
        rejected: show only the rejected candidates of a work folder, with the reasons for rejection.
        out: folder to write or replace.
    """
    if sample and ids:
        raise ConfigError("--sample and --ids cannot be combined; give only one")
    number, folder = sample or 200, Path(out)
    if (Path(source) / "run.json").is_file():
        from cfvlm_ds.counterfactuals.looking import view_work

        if useless := [f"--{name}" for name, value in {"root": reading.root, "scores": scores, "ids": ids}.items() if value]:
            raise ConfigError(f"{source} is a work folder, which records its own pictures; leave out {', '.join(useless)}")
        written = view_work(Path(source), folder, rejected=rejected, sample=number, seed=seed, say=say)
    elif rejected:
        raise ConfigError(f"{source} is not a work folder and has no rejected candidates; leave out --rejected")
    else:
        from cfvlm_ds.evaluation import view

        written = view(source, folder, scores=scores, sample=number, seed=seed, ids=ids, say=say, **vars(reading))
    print(f"wrote {folder / 'index.html'}: {written.num_items} groups, {written.num_pictures} pictures")
    if written.problems:
        first = next(iter(written.problems.values()))
        print(f"{len(written.problems)} pictures could not be shown; the page gives the reason for each. The first: {first}")
