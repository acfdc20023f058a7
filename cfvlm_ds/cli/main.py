"""``cfvlm-ds``: the parser of all commands but train.py. Bad input ends with one sentence and exit code 2."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cfvlm_ds.cli import cluster, data, models
from cfvlm_ds.cli.exits import exit_cleanly, files_named, print_anything
from cfvlm_ds.core.secrets import mask_tracebacks


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of cfvlm-ds."""
    parser = argparse.ArgumentParser(prog="cfvlm-ds", description="Data, scores, evaluation and export for counterfactual fine-tuning.")
    commands = parser.add_subparsers(dest="command", required=True)
    for group in (data, models, cluster):
        group.add(commands)
    arguments = parser.parse_args(argv)
    mask_tracebacks()
    print_anything()
    exit_cleanly(lambda: files_named(lambda: arguments.function(arguments)))
