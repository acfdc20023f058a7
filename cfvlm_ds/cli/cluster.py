"""``cfvlm-ds cluster``: commands that slurm/launch.sh calls."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Annotated, Any

from cfvlm_ds.cli.options import add_function


def add(commands: Any) -> None:
    """Register ``cluster`` and its subcommands."""
    cluster = commands.add_parser("cluster", help="commands that slurm/launch.sh calls").add_subparsers(dest="action", required=True)
    add_function(cluster, _check)
    add_function(cluster, _output_dir)


def _check(folder: str, *, timeout_s: float = 30.0) -> None:
    """Check the nodes of a Slurm job. Run this command in one task per node.

    Example: cfvlm-ds cluster check runs/mine/nodes

    Args:
        folder: existing shared folder; each node writes one line to the file FOLDER/NODE.
        timeout_s: time limit in seconds for all tasks to connect; the collective operation that follows has the same limit.
    """
    from cfvlm_ds.cluster.node_check import check

    line = check(Path(folder), timeout_s)
    sys.stdout.flush()
    os._exit(0 if line == "ok" else 1)  # torch's teardown takes longer than the check


Rest = Annotated[list[str], ("nargs", argparse.REMAINDER)]


def _output_dir(options: Rest) -> None:
    """Print the output_dir that train.py would use with these options.

    Example: cfvlm-ds cluster output_dir -- --config examples/quickstart.yaml

    Args:
        options: options for train.py, preceded by --.
    """
    from cfvlm_ds.cli.train import with_quickstart
    from cfvlm_ds.core.parsing import parse_config
    from cfvlm_ds.objectives import OBJECTIVES

    arguments = options[1:] if options[:1] == ["--"] else options
    print(Path(parse_config(with_quickstart(arguments), OBJECTIVES, prog="train.py").train.output_dir).absolute())
