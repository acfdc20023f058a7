"""Counterfactual groups: images x texts with a truth table, as plain data.

A group is the unit of data. Image 0 and candidate 0 are the factual pair (the anchor); everything else is a counterfactual of it, or a
sham: the anchor re-rendered with nothing changed. Shapes used throughout the package: G groups, I images, C candidates.

The row format ``cfgroup/1`` is one JSON object per line::

    {"schema": "cfgroup/1", "id": "dog-17", "source": "mine", "prompt": "Describe the image.",
     "images": [{"id": "i0", "path": "img/17.jpg"}, {"id": "i1", "path": "img/17_edit.jpg"}],
     "texts":  [{"id": "t0", "text": "two dogs"}, {"id": "t1", "text": "three dogs"}],
     "match":  [["i0", "t0", 1], ["i0", "t1", 0], ["i1", "t0", 0], ["i1", "t1", 1]],
     "edits":  [{"type": "count", "image": "i1", "text": "t1", "from": "two", "to": "three"}],
     "weight": 1.0}

``match`` lists what is known: 1 the text is true of the image, 0 it is false. A cell that is not listed is unknown and is never used as a
negative. A text may carry its own ``prompt``. Several pictures that are shown together are one entry of ``images`` with a list as ``path``;
a row of text alone has one entry, whose ``path`` is null.
"""

from __future__ import annotations

import difflib
import json
import math
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import Tensor

from cfvlm_ds.errors import InputError

SCHEMA = "cfgroup/1"
MAX_SIDE = 1024
"""Images, and texts, that a group may have."""
MAX_EDITS = 2 * MAX_SIDE
MAX_CELLS = 1 << 16
"""Cells of its truth table: comparisons are pairs of them, millions for so many."""
SHAM = "sham"
"""Edit type of an image that was rendered again with nothing changed: a positive for the factual text."""

Pictures: TypeAlias = tuple[Path, ...]
"""What a text is scored with: one picture as a rule, several where a prompt shows several, none for text alone."""

Cells = Literal["anchor", "matched", "star", "full"]
"""Which cells of a group are scored, each set containing the one before: the factual pair; every true pair; also, where the truth is known,
the factual image with every text, and the anchor of each prompt's image with the texts of that prompt, its text with every image (of the
first prompt: row 0 and column 0); everything."""


class DataError(InputError):
    """Bad input data. The message is one sentence that names the file, the row and the remedy."""


@dataclass(frozen=True)
class Candidate:
    """A text to be scored, and the prompt it answers."""

    prompt: str
    text: str


@dataclass(frozen=True)
class Edit:
    """What distinguishes a counterfactual from the anchor; used to slice metrics, never by an objective.

    ``image`` and ``text`` are indices into the group (None where the edit has no image, or no text, of its own); ``source`` and ``target``
    are the words that changed.
    """

    type: str
    image: int | None = None
    text: int | None = None
    source: str = ""
    target: str = ""


@dataclass(frozen=True)
class CounterfactualGroup:
    """I images x C candidate texts with a truth table; (image 0, candidate 0) is the factual pair.

    ``match[i][c]`` is 1 where text c is true of image i, 0 where it is false, None where that is unknown. An image is a tuple of pictures,
    as many as every other image of its group has. ``meta`` is what else its row says, as JSON: read by nothing, and kept.
    """

    id: str
    images: tuple[Pictures, ...]
    candidates: tuple[Candidate, ...]
    match: tuple[tuple[int | None, ...], ...]
    edits: tuple[Edit, ...] = ()
    weight: float = 1.0
    source: str = ""
    meta: str = ""

    def __post_init__(self) -> None:
        if not self.images or not self.candidates:
            raise DataError(f"group {self.id!r} needs at least one image and one text")
        check_side(len(self.images), len(self.candidates), f"group {self.id!r}")
        if len(self.edits) > MAX_EDITS:
            raise DataError(
                f"group {self.id!r} has {len(self.edits)} edits, and {MAX_EDITS} is the bound; name what each image or text changes once"
            )
        if len(self.match) != len(self.images) or any(len(row) != len(self.candidates) for row in self.match):
            raise DataError(f"group {self.id!r}: match must be {len(self.images)} images x {len(self.candidates)} texts")
        for i, line in enumerate(self.match):
            for c, truth in enumerate(line):
                if truth not in (0, 1, None):
                    raise DataError(f"group {self.id!r}: match[{i}][{c}] is {truth!r}; it must be 1, 0 or None")
        for index, pictures in enumerate(self.images):
            if len(pictures) != self.num_pictures:
                raise DataError(
                    f"group {self.id!r}: image {index} has {len(pictures)} pictures and image 0 has {self.num_pictures}; split the row"
                )
            if len(set(pictures)) < len(pictures):
                raise DataError(f"group {self.id!r}: image {index} shows a picture twice; name each once")
        if not self.num_pictures and len(self.images) > 1:
            raise DataError(f"group {self.id!r}: a group without an image has one image entry, with the path null; split the row")
        if self.match[0][0] != 1:
            raise DataError(f"group {self.id!r}: the first image and the first text must match; list the factual pair first")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise DataError(f"group {self.id!r}: weight must be a positive number, not {self.weight}; drop the row to leave it out")
        for index, candidate in enumerate(self.candidates):
            if not candidate.text.strip():
                raise DataError(f"group {self.id!r}: text {index} is empty; write a text or remove it")
        seen: dict[tuple[str, str], int] = {}
        for index, candidate in enumerate(self.candidates):
            key = (normalised(candidate.prompt), normalised(candidate.text))
            if key in seen:
                other = f"text {seen[key]} ({self.candidates[seen[key]].text!r})"
                raise DataError(f"group {self.id!r}: text {index} equals {other}; a counterfactual must differ, remove one of them")
            seen[key] = index

    @property
    def num_pictures(self) -> int:
        """Pictures that a text is scored with: 1 as a rule, 0 without an image."""
        return len(self.images[0])

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """A number per text, equal where texts answer one prompt: only those can be compared with each other."""
        numbers: dict[str, int] = {}
        return tuple(numbers.setdefault(candidate.prompt, len(numbers)) for candidate in self.candidates)

    @property
    def anchors(self) -> dict[int, tuple[int, int]]:
        """Prompt (of prompt_ids) -> its first true (image, text), for the first prompt the factual pair; none where nothing is true."""
        prompts, found = self.prompt_ids, dict[int, tuple[int, int]]()
        for i, line in enumerate(self.match):
            for c, truth in enumerate(line):
                if truth == 1:
                    found.setdefault(prompts[c], (i, c))
        return found


