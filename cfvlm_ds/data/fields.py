"""Field validation for untrusted rows. A missing or unknown key, or a value of the wrong type, raises DataError.

Each error message is one sentence that begins with the argument ``where``, the row's location as far as the caller knows it.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeAlias

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.named import near

Row: TypeAlias = Mapping[str, Any]
"""A row of a data file, or an object within it, as JSON values."""


def check_keys(row: Row, allowed: Collection[str], where: str) -> None:
    """Raise DataError for a key that is not allowed. The message names a similar allowed key if there is one."""
    for key in row:
        if key not in allowed:
            raise DataError(f"{where}: unknown key {key!r}; {near(key, sorted(allowed), 'allowed: ')}")


def further_keys(row: Row, known: Iterable[str], where: str) -> dict[str, Any]:
    """Return the fields of a row whose keys are not in ``known``. Rows in published formats often have extra fields.

    Raises DataError for a key that looks like a misspelling of a known key that the row lacks.
    """
    known = tuple(known)
    absent = [name for name in known if name not in row]
    further = {key: value for key, value in row.items() if key not in known}
    for key in further if absent else ():
        if like := difflib.get_close_matches(key, absent, n=1, cutoff=_MISSPELT):
            raise DataError(f"{where}: unknown key {key!r}; did you mean {like[0]!r}? If not, rename the key")
    return further


_MISSPELT = 0.8


def as_meta(further: Any) -> str:
    """Encode metadata as JSON text, which takes a tenth of the memory of nested objects. Return "" if there is no metadata."""
    return json.dumps(further, ensure_ascii=False, separators=(",", ":")) if further else ""


def json_object(value: Any) -> dict[str, Any]:
    """Parse a string that contains a JSON object, and return {} for any other value."""
    if isinstance(value, str) and value.lstrip()[:1] == "{":
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return {}
        return parsed if isinstance(parsed, dict) else {}
    return {}


def as_list(value: Any) -> Any:
    """Parse a string that contains a list in JSON or Python notation, which is common in tables. Return any other value unchanged."""
    if not isinstance(value, str) or value[:1] + value[-1:] != "[]":
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        if not _LISTED.fullmatch(value):
            return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError):
        return value


_ITEM = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|True|False|None)"""
_LISTED = re.compile(rf"\[\s*{_ITEM}(?:\s*,\s*{_ITEM})*\s*\]", re.DOTALL)
"""Pattern for a list of strings, booleans and None in Python notation, which occurs in published tables."""


def value_of(row: Row, column: str) -> Any:
    """Return the value of a column, or None if it is absent.

    ``a.b`` refers to the field ``b`` of column ``a``, which can be an object or the JSON text of an object. If ``a`` is a list of objects,
    the result is the list of their values.
    """
    first, _, rest = column.partition(".")
    if column in row or not rest:
        return row.get(column)
    inner = row.get(first)
    if isinstance(inner, list) and all_objects(inner):
        values = [value_of(item, rest) for item in inner]
        return None if all(value is None for value in values) else values
    return value_of(inner if isinstance(inner, Mapping) else json_object(inner), rest)


def without(row: Row, columns: Iterable[str]) -> dict[str, Any]:
    """Copy a row, leaving out the given columns. If ``a.b`` is left out, the other fields of ``a`` are kept."""
    kept = dict(row)
    for column in columns:
        first, _, rest = column.partition(".")
        if column in kept:
            del kept[column]
        elif rest and (inner := kept.get(first)):
            if isinstance(inner, list) and all_objects(inner):
                kept[first] = [without(item, [rest]) for item in inner]
            elif left := (inner if isinstance(inner, Mapping) else json_object(inner)):
                kept[first] = without(left, [rest])
            if not kept[first]:
                del kept[first]
    return kept


def required(row: Row, key: str, where: str) -> Any:
    if key not in row:
        raise DataError(f"{where}: key {key!r} is missing; add it")
    return row[key]


def string(row: Row, key: str, where: str) -> str:
    if isinstance(value := row.get(key), str):
        return value
    raise DataError(f"{where}: {key!r} must be a string, not {required(row, key, where)!r}; quote it")


def name(row: Row, key: str, where: str, default: str | None = None) -> str:
    """Return a field as a string. A number is converted, because ids in published files may be numbers. Raises DataError for any other
    type, and for a missing key without a ``default``.
    """
    if isinstance(value := row.get(key, default), str):
        return value
    value = required(row, key, where) if default is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(f"{where}: {key!r} must be a string, not {value!r}; quote it")
    return str(value)


def row_id(row: Row, *contents: Any) -> str:
    """Build a group's id from its row's id, if there is one, and a hash of the row's contents.

    The hash is needed because several rows of a public data set can have the same id. The group's id does not depend on the row's position.
    A duplicate row gets the same id, so it is detected.
    """
    text = json.dumps(contents, ensure_ascii=False, default=str)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{name(row, 'id', 'row')}-{digest[:8]}" if row.get("id") is not None else f"row-{digest[:16]}"


def number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(f"{where} must be a number, not {value!r}")
    return float(value)


def items(row: Row, key: str, allowed: Collection[str], where: str) -> list[Row]:
    items = required(row, key, where)
    if not isinstance(items, list) or not items or not all_objects(items):
        raise DataError(f"{where}: {key!r} must be a non-empty list of objects")
    at = f"{where}: {key}"
    for item in items:
        check_keys(item, allowed, at)
    return items


def all_objects(items: list[Any]) -> bool:
    """Return whether all items are JSON objects."""
    return {*map(type, items)} <= _OBJECT or all(isinstance(item, Mapping) for item in items)


_OBJECT = {dict}


def index(items: list[Row], where: str) -> dict[str, int]:
    index: dict[str, int] = {}
    for position, item in enumerate(items):
        name = string(item, "id", where)
        if name in index:
            raise DataError(f"{where}: id {name!r} occurs twice; make ids unique")
        index[name] = position
    return index


def lookup(index: Mapping[str, int], name: Any, where: str) -> int:
    try:
        return index[name]
    except (KeyError, TypeError):
        raise DataError(f"{where}: unknown id {name!r}; known: {', '.join(index)}") from None
