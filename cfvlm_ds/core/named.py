"""Lookup of registry entries by name: ``NAME``, or ``NAME:OPTION=VALUE,OPTION=VALUE`` to change the entry's options."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import re
from collections.abc import Collection, Mapping
from typing import Any, get_type_hints

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.strict import Given, fitted
from cfvlm_ds.core.text import one_line

_OPTION = re.compile(r'\s*(\w+)\s*=\s*(?:"([^"]*)"|([^,"]*))\s*(?:,|$)', re.ASCII)


def named(kind: str, spec: str, known: Mapping[str, Any], besides: Collection[str] = ()) -> Any:
    """Return the entry of ``known`` that ``spec`` names, with the options in ``spec`` applied. A value with a comma must be in double
    quotes.

    Only dataclass entries have options, which are their fields. ``besides`` holds further valid names, which are used only in error
    messages. Raises ValueError for an unknown name, option or value.
    """
    name, colon, options = spec.partition(":")
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}; {near(name, [*known, *besides], 'known: ')}")
    entry = known[name]
    fields = dataclasses.fields(entry) if dataclasses.is_dataclass(entry) and not isinstance(entry, type) else ()
    defaults = {field.name: getattr(entry, field.name) for field in fields}
    if colon and not defaults:
        raise ValueError(f"{kind} {name!r} has no options; write only {name!r}")
    values: dict[str, Any] = {}
    place = 0
    while place < len(options):
        if (part := _OPTION.match(options, place)) is None:
            raise ValueError(f"{kind} {spec} cannot be parsed at {options[place:]!r}; write NAME:OPTION=VALUE,OPTION=VALUE")
        option, place = part[1], part.end()
        if option not in defaults:
            raise ValueError(f"{kind} {name!r} has no option {option!r}; {near(option, defaults, 'it has ')}")
        if option in values:
            raise ValueError(f"option {option!r} of {kind} {name!r} is given twice; keep one")
        value = Given(part[3].strip() if part[2] is None else part[2])
        values[option] = fitted(get_type_hints(type(entry))[option], value, f"option {option!r} of {kind} {name!r}")
    try:
        return dataclasses.replace(entry, **values) if values else entry
    except ValueError as error:
        raise ValueError(f"{kind} {spec}: {error}") from error


def near(given: str, known: Collection[str], otherwise: str) -> str:
    """Return a hint: the known name most similar to ``given`` or, if there is none, the text ``otherwise`` followed by all known names."""
    matches = difflib.get_close_matches(given, known, n=1)
    return f"did you mean {matches[0]!r}?" if matches else f"{otherwise}{', '.join(known)}"


def imported(name: str, option: str, kind: str) -> Any:
    """Import and return the object ``name``, given as MODULE:NAME. Raises ConfigError if that fails. The error message names ``option`` and
    includes ``kind``, a description of the option's valid values.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a user's module can raise anything
        why = one_line(f"{type(error).__name__}: {error}", 200)
        raise ConfigError(f"{option}: {name!r} cannot be imported ({why}); use {kind}, with the module's folder in PYTHONPATH") from error
