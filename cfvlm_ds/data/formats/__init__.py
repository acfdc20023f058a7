"""Manifest rows to counterfactual groups, one file per format.

A further format is one function from a row to a group (see cfgroup.py) and one line in FORMATS. One that makes several groups of a row
returns a sequence, and says how many without making them in ``parts(row)``. One that makes a group of several rows has ``claim(row)``
(see truth.py). One with options is a frozen dataclass, whose fields they are.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup
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

_OPTION = re.compile(r'\s*(\w+)\s*=\s*(?:"([^"]*)"|([^,"]*))\s*(?:,|$)', re.ASCII)
_FIXED = ("keys", "source")


def format_named(spec: str, where: object) -> Format:
    """The format that ``NAME`` or ``NAME:OPTION=VALUE,OPTION=VALUE`` says; a value with a comma is in double quotes.

    Raises DataError, beginning with ``where``, for an unknown name or option.
    """
    named, colon, options = spec.partition(":")
    if named not in FORMATS:
        near = difflib.get_close_matches(named, [*FORMATS, AUTO], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join([*FORMATS, AUTO])}"
        raise DataError(f"{where}: unknown format {named!r}; {hint}")
    found = FORMATS[named]
    return _with_options(found, named, options, where) if colon else found


def _with_options(found: Any, named: str, options: str, where: object) -> Format:
    if not dataclasses.is_dataclass(found) or isinstance(found, type):
        raise DataError(f"{where}: format {named!r} has no options; write {named!r} alone")
    kinds = {field.name: type(field.default) for field in dataclasses.fields(found) if field.name not in _FIXED}
    values: dict[str, Any] = {}
    place = 0
    while place < len(options):
        if (part := _OPTION.match(options, place)) is None:
            raise DataError(
                f"{where}: format {named}:{options} is not understood at {options[place:]!r}; write NAME:OPTION=VALUE,OPTION=VALUE"
            )
        option, place = part[1], part.end()
        if option not in kinds:
            near = difflib.get_close_matches(option, kinds, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(kinds)}"
            raise DataError(f"{where}: format {named!r} has no option {option!r}; {hint}")
        if option in values:
            raise DataError(f"{where}: option {option!r} of format {named!r} is given twice; keep one of them")
        value = part[3].strip() if part[2] is None else part[2]
        if kinds[option] is bool and value not in ("true", "false"):
            raise DataError(f"{where}: option {option!r} of format {named!r} must be true or false, not {value!r}")
        values[option] = value == "true" if kinds[option] is bool else value
    try:
        return cast(Format, dataclasses.replace(found, **values))
    except DataError as error:
        raise DataError(f"{where}: format {named}:{options}: {error}") from error


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
