"""The native format ``cfgroup/1``: one JSON object per line.

    {"schema": "cfgroup/1", "id": "dog-17", "source": "mine", "prompt": "Describe the image.",
     "images": [{"id": "i0", "path": "img/17.jpg"}, {"id": "i1", "path": "img/17_edit.jpg"}],
     "texts":  [{"id": "t0", "text": "two dogs"}, {"id": "t1", "text": "three dogs"}],
     "match":  [["i0", "t0", 1], ["i0", "t1", 0], ["i1", "t0", 0], ["i1", "t1", 1]],
     "edits":  [{"type": "count", "image": "i1", "text": "t1", "from": "two", "to": "three"}],
     "weight": 1.0}

``match`` lists the known cells: 1 if the text is true of the image, 0 if it is false. A cell that is not listed is unknown and never used
as a negative. Only the objective ``batch_align`` uses texts of other rows as negatives. For this objective, a text can have a ``key`` that
identifies its meaning. ``exclude`` lists texts of other rows, or the keys of such texts, that might be true of an image in this row.

A text can have its own ``prompt``. A prompt is a string, or a conversation that ends with a user turn: ``[{"role": "system", "content": "Be
brief."}, {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]``. Pictures that are shown together
form one entry of ``images``, whose ``path`` is a list. A row without pictures has one entry, whose ``path`` is null. The ``split`` and
``license`` of a row, and the ``role``, ``sha256`` and ``meta`` of its images, texts and edits, are metadata: the data check counts them,
and nothing else uses them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfvlm_ds.core.conversation import PICTURE, Part, Prompt, Turn, spelled
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup, Edit, Pictures, check_side
from cfvlm_ds.data.fields import Row, all_objects, as_meta, check_keys, index, items, lookup, name, number, required, string

NATIVE = "cfgroup"
SCHEMA = f"{NATIVE}/1"
_KEPT, _KEPT_OF_PARTS = ("split", "license"), ("role", "sha256", "meta")
_AS_WRITTEN = Path()
_GROUP_KEYS = frozenset(("schema", "id", "source", "prompt", "images", "texts", "match", "edits", "weight", "exclude", "meta", *_KEPT))
_IMAGE_KEYS = frozenset(("id", "path", *_KEPT_OF_PARTS))
_TEXT_KEYS = frozenset(("id", "text", "prompt", "key", "role", "meta"))
_EDIT_KEYS = frozenset(("type", "image", "text", "from", "to", "meta"))


def from_row(row: Row, root: Path = _AS_WRITTEN) -> CounterfactualGroup:
    """Parse a ``cfgroup/1`` row into a group. If ``root`` is given, image paths are joined to it. No image is opened.

    Raises DataError for a missing or unknown key, a duplicate or unknown id, a truth value other than 0 or 1, or a group that
    CounterfactualGroup rejects. The caller adds the file and line to the error message.
    """
    check_keys(row, _GROUP_KEYS, "row")
    if row.get("schema", SCHEMA) != SCHEMA:
        raise DataError(f"schema is {row['schema']!r}, but this version reads {SCHEMA!r}; convert the file")
    group_id = name(row, "id", "row")
    where = f"group {group_id!r}"
    images = items(row, "images", _IMAGE_KEYS, where)
    texts = items(row, "texts", _TEXT_KEYS, where)
    check_side(len(images), len(texts), where)
    image_index = index(images, f"{where}: images")
    text_index = index(texts, f"{where}: texts")
    match: list[list[int | None]] = [[None] * len(texts) for _ in images]
    cells = required(row, "match", where)
    if not isinstance(cells, list):
        raise DataError(f"{where}: 'match' must be a list of [image id, text id, 0 or 1], not {cells!r}")
    at = f"{where}: match"
    for cell in cells:
        if not isinstance(cell, list) or len(cell) != 3 or type(truth := cell[2]) is not int or truth not in (0, 1):
            raise DataError(f"{where}: match entry {cell!r} must be [image id, text id, 0 or 1]")
        line, c = match[lookup(image_index, cell[0], at)], lookup(text_index, cell[1], at)
        if line[c] is not None and line[c] != truth:
            raise DataError(f"{where}: match has both 0 and 1 for ({cell[0]}, {cell[1]}); keep one")
        line[c] = truth
    prompt = _prompt(row.get("prompt", ""), where)
    listed, edits = row.get("edits", []), []
    if not isinstance(listed, list) or not all_objects(listed):
        raise DataError(f"{where}: 'edits' must be a list of objects, not {listed!r}")
    at = f"{where}: edits"
    for edit in listed:
        check_keys(edit, _EDIT_KEYS, at)
        image, text = edit.get("image"), edit.get("text")
        edits.append(
            Edit(
                type=name(edit, "type", at),
                image=None if image is None else lookup(image_index, image, at),
                text=None if text is None else lookup(text_index, text, at),
                source=name(edit, "from", at, ""),
                target=name(edit, "to", at, ""),
            )
        )
    at, of_images = f"{where}: texts", f"{where}: images"
    return CounterfactualGroup(
        id=group_id,
        images=tuple([_pictures(image, root, of_images) for image in images]),
        candidates=tuple(
            [Candidate(_prompt(text["prompt"], at) if "prompt" in text else prompt, string(text, "text", at)) for text in texts]
        ),
        match=tuple(map(tuple, match)),
        edits=tuple(edits),
        weight=number(row.get("weight", 1.0), f"{where}: weight"),
        source=name(row, "source", where, ""),
        meta=as_meta(_unused(row, images, texts, listed)),
        keys=tuple([name(text, "key", at, "") for text in texts]) if any("key" in text for text in texts) else (),
        exclude=_excluded(row, where),
    )


def _excluded(row: Row, where: str) -> tuple[str, ...]:
    listed = row.get("exclude", [])
    if not isinstance(listed, list) or not all(isinstance(key, str) for key in listed):
        raise DataError(f"{where}: 'exclude' must be a list of strings, not {listed!r}; list keys of texts, or texts")
    return tuple(listed)


def _unused(row: Row, *parts: Sequence[Row]) -> Any:
    """Return a row's metadata: its ``meta``, ``split`` and ``license``, and the metadata of its images, texts and edits under keys such as
    ``images.sha256``.
    """
    fields = {key: row[key] for key in _KEPT if key in row}
    for kind, listed in zip(("images", "texts", "edits"), parts, strict=True):
        found = set[str]().union(*listed)
        for key in _KEPT_OF_PARTS:
            if key in found:
                fields[f"{kind}.{key}"] = [part.get(key) for part in listed]
    own = row.get("meta")
    if not fields:
        return own
    own = own if isinstance(own, Mapping) else {"meta": own} if own else {}
    return {**own, **{f"row.{key}" if key in own else key: value for key, value in fields.items()}}


def to_row(group: CounterfactualGroup, root: Path, meta: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Convert a group to a ``cfgroup/1`` row. This is the inverse of from_row.

    Image paths are written relative to ``root``, or as absolute paths if they are outside it. ``meta``, if given, replaces the group's
    metadata.
    """
    prompts = {candidate.prompt for candidate in group.candidates}
    shared: Prompt = group.candidates[0].prompt if len(prompts) == 1 else ""
    row: dict[str, Any] = {
        "schema": SCHEMA,
        "id": group.id,
        "source": group.source,
        "prompt": spelled(shared),
        "images": [
            {"id": f"i{i}", "path": _paths([_relative(picture, root) for picture in pictures])} for i, pictures in enumerate(group.images)
        ],
        "texts": [
            {"id": f"t{c}", "text": candidate.text}
            | ({} if candidate.prompt == shared else {"prompt": spelled(candidate.prompt)})
            | ({"key": group.keys[c]} if group.keys and group.keys[c] else {})
            for c, candidate in enumerate(group.candidates)
        ],
        "match": [[f"i{i}", f"t{c}", truth] for i, line in enumerate(group.match) for c, truth in enumerate(line) if truth is not None],
        "edits": [
            {"type": edit.type}
            | ({} if edit.image is None else {"image": f"i{edit.image}"})
            | ({} if edit.text is None else {"text": f"t{edit.text}"})
            | {"from": edit.source, "to": edit.target}
            for edit in group.edits
        ],
        "weight": group.weight,
    }
    own = dict(meta) if meta else json.loads(group.meta or "null")
    return row | ({"exclude": list(group.exclude)} if group.exclude else {}) | ({"meta": own} if own else {})


