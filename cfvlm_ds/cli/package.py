"""``cfvlm-ds init`` and ``completion``: what an installed package hands to its user."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn

from cfvlm_ds.cli.options import add_command
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.files import create
from cfvlm_ds.core.shipped import SHIPPED, shipped
from cfvlm_ds.core.untrusted import refuse_link

SHELLS = ("bash", "zsh", "tcsh")


def add(commands: Any) -> None:
    """Add the commands to a parser's."""
    text = f"write {', '.join(SHIPPED)} into a folder, to edit and to submit jobs from"
    command = add_command(commands, "init", _init, text, "cfvlm-ds init my-runs")
    command.add_argument("folder", help="made if it is not there; nothing in it is overwritten")
    text = "print what a shell reads to complete commands, options and files: eval it, or keep it where the shell looks for such files"
    command = add_command(commands, "completion", _completion, text, "cfvlm-ds completion bash")
    command.add_argument("shell", choices=SHELLS)


class ShowVersion(argparse.Action):
    """argparse's own would ask git for the revision at every start."""

    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *details: Any) -> NoReturn:
        from cfvlm_ds.core.versions import git_revision, version

        print(f"cfvlm-ds {version('cfvlm-ds')} (revision {git_revision()})")
        parser.exit()


def _init(arguments: argparse.Namespace) -> None:
    folder = Path(arguments.folder)
    refuse_link(folder, "name the folder itself")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is there and is no folder; name another one")
    for name in SHIPPED:
        if os.path.lexists(folder / name):
            raise ConfigError(f"{folder / name} is there, and nothing is overwritten; name another folder, or move it away")
    made = folder if not folder.exists() else None
    try:
        for name in SHIPPED:
            source = shipped(name)
            for path in sorted(source.iterdir()) if source.is_dir() else [source]:
                if path.is_file():
                    target = folder / path.relative_to(source.parent)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with create(target) as copy:
                        copy.write(_with_python(path.read_text()).encode() if path.name == "env.sh" else path.read_bytes())
    except OSError:  # named by whoever called this; the next try finds nothing half done in its way
        for each in [made] if made is not None else [folder / name for name in SHIPPED]:
            shutil.rmtree(each, ignore_errors=True) if each.is_dir() else each.unlink(missing_ok=True)
        raise
    print(f"wrote {', '.join(SHIPPED)} to {folder}; next: cd {folder}, edit slurm/env.sh, sbatch slurm/train_1node.sh --config FILE")


def _with_python(environment: str) -> str:
    """slurm/env.sh, by which a job finds the commands of this Python: it does not inherit the shell that submits it."""
    commands = shlex.quote(str(Path(sys.executable).parent))
    line = f'export PATH={commands}:"$PATH" # of the Python that `cfvlm-ds init` ran in\n'
    return environment.replace(_OWN_VENV, line + _OWN_VENV, 1)


_OWN_VENV = "if [ -d .venv ]; then"


def _completion(arguments: argparse.Namespace) -> None:
    try:
        import shtab
    except ImportError as error:
        raise ConfigError("completion is written by shtab, which is not installed; `pip install shtab`") from error
    _add_train_options(_subparsers(arguments.parser)["train"])
    _complete_files(arguments.parser, shtab.FILE)
    print(shtab.complete(arguments.parser, arguments.shell))


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next((dict(action.choices) for action in parser._actions if isinstance(action, argparse._SubParsersAction)), {})


def _add_train_options(train: argparse.ArgumentParser) -> None:
    """The options of a run, with the words that some of them take."""
    from cfvlm_ds.core.parsing import option_parser
    from cfvlm_ds.objectives import OBJECTIVES

    for action in option_parser(OBJECTIVES)._actions:
        if action.option_strings:
            added = train.add_argument(*action.option_strings, help=action.help)
            added.nargs, added.choices = 0 if action.nargs == 0 else None, action.choices


def _complete_files(parser: argparse.ArgumentParser, files: Any) -> None:
    """What takes a value and has no words of its own may be a path."""
    for action in parser._actions:
        if action.nargs != 0 and not action.choices:
            vars(action)["complete"] = files
    for command in _subparsers(parser).values():
        _complete_files(command, files)
