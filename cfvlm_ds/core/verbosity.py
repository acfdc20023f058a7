"""How much this process prints: progress as a rule, less with --quiet, more with --verbose."""

from __future__ import annotations

import os
from typing import Literal

Shows = Literal["results", "progress", "everything"]
"""``results``: warnings, errors and results alone. ``everything``: also what the libraries log, and where in the code an error arose."""

VERBOSITY = {
    "quiet": "print warnings, errors and results alone",
    "verbose": "also print what the libraries log, and where in the code an error arose",
}
"""The options of every command, and what they do."""

_shown: Shows = "progress"


def show(what: Shows) -> None:
    """Print so much from here on. The libraries are told by their own variables, which they read when they are imported."""
    global _shown
    _shown = what
    if what == "everything":
        os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "info")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info")


def asked(quiet: bool, verbose: bool) -> Shows:
    """What the two options mean."""
    return "results" if quiet else "everything" if verbose else "progress"


def shows_progress() -> bool:
    """Whether lines about how things get on are printed."""
    return _shown != "results"


def shows_everything() -> bool:
    """Whether an error is printed with where it arose."""
    return _shown == "everything"
