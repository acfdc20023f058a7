"""Files that come with the package: DeepSpeed configurations, recipes, Slurm scripts. In a wheel they lie below the code, in a checkout at
its root."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.versions import PACKAGE

SHIPPED = ("train.py", "ds_configs", "examples", "slurm")


def shipped(name: str) -> Path:
    """Where one of ``SHIPPED`` is."""
    installed = PACKAGE / "shipped"  # setup.py writes it into a wheel
    return (installed if installed.is_dir() else PACKAGE.parent) / name


def found(given: str, folder: str) -> str:
    """The file that a name means: itself where it is there, else the file of that name that comes with the package, in ``folder``.

    Such a name is bare, or after the folder's, as in ds_configs/z3.json. Anything else, and what neither has, is left as it is.
    """
    *before, name = given.split("/")
    if os.path.lexists(given) or before not in ([], [folder]) or name in ("", ".", ".."):
        return given
    path = str(shipped(folder) / name)
    return path if os.path.isfile(path) else given


def refuse_no_file(given: str, path: str) -> None:
    """Raise ConfigError for the ``path`` that ``given`` to --config means, and that is no file."""
    if os.path.isdir(path):
        raise ConfigError(f"--config {given} is a folder; name the file of options in it")
    if not os.path.lexists(path):
        raise ConfigError(f"--config {given}: no such file; give the path of yours, or one of {listed('examples', given)}")


def listed(folder: str, given: str = "") -> str:
    """The files of a folder by name, for a message: those that come with the package, and those of the working directory; of many only
    those whose names are like the ``given`` one, where there are such."""
    names = {path.name for place in (shipped(folder), Path(folder)) if place.is_dir() for path in place.iterdir() if path.is_file()}
    like = difflib.get_close_matches(Path(given).name, names, n=8, cutoff=0.6)
    return ", ".join(f"{folder}/{name}" for name in sorted(like or names))
