"""The form of results.json, for what somebody else may have made: every part that is read later is checked before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cfvlm_ds.core.text import quoted


def check_record(record: Mapping[str, Any]) -> None:
    """Raise ValueError for a record whose parts are of other types than this file writes."""
    kinds = {"benchmark": str, "headline": str, "metrics": dict, "intervals": dict, "data": dict, "model": dict, "probe": dict}
    if wrong := [name for name, kind in kinds.items() if not isinstance(record.get(name), kind)]:
        raise ValueError(f"{wrong[0]!r} is missing or no {kinds[wrong[0]].__name__}")
    if "seen" not in record["metrics"]:
        raise ValueError("'metrics' has nothing of what was seen")
    tables = [*record["metrics"].values(), {name: tuple(span) for name, span in record["intervals"].items()}]
    for table in tables:
        for name, value in table.items():
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(is_number(each) for each in numbers) or (isinstance(value, tuple) and len(value) != 2):
                raise ValueError(f"the value of {quoted(name, 60)} is no number")
    for name, right in _FURTHER.items():
        if name in record and not right(record[name]):
            raise ValueError(f"{name!r} is not of the form that it is written in: {quoted(record[name], 60)}")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _published(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, dict)
        and is_number(each.get("value"))
        and all(isinstance(each.get(name), str) for name in ("metric", "model", "source"))
        for each in value
    )


_FURTHER: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("title", "prompt", "answer", "unofficial"), lambda value: isinstance(value, str)),
    **dict.fromkeys(("notes", "not_finite", "traps"), _texts),
    **dict.fromkeys(("settings", "versions", "bootstrap"), lambda value: isinstance(value, dict)),
    "items": lambda value: isinstance(value, dict) and all(is_number(each) for each in value.values()),
    "left_out": lambda value: isinstance(value, list) and all(_texts(each) and len(each) == 2 for each in value),
    "published": _published,
}
"""What a record may have besides, and whether a value is of its form."""


def is_number(value: Any) -> bool:
    """A number that a float holds: JSON has whole ones of any length."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MOST)


_MOST = 1 << 53
