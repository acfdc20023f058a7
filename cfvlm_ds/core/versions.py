"""Versions of packages, and the git revision of this package. Neither is needed to train, so neither can end a run."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import subprocess
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
"""The folder of this package's code."""

_GIT_S = 10


def version(package: str) -> str:
    """The version of an installed package; ``none`` where there is no metadata of it: not installed, or run from its sources."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def git_revision() -> str:
    """The commit that this package's own files are checked out from, whatever the working directory; ``unknown`` where there is none.

    A package that was installed below somebody's checkout, in its .venv say, is not part of that; of a wheel it is the commit that the
    wheel was built from.
    """
    return (_git("ls-files", "--error-unmatch", "__init__.py") and _git("rev-parse", "HEAD")) or _built_from() or "unknown"


def _built_from() -> str:
    try:
        written = (PACKAGE / "shipped" / "revision").read_text().strip()  # by setup.py
    except (OSError, UnicodeDecodeError):
        return ""
    return written if re.fullmatch(r"[0-9a-f]{40,64}", written) else ""


def _git(*command: str) -> str:
    """What git prints about the folder of this package; nothing where it fails, hangs or is not there."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    with_folder = ["git", "-C", str(PACKAGE), *command]
    try:
        done = subprocess.run(with_folder, capture_output=True, text=True, check=True, timeout=_GIT_S, env=environment)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout.strip()
