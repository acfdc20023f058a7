"""Versions of packages, and the git revision of this package. A failure to determine them never stops a run."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import subprocess
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
"""Folder of this package's code."""

_GIT_S = 10


def version(package: str) -> str:
    """Return a package's version, or ``none`` if it has no metadata (because it is not installed or is run from source)."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def git_revision() -> str:
    """Return the commit that this package was checked out or built from, or ``unknown``.

    If the package is installed inside another repository, for instance in its .venv, that repository's commit is not returned.
    """
    return (_git("ls-files", "--error-unmatch", "__init__.py") and _git("rev-parse", "HEAD")) or _built_from() or "unknown"


def _built_from() -> str:
    try:
        written = (PACKAGE / "shipped" / "revision").read_text().strip()  # setup.py writes it
    except (OSError, UnicodeDecodeError):
        return ""
    return written if re.fullmatch(r"[0-9a-f]{40,64}", written) else ""


def _git(*command: str) -> str:
    """Run git in the folder of this package, and return its output, or "" if git fails, hangs or is missing."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    with_folder = ["git", "-C", str(PACKAGE), *command]
    try:
        done = subprocess.run(with_folder, capture_output=True, text=True, check=True, timeout=_GIT_S, env=environment)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout.strip()
