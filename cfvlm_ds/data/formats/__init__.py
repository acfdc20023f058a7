"""Manifest rows to counterfactual groups, one file per format.

A further format is one function from a row to a group (see cfgroup.py) and one line in FORMATS. One that makes several groups of a row
returns a sequence, and says how many without making them in ``parts(row)``. One that makes a group of several rows has ``claim(row)``
(see truth.py). One with options is a frozen dataclass, whose fields they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.named import named
from cfvlm_ds.data.formats.captions import Captions
from cfvlm_ds.data.formats.cfgroup import native_group
from cfvlm_ds.data.formats.cfvlm import Cfvlm
from cfvlm_ds.data.formats.hf import Mapped
from cfvlm_ds.data.formats.llava import Llava
from cfvlm_ds.data.formats.messages import Messages
from cfvlm_ds.data.formats.pairs import Pairs
from cfvlm_ds.data.formats.preference import Preference
from cfvlm_ds.data.formats.webdataset import WebDataset

T = TypeVar("T")

Format = Callable[[Mapping[str, Any]], CounterfactualGroup | Sequence[CounterfactualGroup]]
"""Row -> group, or groups, with image paths as written in the row. Raises DataError without file and line."""

FORMATS: dict[str, Format] = {
    "cfgroup": native_group,
    "pairs": Pairs(),
    "cfvlm": Cfvlm(),
    "llava": Llava(),
    "messages": Messages(),
    "preference": Preference(),
    "captions": Captions(),
    "webdataset": WebDataset(),
    "hf": Mapped(),
}

AUTO = "auto"
"""In place of a format: the one that the first row fits."""


def format_named(spec: str, where: object) -> Format:
    """The format that ``NAME`` or ``NAME:OPTION=VALUE,OPTION=VALUE`` says; a value with a comma is in double quotes.

    Raises DataError, beginning with ``where``, for an unknown name or option.
    """
    try:
        return cast(Format, named("format", spec, FORMATS, [AUTO], ("keys", "source")))
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error


def apply(function: Callable[[Mapping[str, Any]], T], row: Any) -> T:
    """Apply a format's function to a row. Whatever it raises on a row that it did not expect is a DataError without the row's place."""
    if not isinstance(row, dict):
        raise DataError(f"the row is a {type(row).__name__}, not an object; write it as {{...}}")
    try:
        return function(row)
    except DataError:
        raise
    except Exception as error:  # such as a number in place of a list
        problem = f"a value in the row is not what the format expects ({type(error).__name__}: {error})"
        raise DataError(f"{problem}; compare it with the format's description") from error
