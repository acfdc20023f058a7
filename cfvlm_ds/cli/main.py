"""``cfvlm-ds``: entry point and parser for all commands. Bad input is reported in one sentence, with exit code 2.

Heavy packages are imported only once the command is known. This keeps --help fast, and lets a training run block signals
from the launcher before the slow imports start.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from cfvlm_ds.cli import cluster, data, evaluating, models, package
from cfvlm_ds.cli.exits import escape_unencodable, exit_cleanly, explain_os_errors, leave_at_once
from cfvlm_ds.cli.making import ALONE
from cfvlm_ds.cli.options import Parser, add_function, add_verbosity, refuse_empty, refuse_unknown
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.ranks import num_ranks
from cfvlm_ds.core.secrets import mask_tracebacks
from cfvlm_ds.core.verbosity import show

_BEFORE_TRAIN = ("--local_rank", "--quiet", "--verbose")
"""Options that may precede ``train``: DeepSpeed's launcher inserts --local_rank before all other arguments."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the ``cfvlm-ds`` command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    first = next((place for place, word in enumerate(words) if not word.startswith("-")), len(words))
    if words[first : first + 1] == ["train"] and all(word.partition("=")[0] in _BEFORE_TRAIN for word in words[:first]):
        _train([*words[:first], *words[first + 1 :]])
        return
    mask_tracebacks()
    escape_unencodable()
    arguments, unknown = parser().parse_known_args([word for word in words[:first] if not word.startswith("--local_rank=")] + words[first:])
    show(arguments.quiet, arguments.verbose)
    if unknown:
        exit_cleanly(lambda: refuse_unknown(arguments.asked_for, unknown))

    def run() -> None:
        refuse_empty(arguments)
        if getattr(arguments, "action", None) in ALONE and num_ranks() > 1:  # several processes would repeat the same work
            raise ConfigError(f"data {arguments.action} runs in one process, but {num_ranks()} were started; start one process per shard")
        arguments.function(arguments)

    exit_cleanly(lambda: explain_os_errors(run))


def parser() -> Parser:
    """Return the parser of all commands. ``train`` is listed without its options, which core/parsing.py defines."""
    text = "Training, data, scores, evaluation and export for counterfactual fine-tuning."
    top = Parser(prog="cfvlm-ds", description=text, epilog="example: cfvlm-ds data check groups.jsonl --root images")
    top.add_argument("--version", action=package.ShowVersion, help="print the version and the revision of the code, and exit")
    top.set_defaults(quiet=False, verbose=False)
    add_verbosity(top)
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("train", help="train, evaluate and export a run; see cfvlm-ds train --help", add_help=False)
    for group in (data, models, evaluating, cluster):
        group.add(commands)
    add_function(commands, package.init)
    return top


def _train(argv: list[str]) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from cfvlm_ds.cli.train import train_main

    leave_at_once(lambda: train_main(argv, "cfvlm-ds train"))
