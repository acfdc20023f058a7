"""Manifest rows to counterfactual groups, one file per format.

A further format is one function from a row to a group (see cfgroup.py) and one line in FORMATS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.data.formats.cfgroup import native_group
from cfvlm_ds.data.formats.cfvlm import cfvlm_group
from cfvlm_ds.data.formats.pairs import pair_group

Format = Callable[[Mapping[str, Any]], CounterfactualGroup | Sequence[CounterfactualGroup]]
"""Row -> group with image paths as written in the row; or an object that gives several, and how many by ``parts(row)``. Raises DataError
without file and line."""

FORMATS: dict[str, Format] = {
    "cfgroup": native_group,
    "pairs": pair_group,
    "cfvlm": cfvlm_group,
}
