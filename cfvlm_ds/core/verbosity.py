"""Verbosity of this process: progress by default, less with --quiet, more with --verbose."""

from __future__ import annotations

import os
from typing import Literal

Shows = Literal["results", "progress", "everything"]
"""``results``: only warnings, errors and results. ``everything``: also the log lines of libraries and the tracebacks of errors."""

VERBOSITY = {
    "quiet": "print only warnings, errors and results",
    "verbose": "also print the log messages of libraries and the tracebacks of errors",
}
"""Verbosity options of every command, with their help texts."""

_shown: Shows = "progress"


def show(what: Shows) -> None:
    """Set the verbosity. Call this before importing libraries, which read their verbosity from environment variables."""
    global _shown
    _shown = what
    if what == "everything":
        os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "info")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info")


def selected_verbosity(quiet: bool, verbose: bool) -> Shows:
    """Return the verbosity that --quiet and --verbose select."""
    return "results" if quiet else "everything" if verbose else "progress"


def shows_progress() -> bool:
    """Return whether progress lines are printed."""
    return _shown != "results"


def shows_everything() -> bool:
    """Return whether errors are printed with their traceback."""
    return _shown == "everything"
