"""Construction of counterfactual groups from captions and pictures: edits are proposed, applied, verified, selected and audited. Every
candidate is kept with its history.

Each step has one interface and several back ends. A user's script adds a back end by assignment: ``PROPOSERS["mine"] = ...``.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "PROPOSERS": "propose",
    "Proposal": "propose.base",
    "Rejected": "propose.base",
    "Source": "propose.base",
    "EDITORS": "edit",
    "Picture": "edit.base",
    "Refused": "edit.base",
    "Task": "edit.base",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Import a name on access. This folder also holds the commands' options, and importing the options must not import the steps."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
