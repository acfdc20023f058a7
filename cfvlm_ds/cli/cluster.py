"""``cfvlm-ds cluster``: what slurm/launch.sh asks."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from cfvlm_ds.cli.options import add_command


def add(commands: Any) -> None:
    """Add the commands to a parser's."""
    cluster = commands.add_parser("cluster", help="what slurm/launch.sh asks").add_subparsers(dest="action", required=True)
    command = add_command(cluster, "check", _check, "check the nodes of a job, one task each", "cfvlm-ds cluster check runs/mine/nodes")
    command.add_argument("folder", help="shared folder for one line per node")
    command.add_argument("--timeout_s", type=float, default=30.0, help="seconds for the meeting, and for the collective (default 30)")
    text = "the output_dir that options of train.py mean"
    example = "cfvlm-ds cluster output_dir -- --config examples/quickstart.yaml"
    command = add_command(cluster, "output_dir", _output_dir, text, example)
    command.add_argument("options", nargs=argparse.REMAINDER, help="options of train.py, after --")


def _check(arguments: argparse.Namespace) -> None:
    from cfvlm_ds.cluster.node_check import check

    line = check(Path(arguments.folder), arguments.timeout_s)
    sys.stdout.flush()
    os._exit(0 if line == "ok" else 1)  # tearing down torch takes longer than the check


def _output_dir(arguments: argparse.Namespace) -> None:
    from cfvlm_ds.cli.train import with_quickstart
    from cfvlm_ds.core.parsing import parse_config
    from cfvlm_ds.objectives import OBJECTIVES

    options = arguments.options[1:] if arguments.options[:1] == ["--"] else arguments.options
    print(Path(parse_config(with_quickstart(options), OBJECTIVES, prog="train.py").train.output_dir).absolute())
