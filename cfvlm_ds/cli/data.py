"""``cfvlm-ds data`` and ``cfvlm-ds tiny``: make and check what a run needs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfvlm_ds.cli import looking, making
from cfvlm_ds.cli.options import OnError, Positive, add_command, add_data_options, add_function, add_model_options, model_of, positive
from cfvlm_ds.cli.train import build
from cfvlm_ds.core.config import BuildConfig, ScenesConfig
from cfvlm_ds.core.errors import ConfigError, DataError, StorageError, unwritten
from cfvlm_ds.core.secrets import print_line

if TYPE_CHECKING:
    from cfvlm_ds.data import CheckReport


def add(commands: Any) -> None:
    """Add the commands to a parser's."""
    text, example = "make, check, convert, prepare and look at data", "cfvlm-ds data convert captions.csv --root images --out groups.jsonl"
    command = commands.add_parser("data", help=text, description=text, epilog=f"example: {example}")
    data = command.add_subparsers(dest="action", required=True)
    add_function(data, _build)
    command = add_command(data, "check", _check, "report everything wrong with a manifest", "cfvlm-ds data check groups.jsonl")
    command.add_argument("manifest")
    add_data_options(command)
    command.add_argument("--model", help="model folder or hub name; also checks that every text fits its window")
    add_model_options(command)
    add_function(data, _formats)
    example = "cfvlm-ds data convert llava_665k.json --root /data/coco --out groups.jsonl"
    command = add_command(data, "convert", _convert, "write any data as groups, one JSON object per line", example)
    command.add_argument("manifest")
    command.add_argument("--out", required=True, help="file to write")
    command.add_argument(
        "--on_error",
        choices=("error", "skip"),
        default="error",
        help="skip rows that are no group and those with broken pictures, and list them",
    )
    add_data_options(command)
    add_function(data, _download)
    looking.add(data)
    making.add(data)
    example = "cfvlm-ds data prepare groups.jsonl --out STORE --pack"
    command = add_command(data, "prepare", _prepare, "check a data set and write it as a store, which training opens", example)
    command.add_argument("manifest", nargs="?", help="any data of a known format")
    text = "configuration of a run, in place of a manifest: all of its data are prepared in its folder, as its first start would do"
    command.add_argument("--config", metavar="RUN.yaml", help=text)
    command.add_argument("--out", metavar="FOLDER", help="folder to write; what an earlier call has prepared is not prepared again")
    command.add_argument("--limit", type=positive, metavar="N", help="the first N groups alone")
    command.add_argument(
        "--pack", action="store_true", help="copy the pictures into tars of the store; otherwise rows name them where they are"
    )
    text = "leave out rows that are no group and those with a picture that cannot be used, and list them in FOLDER/left_out.jsonl"
    command.add_argument("--on_error", choices=("error", "skip"), default="error", help=f"skip: {text}")
    text = "prepare every N-th part from number I on, 0 to N-1; the others are for other calls, all of which are made twice"
    command.add_argument("--shard", type=_shard, default=(0, 1), metavar="I/N", help=text)
    add_data_options(command)
    add_function(commands, _tiny)


def _build(scenes: ScenesConfig, *, benchmarks: str | None = None) -> None:
    """Write the embedded world of scenes.

    Example: cfvlm-ds data build runs/scenes --num_train 4000

    Args:
        benchmarks: also write its test groups, or those of a world that is there, into this folder as SugarCrepe, NaturalBench and POPE.
    """
    from cfvlm_ds.demo.scenes import build_benchmarks, config_in

    config = scenes
    if benchmarks and config == ScenesConfig(config.out_dir):  # without options, the world that is there
        config = config_in(Path(config.out_dir)) or config
    build(BuildConfig(scenes=config))
    if benchmarks:
        print(f"wrote {build_benchmarks(config, Path(benchmarks))}: sugarcrepe, naturalbench, pope")


def _tiny(family: str, out_dir: str, *, seed: int = 0) -> None:
    """Write a small random model for smoke tests.

    Example: cfvlm-ds tiny qwen2_5_vl runs/tiny-qwen

    Args:
        family: a model type such as llava, llava_onevision, qwen2_vl, qwen3_vl, internvl.
        out_dir: folder to write.
        seed: seed of the weights.
    """
    from cfvlm_ds.demo.family_checkpoints import write_small

    print(f"wrote {write_small(family, Path(out_dir), seed)}")


def _shard(text: str) -> tuple[int, int]:
    """An argument's type: 3/64 is the fourth of 64 parts."""
    number, slash, of = text.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N-1, such as 0/8, not {text!r}")
    return int(number), int(of)


