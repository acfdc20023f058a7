"""Construction of counterfactual groups from captions and pictures. Edits are proposed, applied, verified and selected, and the groups can
be audited. Every candidate is recorded with its history.

The back ends that propose and apply edits are interchangeable. A user's script can add one with ``PROPOSERS["my_rules"] = ...``.
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
    """Import an exported name on first use. The steps are slow to import, and the commands' options do not need them."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
