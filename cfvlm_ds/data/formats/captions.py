"""Captioned pictures by columns: of a CSV, TSV or JSON lines, of COCO's captions JSON, with false captions and other pictures or without.

    {"image": "a.jpg", "caption": "two dogs on a lawn", "negative_caption": "three dogs on a lawn", "negative_image": "a_edit.jpg"}

Columns are found by their usual names, or mapped: ``captions:image=file_name,caption=text``. ``DEFAULTS`` has the names. A column may hold
a list, ``caption=first+second`` takes two columns as one list, and ``a.b`` is ``b`` within ``a``. Every caption is true of the picture,
every negative caption is false of it, and the captions are false of every negative picture. Of as many negative captions as negative
pictures, the k-th caption is true of the k-th picture (an edited pair), unless ``paired=false`` says that they have nothing to do with
each other; what is not said is unknown.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cfvlm_ds.core.conversation import Prompt, check_conversation, normalised, simplest, spelled
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup, Edit, Pictures
from cfvlm_ds.core.text import quoted
from cfvlm_ds.data.formats.chat import placed, read_pictures, row_id, row_pictures, without_nulls
from cfvlm_ds.data.formats.fields import as_meta, name
from cfvlm_ds.data.formats.messages import spoken_as

DEFAULTS: dict[str, tuple[str, ...]] = {
    "image": ("image", "image_path", "img_path", "file_name", "filename", "filepath"),
    "caption": ("caption", "captions", "text", "title"),
    "negative_caption": ("negative_caption", "negative_captions", "neg_caption", "neg_captions"),
    "negative_image": ("negative_image", "negative_images"),
    "prompt": ("prompt", "question"),
    "edit": ("edit", "edit_type"),
    "id": ("id",),
}
_ITEM = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_LISTED = re.compile(rf"\[\s*{_ITEM}(?:\s*,\s*{_ITEM})*\s*\]", re.DOTALL)
"""A list of texts as Python writes it, which is what tables of published data sets have in a field."""


@dataclass(frozen=True)
class Captions:
    """Rows of columns as groups.

    Args:
        image: column of the picture, of several if it holds a list.
        caption: column of what is true of it.
        negative_caption: column of what is false of it.
        negative_image: column of pictures of which the captions are false.
        prompt: column of what the texts answer.
        edit: column of what the counterfactual changes: the type of an edit, which names a row of results.
        id: column of the group's name.
        ask: what the texts answer, the same for every row.
        paired: whether as many negative captions as negative pictures belong together.
    """

    image: str = ""
    caption: str = ""
    negative_caption: str = ""
    negative_image: str = ""
    prompt: str = ""
    edit: str = ""
    id: str = ""
    ask: str = ""
    paired: bool = True

    usual = True
    source = "captions"

    def __call__(self, row: Mapping[str, Any]) -> CounterfactualGroup:
        """Raises DataError without file and line."""
        row = without_nulls(row)
        row_pictures(row, ())  # refuses videos
        columns = {option: self._columns(row, option) for option in DEFAULTS}
        for option in ("caption", *(("image",) if self.image or self.usual else ())):
            if not columns[option]:
                names = f"the usual names are {', '.join(DEFAULTS[option])}" if self.usual else f"there are {_names(row)}"
                raise DataError(f"row: no column says what the {option} is ({names}); map one, as in {self.source}:{option}=COLUMN")
        texts, repeated = _distinct(_texts(row, columns["caption"]))
        if not texts:
            raise DataError(f"row: column {columns['caption'][0]!r} has no text; write a caption or drop the row")
        false = _texts(row, columns["negative_caption"])
        pictures, others = _pictures(row, columns["image"]), [read_pictures(p, "row") for p in _listed(row, columns["negative_image"])]
        if columns["image"] and not pictures:
            raise DataError(f"row: column {columns['image'][0]!r} names no picture; write its path, or drop the row")
        prompt, pictures = self._prompt(row, columns["prompt"], pictures)
        if others and not pictures:
            raise DataError("row: a negative picture without a picture; map the column of the picture, or drop the row")
        belongs = self.paired and len(false) == len(others)
        match: list[tuple[int | None, ...]] = [(1,) * len(texts) + (0,) * len(false)]
        for j in range(len(others)):
            match.append((0,) * len(texts) + tuple((1 if j == k else None) if belongs else None for k in range(len(false))))
        used = {each.partition(".")[0] if each not in row else each for found in columns.values() for each in found}
        kept = {key: value for key, value in row.items() if key not in used}
        kept |= {"captions.repeated": repeated} if repeated else {}
        said = [*texts, *false]
        named = {"id": value_of(row, columns["id"][0])} if columns["id"] else {}
        images = (pictures, *others)
        contents = spelled(prompt), said, [[str(picture) for picture in image] for image in images]
        return CounterfactualGroup(
            id=name(named, "id", "row") if named else row_id({}, *contents),
            images=images,
            candidates=tuple(Candidate(prompt, text) for text in said),
            match=tuple(match),
            edits=self._edits(row, columns["edit"], len(texts), len(false), len(others), belongs),
            source=self.source,
            meta=as_meta(kept),
        )

    def absent(self, row: Mapping[str, Any]) -> set[tuple[str, str]]:
        """(option, column) of the columns that options name and the row does not have; one that is null is there."""
        given = {option: named for option in DEFAULTS if (named := getattr(self, option))}
        wanted = ((option, column) for option, named in given.items() for column in ([named] if named in row else named.split("+")))
        return {(option, column) for option, column in wanted if column not in row and not _has(row, column)}

    def _columns(self, row: Mapping[str, Any], option: str) -> list[str]:
        """The columns that an option stands for: those that it names, or the first of the usual names that the row has."""
        if given := getattr(self, option):
            wanted = [given] if _has(row, given) else given.split("+")
            for column in wanted:
                if not _has(row, column) and option in ("image", "caption"):
                    raise DataError(f"row: column {column!r} is not there ({option}={given}); there are {_names(row)}")
            return [column for column in wanted if _has(row, column)]
        return [column for column in DEFAULTS[option] if column in row][:1] if self.usual or option == "id" else []

    def _prompt(self, row: Mapping[str, Any], columns: list[str], pictures: Pictures) -> tuple[Prompt, Pictures]:
        if columns and self.ask:
            raise DataError(f"row: both the column {columns[0]!r} and ask={self.ask!r} say what the texts answer; give one of them")
        value = value_of(row, columns[0]) if columns else self.ask
        if not value:
            return "", pictures
        turns, pictures = placed(spoken_as(value, "user", columns[0] if columns else "ask"), pictures, "row")
        check_conversation(turns, "row")
        return simplest(turns), pictures

    def _edits(self, row: Mapping[str, Any], columns: list[str], texts: int, false: int, others: int, belongs: bool) -> tuple[Edit, ...]:
        if not columns or not (false or others):
            return ()
        kind = name({"edit": value_of(row, columns[0])}, "edit", "row")
        if belongs:
            return tuple(Edit(kind, image=1 + k, text=texts + k) for k in range(false))
        return tuple(Edit(kind, text=texts + k) for k in range(false)) + tuple(Edit(kind, image=1 + k) for k in range(others))


def value_of(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, ``a.b`` being ``b`` within ``a``; None where it is not there."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _has(row: Mapping[str, Any], column: str) -> bool:
    return value_of(row, column) is not None


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, list(row)[:20])) or "none"


def _listed(row: Mapping[str, Any], columns: Sequence[str]) -> list[Any]:
    """What some columns hold, lists laid out; an empty field of a table holds nothing."""
    found: list[Any] = []
    for column in columns:
        value = value_of(row, column)
        value = _as_list(value) if isinstance(value, str) else value
        found += value if isinstance(value, list) else [] if value == "" else [value]
    return found


def _as_list(text: str) -> Any:
    """A list of texts that a table has in a field, in JSON or as Python writes it; any other text is itself."""
    if text[:1] + text[-1:] == "[]":
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            if _LISTED.fullmatch(text):
                try:
                    return ast.literal_eval(text)
                except (ValueError, SyntaxError, MemoryError):
                    return text
    return text


def _texts(row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    texts = _listed(row, columns)
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"row: column {columns[0]!r} must hold a text or a list of texts, not {quoted(text)}")
    return [text.strip() for text in texts]


def _pictures(row: Mapping[str, Any], columns: Sequence[str]) -> Pictures:
    return read_pictures(_listed(row, columns), "row") if columns else ()


def _distinct(texts: list[str]) -> tuple[list[str], int]:
    """The captions of a picture, and how many were said twice: people say the same."""
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(normalised(text), text)
    return list(first.values()), len(texts) - len(first)