def _prepare(arguments: argparse.Namespace) -> None:
    if arguments.config is not None:
        _prepare_run(arguments)
        return
    if arguments.manifest is None or arguments.out is None:
        raise ConfigError("name a manifest and --out FOLDER, or --config RUN.yaml")
    from cfvlm_ds.data import data_roots, open_groups
    from cfvlm_ds.data.containers.hub import fetched
    from cfvlm_ds.data.prepare import LEFT_OUT, PrepareOptions, prepare, source_stamp, source_state
    from cfvlm_ds.data.stored import StoredRows

    out, (shard, of), limit = Path(arguments.out), arguments.shard, arguments.limit
    options = PrepareOptions(arguments.pack, True, arguments.max_pixels, arguments.on_error)
    path = fetched(arguments.manifest)
    state = source_state(path)
    groups = open_groups(arguments.manifest, arguments.root, arguments.format, limit=limit, progress=print_line)
    stamp = source_stamp(path, state, data_roots(path, arguments.root), groups.format, limit, options)
    try:
        report, whole = prepare(groups, out, stamp, options, print_line, shard=shard, of=of)
    except OSError as error:
        raise StorageError(f"{unwritten(out, error)}; make room, or correct --out: what is prepared is kept") from error
    if report.problems:
        print(report)
        if options.on_error == "error":
            _refuse(report)
    if whole:
        store = StoredRows(out)
        without = f" without {left_out}, which {out / LEFT_OUT} lists," if (left_out := store.found["left_out"]) else ""
        print(f"prepared {store.identity['rows']} groups{without} in {out}: a data set by this name, as data.train for instance")


def _prepare_run(arguments: argparse.Namespace) -> None:
    import torch

    from cfvlm_ds.core.distributed import World
    from cfvlm_ds.core.parsing import parse_config
    from cfvlm_ds.objectives import OBJECTIVES
    from cfvlm_ds.training.run import prepare

    others = ("manifest", "out", "limit", "pack", "on_error", "shard", "format", "root", "max_pixels")
    if given := [name for name in others if getattr(arguments, name) != arguments.asked_for.get_default(name)]:
        raise ConfigError(f"--config names all that is prepared, not with {', '.join(given)}; set them in {arguments.config}")
    run = parse_config(["--config", arguments.config], OBJECTIVES)
    prepare(run, World(0, 1, 0, torch.device("cpu")))
    print(f"prepared the data of {arguments.config} in {run.train.output_dir}/prepared")


def _refuse(report: CheckReport) -> None:
    """Raise DataError for the problems of a report that was printed."""
    if report.problems:
        more = len(report.problems) - 1
        raise DataError(report.problems[0] + (f" ({more} more, listed above)" if more else ""))


def _formats() -> None:
    """List the formats of rows and the containers of files.

    Example: cfvlm-ds data formats
    """
    from cfvlm_ds.data.containers.kinds import CONTAINERS
    from cfvlm_ds.data.formats import FORMATS
    from cfvlm_ds.data.formats.recognise import SAMPLES

    print(f"containers (by the ending of a name, or what is in a folder): jsonl, {', '.join(CONTAINERS)}\n")
    for name in FORMATS:
        sample = SAMPLES[name]
        print(f"{name}: {sample.what}" + (f"\n    --format {name}:{sample.options}" if sample.options else ""))
        print(f"    {json.dumps(sample.row)}\n")
    print("Without --format it is the one that the first row has by its keys.")


def _convert(arguments: argparse.Namespace) -> None:
    from cfvlm_ds.data.convert import convert

    out = Path(arguments.out)
    done = convert(Path(arguments.manifest), arguments.root, arguments.format, out, arguments.on_error, print, arguments.max_pixels)
    where = "its folder" if done.root == out.parent.absolute() else f"{done.root}, which is to be named as root"
    print(f"wrote {out}: {done.groups} groups; paths of pictures are relative to {where}")


def _download(manifest: str, *, out: str, on_error: OnError = "error", threads: Positive = 16) -> None:
    """Fetch the pictures that rows name by http(s) address, or hold as text, and write the rows with files in their place.

    Example: cfvlm-ds data download rows.jsonl --out local.jsonl

    Args:
        manifest: any data of a known format.
        out: JSON lines to write; the pictures go to the folder OUT.pictures beside it.
        on_error: skip rows without their pictures, and list them.
        threads: pictures fetched side by side.
    """
    from cfvlm_ds.data.download import COLUMNS, download

    done = download(Path(manifest), Path(out), on_error, threads, print)
    print(f"wrote {out}: {done.rows} rows with {done.pictures} pictures in {Path(out).name}.pictures")
    if not done.pictures:
        print(f"no row names an address, which is looked for in the columns {', '.join(sorted(COLUMNS))}: rename a column that has some")


def _check(arguments: argparse.Namespace) -> None:
    from cfvlm_ds.batching.collator import load_collator
    from cfvlm_ds.data import check_manifest

    collator = load_collator(model_of(arguments)[0], "full", arguments.max_pixels) if arguments.model else None
    report = check_manifest(
        arguments.manifest,
        arguments.root,
        arguments.format,
        lengths=collator,
        max_pixels=arguments.max_pixels,
    )
    if report.num_groups or len(report.problems) > 1:
        print(report)
    _refuse(report)
