"""Verbosity of this process: progress by default, less with --quiet, more with --verbose."""

from __future__ import annotations

import os

VERBOSITY = {
    "quiet": "print only warnings, errors and results",
    "verbose": "also print the log messages of libraries and the tracebacks of errors",
}
"""Verbosity options of every command, with their help texts."""

_quiet = _verbose = False


def show(quiet: bool, verbose: bool) -> None:
    """Set the verbosity. Call this before importing libraries, which read their verbosity from environment variables."""
    global _quiet, _verbose
    _quiet, _verbose = quiet, verbose
    if verbose:
        os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "info")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info")


def shows_progress() -> bool:
    """Return whether progress lines are printed."""
    return not _quiet


def shows_everything() -> bool:
    """Return whether errors are printed with their traceback."""
    return _verbose