@dataclass(frozen=True)
class GroupLayout:
    """What is known of a batch of G groups before the forward; groups are padded to the largest I and C of the batch.

    All tensors are [G, I, C] except ``weight`` [G] and ``prompt`` [G, C]:
    ``valid`` (bool) the cells that are scored; ``match`` (int8) 1 true, 0 false, -1 unknown; ``num_tokens`` (int64) response tokens of the
    cell's text, end-of-turn excluded; ``num_end_tokens`` (int64) its end-of-turn tokens, which count in the NLL and nowhere else;
    ``prompt`` (int64) numbers the prompt of each text within its group; None where every group has one.
    """

    valid: Tensor
    match: Tensor
    num_tokens: Tensor
    num_end_tokens: Tensor
    weight: Tensor
    ids: tuple[str, ...] = ()
    prompt: Tensor | None = None

    @property
    def same_prompt(self) -> Tensor:
        """[G, C, C] bool: pairs of texts that answer one prompt. An answer is never compared with one to another question."""
        if self.prompt is None:
            num_groups, _, num_texts = self.valid.shape
            return self.valid.new_ones(num_groups, num_texts, num_texts)
        return self.prompt.unsqueeze(2) == self.prompt.unsqueeze(1)

    @property
    def positive(self) -> Tensor:
        """[G, I, C] bool: scored cells whose text is true of their image."""
        return self.valid & (self.match == 1)

    @property
    def negative(self) -> Tensor:
        """[G, I, C] bool: scored cells whose text is known to be false of their image."""
        return self.valid & (self.match == 0)


