"""Build of a wheel that also contains the files in the root that a run needs, as cfvlm_ds/shipped. pyproject.toml has all else."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FILES = ("train.py", "ds_configs/*.json", "examples/*.yaml", "examples/*.ipynb", "slurm/*.sh")


def shipped_files() -> list[Path]:
    return sorted(path for pattern in FILES for path in Path().glob(pattern))


class BuildPy(build_py):
    """Build step that copies the shipped files. An editable install needs no copies: cfvlm_ds.core.shipped finds the files in the root."""

    def run(self) -> None:
        target = Path(self.build_lib, "cfvlm_ds")
        if not self.editable_mode:
            shutil.rmtree(target, ignore_errors=True)  # remove what an earlier build of another revision left there
        super().run()
        if not self.editable_mode:
            for path in shipped_files():
                (copy := target / "shipped" / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
            (target / "shipped" / "revision").write_text(revision())

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *map(str, shipped_files())]


def revision() -> str:
    """Return the commit of the build for the records of runs, or "" if it is unknown."""
    root = Path(__file__).resolve().parent
    command = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        top, commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    return commit if Path(top).resolve() == root else ""  # ignore the commit of a checkout that contains an unpacked archive


setup(cmdclass={"build_py": BuildPy})
