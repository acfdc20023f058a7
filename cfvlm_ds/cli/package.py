"""``cfvlm-ds init`` and ``--version``: write the files that ship with the package to a folder, and print the package's version."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.files import put_in_place
from cfvlm_ds.core.shipped import SHIPPED, shipped
from cfvlm_ds.core.untrusted import refuse_link


class ShowVersion(argparse.Action):
    """Action of --version. It calls git for the revision only if the option is given."""

    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *details: Any) -> NoReturn:
        from cfvlm_ds.core.versions import git_revision, version

        print(f"cfvlm-ds {version('cfvlm-ds')} (revision {git_revision()})")
        parser.exit()


def init(folder: str) -> None:
    """Write train.py, ds_configs, examples and slurm to a folder, where you can edit them and submit jobs.

    Example: cfvlm-ds init my-runs

    Args:
        folder: folder to write, created if necessary; nothing in it is overwritten.
    """
    to = Path(folder)
    refuse_link(to, "name the folder itself")
    if to.exists() and not to.is_dir():
        raise ConfigError(f"{to} exists and is not a folder; name another one")
    for name in SHIPPED:
        if os.path.lexists(to / name):
            raise ConfigError(f"{to / name} already exists and would be overwritten; name another folder, or move it")
    to.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=to) as partial:
        for name in SHIPPED:
            source = shipped(name)
            for path in source.iterdir() if source.is_dir() else [source]:
                if path.is_file():
                    target = Path(partial) / path.relative_to(source.parent)
                    target.parent.mkdir(exist_ok=True)
                    target.write_bytes(path.read_bytes())
        environment = Path(partial) / "slurm" / "env.sh"
        environment.write_text(_with_python(environment.read_text()))
        for name in SHIPPED:
            put_in_place(Path(partial) / name, to / name, Path(partial) / "older")
    print(f"wrote {', '.join(SHIPPED)} to {to}; next, in this folder: deepspeed --num_gpus 1 train.py --config FILE")
    print("on a Slurm cluster: edit slurm/env.sh, then sbatch slurm/train_1node.sh --config FILE")


def _with_python(environment: str) -> str:
    """Return the text of slurm/env.sh with this Python's folder added to PATH, because a job does not inherit the submitting shell's
    environment.
    """
    commands = shlex.quote(str(Path(sys.executable).parent))
    line = f'export PATH={commands}:"$PATH" # of the Python that ran `cfvlm-ds init`\n'
    return environment.replace(_OWN_VENV, line + _OWN_VENV, 1)


_OWN_VENV = "if [ -d .venv ]; then"
