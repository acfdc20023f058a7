"""``cfvlm-ds``: the parser of all commands. Bad input ends with one sentence and exit code 2.

Nothing heavy is imported before a command is known, so that help and completion are there at once, and a launcher's signals are held back
before a training imports what takes seconds.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Literal

from cfvlm_ds.cli import benchmarks, cluster, data, describe, models, package
from cfvlm_ds.cli.exits import exit_cleanly, files_named, leave_at_once, print_anything
from cfvlm_ds.cli.making import ALONE
from cfvlm_ds.cli.options import Parser, add_function, add_verbosity, refuse_empty, refuse_unknown
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.ranks import num_ranks
from cfvlm_ds.core.secrets import mask_tracebacks
from cfvlm_ds.core.verbosity import selected_verbosity, show

_BEFORE_TRAIN = ("--local_rank", "--quiet", "--verbose")
"""What may stand before the command: DeepSpeed's launcher puts its own option first."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of cfvlm-ds."""
    given = list(sys.argv[1:] if argv is None else argv)
    first = next((place for place, each in enumerate(given) if not each.startswith("-")), len(given))
    if given[first : first + 1] == ["train"] and all(each.partition("=")[0] in _BEFORE_TRAIN for each in given[:first]):
        _train([*given[:first], *given[first + 1 :]])
        return
    mask_tracebacks()
    print_anything()
    arguments, unknown = parser().parse_known_args([each for each in given[:first] if not each.startswith("--local_rank=")] + given[first:])
    show(selected_verbosity(arguments.quiet, arguments.verbose))
    if unknown:
        exit_cleanly(lambda: refuse_unknown(arguments.asked_for, unknown))

    def run() -> None:
        refuse_empty(arguments)
        if getattr(arguments, "action", None) in ALONE and num_ranks() > 1:  # they would do the same work side by side
            raise ConfigError(f"data {arguments.action} is for one process, and {num_ranks()} were started; start one, of each shard")
        arguments.function(arguments)

    exit_cleanly(lambda: files_named(run))


def parser() -> Parser:
    """The parser of every command; that of ``train`` is another one (cfvlm_ds.core.parsing), of which only the name is here."""
    text = "Training, data, scores, evaluation and export for counterfactual fine-tuning."
    top = Parser(prog="cfvlm-ds", description=text, epilog="example: cfvlm-ds data check groups.jsonl --root images")
    top.add_argument("--version", action=package.ShowVersion, help="print the version and the revision of the code, and end")
    top.set_defaults(quiet=False, verbose=False)
    add_verbosity(top)
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("train", help="train, evaluate and export a run; see cfvlm-ds train --help", add_help=False)
    for group in (data, models, benchmarks, describe, cluster):
        group.add(commands)
    for function in (package.init, _completion):
        add_function(commands, function)
    return top


def _completion(shell: Literal["bash", "zsh", "tcsh"]) -> None:
    """Print what a shell reads to complete commands, options and files: eval it, or keep it where the shell looks for such files.

    Example: cfvlm-ds completion bash

    Args:
        shell: whose language it is in.
    """
    print(package.completion(parser(), shell))


def _train(argv: list[str]) -> None:
    """As train.py does it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from cfvlm_ds.cli.train import train_main

    leave_at_once(lambda: train_main(argv, "cfvlm-ds train"))
