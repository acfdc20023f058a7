"""JSON files that contain a single value: a list of rows, COCO captions, or an object of numbered rows. The whole file is read into memory.

A COCO file lists pictures and captions separately. Each row combines a picture with the list of its captions. Every other field of the
captions becomes a list with one value per caption. An object of numbered rows, as in SugarCrepe, maps numbers to rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.reading import DuplicateKey, TooLarge, object_of, open_regular, read_bytes
from cfvlm_ds.data.containers.rows import MAX_ROW, Row, Rows
from cfvlm_ds.data.rows import parsed

MAX_JSON = 4 << 30
"""Maximum size of a JSON file in bytes. Its parsed rows take several times as much memory until they are written as JSON lines."""

_REMEDY = "correct it, or name the file .jsonl if it holds one object per line"


def json_rows(path: Path) -> Rows:
    """Yield the location and value of each row in a file. A row with a duplicate key is replaced with a DataError."""
    try:
        value = parsed(read_bytes(path, MAX_JSON), path, _REMEDY, _DECODER)
    except TooLarge as error:
        raise DataError(f"{path}: {error}; write one object per line, and name the file .jsonl") from error
    if isinstance(value, list):
        yield from ((f"item {number}", _row(item)) for number, item in enumerate(value, 1))
    elif isinstance(value, dict) and all(key.isdecimal() and isinstance(item, dict | DataError) for key, item in value.items()):
        yield from ((f"key {key}", _row(item)) for key, item in value.items())
    elif isinstance(value, dict) and all(isinstance(value.get(key), list) for key in ("images", "annotations")):
        yield from _of_coco(path, value["images"], value["annotations"])
    elif isinstance(value, DataError):
        raise DataError(f"{path}: {value}")
    else:
        raise DataError(f"{path}: contains a {type(value).__name__}, not a list of rows; write [...] or name the file .jsonl")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | DataError:
    try:
        return object_of(pairs)
    except DuplicateKey as error:
        return DataError(str(error))


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _row(value: Any) -> Row | DataError:
    if isinstance(value, (dict, DataError)):
        return value
    return DataError(f"the row is a {type(value).__name__}, not an object; write it as {{...}}")


def _of_coco(path: Path, pictures: Sequence[Any], annotations: Sequence[Any]) -> Rows:
    images, captions = dict[Any, Row](), dict[Any, list[Row]]()
    for number, value in enumerate(pictures, 1):
        name, file, further = _taken(value, "id", "file_name", where := f"{path}: images, item {number}")
        if name in images:
            raise DataError(f"{where}: image id {name!r} occurs twice; keep one")
        images[name] = {"id": name, "image": file, **further}
    for number, value in enumerate(annotations, 1):
        name, text, further = _taken(value, "image_id", "caption", f"{path}: annotations, item {number}")
        captions.setdefault(name, []).append({"caption": text, **further})
    for number, (image_id, row) in enumerate(images.items(), 1):
        records = captions.pop(image_id, [])
        lists = {key: [record.get(key) for record in records] for key in dict.fromkeys(key for record in records for key in record)}
        ids, texts = lists.pop("id", []), lists.pop("caption", [])
        lists = {f"annotations.{key}" if key in row else key: values for key, values in lists.items()}
        yield f"images, item {number}", row | {"caption": texts, "caption_ids": ids, **lists}
    for unknown in captions:
        problem = (
            f"annotations refer to the image id {unknown!r}, which 'images' lacks; add it, or use images and annotations of the same file"
        )
        yield f"image {unknown!r}", DataError(problem)


def _taken(value: Any, name: str, content: str, where: str) -> tuple[str | int, str | int, Row]:
    """Return a COCO item's values for the keys ``name`` and ``content``, and its other fields. Raises DataError if either is missing or
    invalid.
    """
    row = _row(value)
    if isinstance(row, DataError):
        raise DataError(f"{where}: {row}")
    for key in (name, content):
        if not isinstance(row.get(key), (str, int)):
            remedy = "as COCO's captions require; add it, or write the rows as a list [...]"
            raise DataError(f"{where}: key {key!r} is missing or is neither a text nor a number, {remedy}")
    return row[name], row[content], {key: value for key, value in row.items() if key not in (name, content)}


def is_lines(path: Path) -> bool:
    """Return whether a .json file has one object per line, as in some published data sets.

    Only the first non-empty line is parsed. Return False if it is not a whole object, or if the object has the keys of a COCO file. Also
    return False if nothing follows the line and all values of the object are lists or objects, because they are probably the rows or
    columns of a table. Raises the same errors as open_regular.
    """
    with open_regular(path) as handle:
        line = handle.readline(MAX_ROW + 1)
        while line and not line.strip() and len(line) <= MAX_ROW:
            line = handle.readline(MAX_ROW + 1)
        is_last = not handle.read(1)
    try:
        row = json.loads(line.decode("utf-8-sig")) if len(line) <= MAX_ROW else None
    except (ValueError, RecursionError):
        return False
    if not isinstance(row, dict) or {"images", "annotations"} <= row.keys():
        return False
    return not (is_last and row and all(isinstance(value, dict | list) for value in row.values()))
