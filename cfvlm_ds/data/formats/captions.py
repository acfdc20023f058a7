"""Captioned pictures from the columns of a CSV, TSV, JSON lines or COCO captions file, optionally with negative captions and negative
pictures.

    {"image": "a.jpg", "caption": "two dogs on a lawn", "negative_caption": "three dogs on a lawn", "negative_image": "a_edit.jpg"}

Columns are detected by common names (``DEFAULTS``), or mapped by options: ``captions:image=file_name,caption=text``. A column can hold
a list, ``caption=first+second`` joins two columns into one list, and ``a.b`` is the field ``b`` of column ``a``. Every caption is true of
the picture, every negative caption is false of it, and the captions are false of every negative picture. If negative captions and negative
pictures are equal in number, the k-th negative caption is true of the k-th negative picture (an edited pair), unless ``paired=false``
declares them unrelated. All other cells are unknown. In a row without a prompt, the prompt is "Describe the image."

    {"image": "a.jpg", "caption": "The cat is under the bed.", "label": 0}                                captions:label=label

``label`` names a column that marks captions as true or false. If it is set, rows with the same picture and prompt form one group. A column
that looks like a label is rejected unless ``label`` or ``ignore`` names it. A caption that is a JSON object is rejected unless
``json=true``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from cfvlm_ds.core.conversation import DESCRIBE, Prompt, check_conversation, normalised, simplest, spelled
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup, Edit, Pictures
from cfvlm_ds.core.text import quoted
from cfvlm_ds.data.fields import Row, as_list, as_meta, name, row_id, value_of, without
from cfvlm_ds.data.formats.chat import PATHS, placed, read_pictures, row_pictures, without_nulls
from cfvlm_ds.data.formats.messages import spoken_as
from cfvlm_ds.data.formats.truth import Claim, LabelledText, check_label, is_question, joined, truth_of

DEFAULTS: dict[str, tuple[str, ...]] = {
    "image": ("image", *PATHS),
    "caption": ("caption", "captions", "text", "title"),
    "negative_caption": ("negative_caption", "negative_captions", "neg_caption", "neg_captions"),
    "negative_image": ("negative_image", "negative_images"),
    "prompt": ("prompt", "question"),
    "edit": ("edit", "edit_type"),
    "id": ("id",),
}


_BROKEN_LIST = re.compile(r"""\[\s*['"].*\]$""", re.DOTALL)
"""Pattern for a text that looks like a list but cannot be parsed, such as numpy's notation without commas."""


class _Read(NamedTuple):
    """Parsed row: the columns that each option selects, the true captions, their prompt, and the pictures."""

    row: Row
    columns: dict[str, list[str]]
    texts: list[str]
    prompt: Prompt
    pictures: Pictures


@dataclass(frozen=True)
class Captions:
    """Format of rows with captioned pictures.

    Args:
        image: column with the picture or a list of pictures.
        caption: column with the captions that are true of the picture.
        negative_caption: column with the captions that are false of the picture.
        negative_image: column with pictures for which the captions are false.
        prompt: column with the prompt that the captions answer.
        edit: column with the edit type of the counterfactuals; result tables are broken down by edit type.
        id: column with the group's id.
        ask: prompt for rows that have none; empty for no prompt.
        paired: whether the k-th negative caption is true of the k-th negative picture if there are equally many of both.
        label: column that marks the caption, or each caption in a list, as true or false.
        true: values of the label that mean true, joined by ``+``.
        false: values of the label that mean false.
        json: whether captions may be JSON objects.
        ignore: columns that are not read, joined by ``+``.
    """

    image: str = ""
    caption: str = ""
    negative_caption: str = ""
    negative_image: str = ""
    prompt: str = ""
    edit: str = ""
    id: str = ""
    ask: str = DESCRIBE
    paired: bool = True
    label: str = ""
    true: str = ""
    false: str = ""
    json: bool = False
    ignore: str = ""

    usual = True
    source = "captions"
    needed: ClassVar[tuple[str, ...]] = ("image", "caption")

    def __post_init__(self) -> None:
        given = {"negative_caption": self.negative_caption, "negative_image": self.negative_image, "id": self.id}
        check_label(self.label, self.true, self.false, **given, paired=not self.paired)

    def __call__(self, row: Row) -> CounterfactualGroup:
        """Convert a row to a group. The caller adds the file and line to any DataError."""
        if self.label:
            return joined([self.claim(row)])
        read = self._read(row)
        columns, prompt, pictures = read.columns, read.prompt, read.pictures
        texts, repeated = _distinct(read.texts)
        false = self._texts(read.row, columns["negative_caption"])
        others = [read_pictures(value, f"row: {columns['negative_image'][0]!r}") for value in _listed(read.row, columns["negative_image"])]
        if others and not pictures:
            raise DataError("row: it has a negative picture but no picture; map the column of the picture, or drop the row")
        belongs = self.paired and len(false) == len(others)
        match: list[tuple[int | None, ...]] = [(1,) * len(texts) + (0,) * len(false)]
        for j in range(len(others)):
            match.append((0,) * len(texts) + tuple((1 if j == k else None) if belongs else None for k in range(len(false))))
        kept = self._kept(read, DEFAULTS) | ({"captions.repeated": repeated} if repeated else {})
        named = {"id": value_of(read.row, columns["id"][0])} if columns["id"] else {}
        images = (pictures, *others)
        contents = spelled(prompt), [*texts, *false], [[str(picture) for picture in image] for image in images]
        return CounterfactualGroup(
            id=name(named, "id", "row") if named else row_id({}, *contents),
            images=images,
            candidates=tuple(Candidate(prompt, text) for text in (*texts, *false)),
            match=tuple(match),
            edits=self._edits(read.row, columns["edit"], len(texts), len(false), len(others), belongs),
            source=self.source,
            meta=as_meta(kept),
        )

    def claim(self, row: Row) -> Claim:
        """Return the claim of a row, which contains its labelled texts. The option ``label`` must be set."""
        read = self._read(row)
        for option in ("negative_caption", "negative_image"):
            if negative := read.columns[option]:
                remedy = f"add ignore={negative[0]} to leave it out, or drop label= if every caption is true"
                raise DataError(f"row: column {negative[0]!r} cannot be combined with label={self.label}; {remedy}")
        labels = as_list(value_of(read.row, self.label))
        labels = labels if isinstance(labels, list) else [labels]
        if len(labels) != len(read.texts):
            raise DataError(f"row: {len(labels)} labels for {len(read.texts)} captions; give every caption one label")
        if read.prompt in ("", DESCRIBE) and (text := next(filter(is_question, read.texts), None)):
            remedy = f"use {self.source}:prompt={read.columns['caption'][0]},caption={self.label} if that column holds the answers"
            raise DataError(
                f"row: {quoted(text, 80)} is a question, so {self.label!r} may be its answer, not a label; {remedy}, or set ask=... if the "
                "question is itself the answer"
            )
        kind = value_of(read.row, read.columns["edit"][0]) if read.columns["edit"] else ""
        statements = [
            LabelledText(text, truth_of(label, self.label, self.true, self.false), name({"edit": kind}, "edit", "row"))
            for text, label in zip(read.texts, labels, strict=True)
        ]
        kept = self._kept(read, ("image", "caption", "prompt", "edit"))
        return Claim(read.pictures, read.prompt, tuple(statements), self.source, kept)

    def _read(self, row: Row) -> _Read:
        row = without_nulls(row, self.ignore)
        row_pictures(row, ())  # refuses videos
        columns = {option: self._columns(row, option) for option in DEFAULTS}
        for option in ("caption", *(("image",) if self.image or self.usual else ())):
            if not columns[option]:
                raise DataError(
                    f"row: no column holds the {option} (the row has {_names(row)}); map one, as in {self.source}:{option}=COLUMN"
                )
        texts = self._texts(row, columns["caption"])
        if not texts:
            raise DataError(f"row: column {columns['caption'][0]!r} has no text; write a caption or drop the row")
        pictures = read_pictures(_listed(row, columns["image"]), "row")
        if columns["image"] and not pictures:
            raise DataError(f"row: column {columns['image'][0]!r} names no picture; write its path, or drop the row")
        return _Read(row, columns, texts, *self._prompt(row, columns["prompt"], pictures))

    def _kept(self, read: _Read, options: Iterable[str]) -> dict[str, Any]:
        """Return the row without the label column and the columns that the given options select."""
        used = [column for option in options for column in read.columns[option]]
        return without(read.row, [*used, self.label] if self.label else used)

    def _texts(self, row: Row, columns: Sequence[str]) -> list[str]:
        texts = _listed(row, columns)
        for text in texts:
            if not isinstance(text, str):
                raise DataError(f"row: column {columns[0]!r} must be a text or a list of texts, not {quoted(text)}; correct it")
            if not self.json and (_BROKEN_LIST.match(text.strip()) or text.strip()[:1] + text.strip()[-1:] == "{}"):
                remedy = f"map a value of an object, as in caption={columns[0]}.KEY, write a list as JSON, or add json=true for a caption"
                raise DataError(f"row: column {columns[0]!r} holds {quoted(text, 40)}, which looks like a list or an object; {remedy}")
        return [text.strip() for text in texts]

    def _columns(self, row: Row, option: str) -> list[str]:
        """Return the row's columns for an option: those that the option names or, if it is not set, the first column with a common name.

        Raises DataError if the option names a missing column that the format needs.
        """
        if given := getattr(self, option):
            wanted = [given] if _has(row, given) else given.split("+")
            for column in wanted:
                if not _has(row, column) and option in self.needed:
                    raise DataError(f"row: column {column!r} is missing ({option}={given}); the row has {_names(row)}")
            return [column for column in wanted if _has(row, column)]
        return [column for column in DEFAULTS[option] if column in row][:1] if self.usual or option == "id" else []

    def _prompt(self, row: Row, columns: list[str], pictures: Pictures) -> tuple[Prompt, Pictures]:
        if columns and self.ask != DESCRIBE:
            raise DataError(f"row: both the column {columns[0]!r} and ask={self.ask!r} set the prompt; keep one")
        ask = self.ask if pictures or self.ask != DESCRIBE else ""
        value = (value_of(row, columns[0]) if columns else "") or ask
        if not value or (value == DESCRIBE and not columns):
            return value or "", pictures
        turns, pictures = placed(spoken_as(value, "user", columns[0] if columns else "ask"), pictures, "row")
        check_conversation(turns, "row")
        return simplest(turns), pictures

    def _edits(self, row: Row, columns: list[str], texts: int, false: int, others: int, belongs: bool) -> tuple[Edit, ...]:
        if not columns or not (false or others):
            return ()
        kind = name({"edit": value_of(row, columns[0])}, "edit", "row")
        if belongs:
            return tuple(Edit(kind, image=1 + k, text=texts + k) for k in range(false))
        return tuple(Edit(kind, text=texts + k) for k in range(false)) + tuple(Edit(kind, image=1 + k) for k in range(others))


def _has(row: Row, column: str) -> bool:
    return value_of(row, column) is not None


def _names(row: Row) -> str:
    return ", ".join(map(repr, list(row)[:20])) or "none"


def _listed(row: Row, columns: Sequence[str]) -> list[Any]:
    """Collect the values of the given columns in one list. Lists are flattened, and empty fields are skipped."""
    values: list[Any] = []
    for column in columns:
        value = value_of(row, column)
        value = as_list(value)
        values += value if isinstance(value, list) else [] if value == "" else [value]
    return values


def _distinct(texts: list[str]) -> tuple[list[str], int]:
    """Return the distinct captions of a picture, and the number of duplicates (several annotators can write the same caption)."""
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(normalised(text), text)
    return list(first.values()), len(texts) - len(first)
