"""``cfvlm-ds data`` and ``cfvlm-ds tiny``: make and check what a run needs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cfvlm_ds.cli import looking
from cfvlm_ds.cli.options import add_command, add_data_options, add_fields, add_model_options, model_of, values_of
from cfvlm_ds.cli.train import build
from cfvlm_ds.core.config import BuildConfig, ScenesConfig
from cfvlm_ds.core.errors import DataError


def add(commands: Any) -> None:
    """Add the commands to a parser's."""
    data = commands.add_parser("data", help="build or check manifests").add_subparsers(dest="action", required=True)
    command = add_command(data, "build", _build, "write the embedded world of scenes", "cfvlm-ds data build scenes --num_train 4000")
    add_fields(command, ScenesConfig)
    command = add_command(data, "check", _check, "report everything wrong with a manifest", "cfvlm-ds data check groups.jsonl")
    command.add_argument("manifest")
    add_data_options(command)
    command.add_argument("--model", help="model folder or hub name; also checks that every text fits its window")
    add_model_options(command)

    looking.add(data)

    command = add_command(commands, "tiny", _tiny, "write a small random model for smoke tests", "cfvlm-ds tiny qwen2_5_vl runs/tiny-qwen")
    command.add_argument("family", help="a model type such as llava, llava_onevision, qwen2_vl, qwen3_vl, internvl")
    command.add_argument("out_dir", help="folder to write")
    command.add_argument("--seed", type=int, default=0, help="seed of the weights (default 0)")


def _build(arguments: argparse.Namespace) -> None:
    build(BuildConfig(scenes=ScenesConfig(**values_of(arguments, ScenesConfig))))


def _tiny(arguments: argparse.Namespace) -> None:
    from cfvlm_ds.demo.family_checkpoints import write_small

    print(f"wrote {write_small(arguments.family, Path(arguments.out_dir), arguments.seed)}")


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
    print(report)
    if not report.ok:
        more = len(report.problems) - 1
        raise DataError(report.problems[0] + (f" ({more} more, listed above)" if more else ""))