def normalised(text: str) -> str:
    """Text in Unicode's composed form (NFC) with runs of white space collapsed: two texts equal in this form are the same caption."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def check_side(num_images: int, num_texts: int, where: str) -> None:
    """Raise DataError for a group that is larger than any forward could take."""
    if max(num_images, num_texts) > MAX_SIDE:
        raise DataError(f"{where} has {num_images} images and {num_texts} texts, and {MAX_SIDE} is the bound for either; split the row")
    if num_images * num_texts > MAX_CELLS:
        raise DataError(f"{where} has {num_images} x {num_texts} images and texts, and {MAX_CELLS} pairs are the bound; split the row")


def check_keys(row: Mapping[str, Any], allowed: Iterable[str], where: str) -> None:
    """Raise DataError on a key that is not allowed, naming the nearest one that is."""
    names = sorted(allowed)
    for key in row:
        if key not in names:
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


_GROUP_KEYS = ("schema", "id", "source", "split", "license", "prompt", "images", "texts", "match", "edits", "weight", "meta")
_IMAGE_KEYS = ("id", "path", "role", "sha256", "meta")
_TEXT_KEYS = ("id", "text", "prompt", "role", "meta")
_EDIT_KEYS = ("type", "image", "text", "from", "to", "meta")


def from_row(row: Mapping[str, Any], root: Path) -> CounterfactualGroup:
    """One ``cfgroup/1`` row as a group; image paths are joined to ``root`` and not opened here.

    Raises DataError (without file and line, which the caller knows) on a missing or unknown key, a duplicate or unknown id, a truth value
    other than 0 or 1, or anything CounterfactualGroup refuses.
    """
    check_keys(row, _GROUP_KEYS, "row")
    if row.get("schema", SCHEMA) != SCHEMA:
        raise DataError(f"schema is {row['schema']!r}, this version reads {SCHEMA!r}; convert the file")
    group_id = str(_required(row, "id", "row"))
    where = f"group {group_id!r}"
    images = _items(row, "images", _IMAGE_KEYS, where)
    texts = _items(row, "texts", _TEXT_KEYS, where)
    check_side(len(images), len(texts), where)
    image_index = _index(images, f"{where}: images")
    text_index = _index(texts, f"{where}: texts")
    match: list[list[int | None]] = [[None] * len(texts) for _ in images]
    cells = _required(row, "match", where)
    if not isinstance(cells, list):
        raise DataError(f"{where}: 'match' must be a list of [image id, text id, 0 or 1], not {cells!r}")
    for cell in cells:
        if not isinstance(cell, list) or len(cell) != 3 or type(cell[2]) is not int or cell[2] not in (0, 1):
            raise DataError(f"{where}: match entry {cell!r} must be [image id, text id, 0 or 1]")
        i, c = _lookup(image_index, cell[0], f"{where}: match"), _lookup(text_index, cell[1], f"{where}: match")
        if match[i][c] not in (None, cell[2]):
            raise DataError(f"{where}: match says both 0 and 1 for ({cell[0]}, {cell[1]}); keep one")
        match[i][c] = cell[2]
    prompt = _string({"prompt": ""} | dict(row), "prompt", where)
    listed, edits = row.get("edits", []), []
    if not isinstance(listed, list) or not all(isinstance(edit, Mapping) for edit in listed):
        raise DataError(f"{where}: 'edits' must be a list of objects, not {listed!r}")
    for edit in listed:
        check_keys(edit, _EDIT_KEYS, f"{where}: edits")
        image, text = edit.get("image"), edit.get("text")
        edits.append(
            Edit(
                type=str(_required(edit, "type", f"{where}: edits")),
                image=None if image is None else _lookup(image_index, image, f"{where}: edits"),
                text=None if text is None else _lookup(text_index, text, f"{where}: edits"),
                source=str(edit.get("from", "")),
                target=str(edit.get("to", "")),
            )
        )
    return CounterfactualGroup(
        id=group_id,
        images=tuple(_pictures(image, root, f"{where}: images") for image in images),
        candidates=tuple(
            Candidate(_string({"prompt": prompt} | dict(text), "prompt", f"{where}: texts"), _string(text, "text", f"{where}: texts"))
            for text in texts
        ),
        match=tuple(tuple(line) for line in match),
        edits=tuple(edits),
        weight=_number(row.get("weight", 1.0), f"{where}: weight"),
        source=str(row.get("source", "")),
        meta=as_meta(row.get("meta")),
    )


def to_row(group: CounterfactualGroup, root: Path, meta: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The ``cfgroup/1`` row of a group; the inverse of from_row. Image paths are written relative to ``root``; ``meta``, where it is given,
    is written in place of the group's own."""
    prompts = {candidate.prompt for candidate in group.candidates}
    shared = group.candidates[0].prompt if len(prompts) == 1 else ""
    row: dict[str, Any] = {
        "schema": SCHEMA,
        "id": group.id,
        "source": group.source,
        "prompt": shared,
        "images": [
            {"id": f"i{i}", "path": _paths([picture.relative_to(root).as_posix() for picture in pictures])}
            for i, pictures in enumerate(group.images)
        ],
        "texts": [
            {"id": f"t{c}", "text": candidate.text} | ({} if candidate.prompt == shared else {"prompt": candidate.prompt})
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
    return row | ({"meta": own} if own else {})


def _pictures(image: Mapping[str, Any], root: Path, where: str) -> Pictures:
    path = _required(image, "path", where)
    listed = path if isinstance(path, list) else [] if path is None else [path]
    if not all(isinstance(name, str) for name in listed) or path == []:
        raise DataError(f"{where}: 'path' must be a string, a list of strings, or null for text alone, not {path!r}")
    return tuple(root / name for name in listed)


def _paths(names: list[str]) -> str | list[str] | None:
    return names if len(names) > 1 else names[0] if names else None


def _required(row: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in row:
        raise DataError(f"{where}: key {key!r} is missing; add it")
    return row[key]


def _string(row: Mapping[str, Any], key: str, where: str) -> str:
    value = _required(row, key, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} must be a string, not {value!r}")
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(f"{where} must be a number, not {value!r}")
    return float(value)


def _items(row: Mapping[str, Any], key: str, allowed: Iterable[str], where: str) -> list[Mapping[str, Any]]:
    items = _required(row, key, where)
    if not isinstance(items, list) or not items or not all(isinstance(item, Mapping) for item in items):
        raise DataError(f"{where}: {key!r} must be a non-empty list of objects")
    for item in items:
        check_keys(item, allowed, f"{where}: {key}")
    return items


def _index(items: list[Mapping[str, Any]], where: str) -> dict[str, int]:
    index: dict[str, int] = {}
    for position, item in enumerate(items):
        name = _string(item, "id", where)
        if name in index:
            raise DataError(f"{where}: id {name!r} occurs twice; make ids unique")
        index[name] = position
    return index


def _lookup(index: Mapping[str, int], name: Any, where: str) -> int:
    if not isinstance(name, str) or name not in index:
        raise DataError(f"{where}: no id {name!r}; known: {', '.join(index)}")
    return index[name]
