"""Shipped files: DeepSpeed configurations, recipes and Slurm scripts that come with the package.

In a wheel, they are in a subfolder of the package; in a checkout, they are at the root of the repository.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.reading import similar_names
from cfvlm_ds.core.versions import PACKAGE

SHIPPED = ("train.py", "ds_configs", "examples", "slurm")


def shipped(name: str) -> Path:
    """Return the path of a file or folder in ``SHIPPED``."""
    installed = PACKAGE / "shipped"  # setup.py writes it into a wheel
    return (installed if installed.is_dir() else PACKAGE.parent) / name


def resolve_shipped(given: str, folder: str) -> str:
    """Return a file name unchanged if the file exists; otherwise, return the path of the file with that name in the package's ``folder``.

    The name can start with that folder, as in ds_configs/z3.json. A name that cannot be resolved is returned unchanged.
    """
    *before, name = given.split("/")
    if os.path.lexists(given) or before not in ([], [folder]) or name in ("", ".", ".."):
        return given
    path = str(shipped(folder) / name)
    return path if os.path.isfile(path) else given


def refuse_no_file(given: str, path: str) -> None:
    """Raise ConfigError if ``path`` is not a file. ``given`` is the --config argument that was resolved to this path."""
    if os.path.isdir(path):
        raise ConfigError(f"--config {given} is a folder; name a file of options in it")
    if not os.path.lexists(path):
        near, examples = similar_names(given), listed("examples", given)
        if not near or examples != listed("examples"):
            near = f"{near} give the path of your file, or one of {examples}".lstrip()
        raise ConfigError(f"--config {given}: no such file; {near}")


def listed(folder: str, given: str = "") -> str:
    """List the files in one of the package's folders, for a message. If any names are similar to ``given``, list only these."""
    names = [path.name for path in shipped(folder).iterdir() if path.is_file()]
    like = difflib.get_close_matches(Path(given).name, names, n=8, cutoff=0.6)
    return ", ".join(f"{folder}/{name}" for name in sorted(like or names))
