"""What the records of each step look like. A journal is a file and may say anything: each record is compared with this as it is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Is = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _bool(value: Any) -> bool:
    return isinstance(value, bool)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _number(value: Any) -> bool:
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 1 << 63)


def _or_none(kind: Is) -> Is:
    return lambda value: value is None or kind(value)


def _list(kind: Is, *lengths: int) -> Is:
    return lambda value: isinstance(value, list) and (not lengths or len(value) in lengths) and all(map(kind, value))


def _object(needed: Mapping[str, Is], optional: Mapping[str, Is]) -> Is:
    return lambda value: isinstance(value, dict) and not _wrong_key(value, needed, optional)


def _wrong_key(value: Mapping[str, Any], needed: Mapping[str, Is], optional: Mapping[str, Is]) -> str:
    for key, kind in needed.items():
        if key not in value or not kind(value[key]):
            return key
    return next((key for key, kind in optional.items() if key in value and not kind(value[key])), "")


_PAIRS = _list(_list(_or_none(_number), 2), 1, 2)
_EDIT = _object(
    {key: _text for key in ("id", "type", "text", "from", "to", "instruction", "back_end")}, {"picture": _text, "request": _text}
)  # fmt: skip
_REJECTED = _object({"reason": _text}, {"back_end": _text, "type": _text, "text": _text, "failed": _bool})
_IN_TAR = _object({"sha256": _text, "file": _text, "start": _count, "length": _count}, {"size": _list(_count, 2)})
_REAL = _object({"sha256": _text, "path": _text}, {})
_SAME_SIZE = _object(
    {"same_size": _bool, "hash": _count, "changed": _number, "identical": _bool},
    {"mean": _number, "largest": _number, "outside": _number, "box": _list(_number, 4)},
)
_SCORES = _object({"match": _PAIRS, "likelihood": _PAIRS, "blank": _list(_or_none(_number), 2)}, {})
_MODELS = _object({}, {"clip": _PAIRS, "dino": _or_none(_number), "nli": _list(_or_none(_number), 2)})


def _picture(value: Any) -> bool:
    return value is None or (_REAL if isinstance(value, dict) and "path" in value else _IN_TAR)(value)


def _checks(value: Any) -> bool:
    if value is None or (isinstance(value, dict) and value.get("same_size") is False and _count(value.get("hash"))):
        return True
    return _SAME_SIZE(value)


_ATTEMPT: dict[str, Is] = {"edit": _text, "source": _text, "attempt": _count}
_SHAPES: dict[str, tuple[str, dict[str, Is], dict[str, Is]]] = {
    "propose": (
        "problem",
        {"source": _text, "caption": _text, "picture": _or_none(_text), "edits": _list(_EDIT), "rejected": _list(_REJECTED)},
        {"license": _text},
    ),
    "edit": ("refused", {"picture": _picture}, {"info": _object({}, {})}),
    "verify": ("problem", {"checks": _checks}, {"scores": _SCORES, "models": _MODELS, "mined": _bool}),
}
"""Of each step the key that says why there is nothing, what is needed where it is absent, and what may be there."""
_ALWAYS: dict[str, dict[str, Is]] = {
    "propose": {},
    "edit": {**_ATTEMPT, "seed": _count, "editor": _text},
    "verify": {**_ATTEMPT, "type": _text},
}
_MAYBE: dict[str, Is] = {"detail": _text, "parent_sha256": _text, "mask_sha256": _text}


def wrong_key(step: str, record: Mapping[str, Any]) -> str:
    """The first key of a record that is missing or has no value of its kind; empty where it is a record of the step."""
    nothing, needed, optional = _SHAPES[step]
    if wrong := _wrong_key(record, _ALWAYS[step], _MAYBE):
        return wrong
    return _wrong_key(record, {nothing: _text}, optional) if nothing in record else _wrong_key(record, needed, optional)