def _prompt(value: Any, where: str) -> Prompt:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise DataError(f"{where}: 'prompt' must be a string or a list of turns, not {value!r}")
    turns = []
    for turn in value:
        check_keys(turn, ("role", "content"), f"{where}: prompt")
        content = required(turn, "content", f"{where}: prompt")
        parts = content if isinstance(content, list) else [content]
        turns.append(Turn(string(turn, "role", f"{where}: prompt"), tuple(_part(part, f"{where}: prompt") for part in parts)))
    return tuple(turns)


def _part(part: Any, where: str) -> Part:
    if isinstance(part, str):
        return part
    if part == {"type": "image"}:
        return PICTURE
    if isinstance(part, Mapping) and part.keys() == {"type", "text"} and part["type"] == "text" and isinstance(part["text"], str):
        return part["text"]
    raise DataError(
        f'{where}: a part must be {{"type": "image"}} or {{"type": "text", "text": "..."}}, not {part!r}; list pictures in \'images\''
    )


def _pictures(image: Row, root: Path, where: str) -> Pictures:
    path = required(image, "path", where)
    if isinstance(path, str):
        return (root / path,)
    listed = path if isinstance(path, list) else [] if path is None else [path]
    if not all(isinstance(name, str) for name in listed) or path == []:
        raise DataError(f"{where}: 'path' must be a string, a list of strings, or null if there is no picture, not {path!r}")
    return tuple(root / name for name in listed)


def _relative(picture: Path, root: Path) -> str:
    if root.is_absolute() and not picture.is_absolute():  # the picture's path is relative to the current folder
        picture = picture.absolute()
    return picture.as_posix().removeprefix(f"{root.as_posix().rstrip('/')}/")  # five times as fast as Path.relative_to


def _paths(names: list[str]) -> str | list[str] | None:
    return names if len(names) > 1 else names[0] if names else None
