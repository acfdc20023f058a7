"""Keys and values of untrusted rows, with one sentence for each that is missing, unknown or of another type.

``where`` begins the sentence: the caller knows file and row.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from cfvlm_ds.core.errors import DataError


def check_keys(row: Mapping[str, Any], allowed: Collection[str], where: str) -> None:
    """Raise DataError on a key that is not allowed, naming the nearest one that is."""
    for key in row:
        if key not in allowed:
            names = sorted(allowed)
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(names)}"
            raise DataError(f"{where}: unknown key {key!r}; {hint}")


def further_keys(row: Mapping[str, Any], known: Iterable[str], where: str) -> dict[str, Any]:
    """What a row of a published format holds beside the keys that are ``known``.

    Raises DataError for a key that looks like a misspelling of a known one that the row lacks.
    """
    known = tuple(known)
    absent = [name for name in known if name not in row]
    further = {key: value for key, value in row.items() if key not in known}
    for key in further:
        if near := difflib.get_close_matches(key, absent, n=1, cutoff=_MISSPELT):
            raise DataError(f"{where}: unknown key {key!r}; did you mean {near[0]!r}? if not, name it otherwise")
    return further


_MISSPELT = 0.8


def as_meta(further: Any) -> str:
    """Metadata in the form that a group keeps: a tenth of the memory of nested objects, for millions of rows."""
    return json.dumps(further, ensure_ascii=False, separators=(",", ":")) if further else ""


def required(row: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in row:
        raise DataError(f"{where}: key {key!r} is missing; add it")
    return row[key]


def string(row: Mapping[str, Any], key: str, where: str) -> str:
    value = required(row, key, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} must be a string, not {value!r}; quote it")
    return value


def name(row: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
    """A string, or a number as one: ids are either in published files. Without a ``default`` the key must be there."""
    value = required(row, key, where) if default is None else row.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DataError(f"{where}: {key!r} must be a string, not {value!r}; quote it")
    return str(value)


def number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(f"{where} must be a number, not {value!r}")
    return float(value)


def items(row: Mapping[str, Any], key: str, allowed: Collection[str], where: str) -> list[Mapping[str, Any]]:
    items = required(row, key, where)
    if not isinstance(items, list) or not items or not all(isinstance(item, Mapping) for item in items):
        raise DataError(f"{where}: {key!r} must be a non-empty list of objects")
    for item in items:
        check_keys(item, allowed, f"{where}: {key}")
    return items


def index(items: list[Mapping[str, Any]], where: str) -> dict[str, int]:
    index: dict[str, int] = {}
    for position, item in enumerate(items):
        name = string(item, "id", where)
        if name in index:
            raise DataError(f"{where}: id {name!r} occurs twice; make ids unique")
        index[name] = position
    return index


def lookup(index: Mapping[str, int], name: Any, where: str) -> int:
    if not isinstance(name, str) or name not in index:
        raise DataError(f"{where}: no id {name!r}; known: {', '.join(index)}")
    return index[name]
