"""Captioned pictures by columns: of a CSV, TSV or JSON lines, of COCO's captions JSON, with false captions and other pictures or without.

    {"image": "a.jpg", "caption": "two dogs on a lawn", "negative_caption": "three dogs on a lawn", "negative_image": "a_edit.jpg"}

Columns are found by their usual names, or mapped: ``captions:image=file_name,caption=text``. ``DEFAULTS`` has the names. A column may hold
a list, ``caption=first+second`` takes two columns as one list, and ``a.b`` is ``b`` within ``a``. Every caption is true of the picture,
every negative caption is false of it, and the captions are false of every negative picture. Of as many negative captions as negative
pictures, the k-th caption is true of the k-th picture (an edited pair), unless ``paired=false`` says that they have nothing to do with
each other; what is not said is unknown. Captions answer "Describe the image." in a row without a prompt.

    {"image": "a.jpg", "caption": "The cat is under the bed.", "label": 0}                                captions:label=label

With ``label``, a column says whether the caption is true, and the rows of one picture and prompt are one group. A column that looks like a
label is refused until it is named, or ignored, and so is a caption that is a JSON object.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cfvlm_ds.core.conversation import DESCRIBE, Prompt, check_conversation, normalised, simplest, spelled
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup, Edit, Pictures
from cfvlm_ds.core.text import quoted
from cfvlm_ds.data.fields import as_list, as_meta, json_object, name, row_id, value_of, without
from cfvlm_ds.data.formats.chat import PATHS, placed, read_pictures, row_pictures, without_nulls
from cfvlm_ds.data.formats.messages import spoken_as
from cfvlm_ds.data.formats.truth import Claim, Said, check_label, is_question, joined, truth_of

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
"""A list of texts that is none, as numpy prints one without commas, once those that can be read are."""


class _Read(NamedTuple):
    """What a row says: its columns by option, what is true of its pictures, and what that answers."""

    row: Mapping[str, Any]
    columns: dict[str, list[str]]
    texts: list[str]
    prompt: Prompt
    pictures: Pictures


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
        ask: what the texts of a row without a prompt answer; empty for no prompt at all.
        paired: whether as many negative captions as negative pictures belong together.
        label: column that says whether the caption is true: of a list of captions, a list.
        true: its values that mean true, joined by ``+``.
        false: its values that mean false.
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

    def __post_init__(self) -> None:
        given = {"negative_caption": self.negative_caption, "negative_image": self.negative_image, "id": self.id}
        check_label(self.label, self.true, self.false, **given, paired=not self.paired)

    def __call__(self, row: Mapping[str, Any]) -> CounterfactualGroup:
        """Raises DataError without file and line."""
        if self.label:
            return joined([self._claim(row)])
        read = self._read(row)
        columns, prompt, pictures = read.columns, read.prompt, read.pictures
        texts, repeated = _distinct(read.texts)
        false = self._texts(read.row, columns["negative_caption"])
        others = [read_pictures(each, "row") for each in _listed(read.row, columns["negative_image"])]
        if others and not pictures:
            raise DataError("row: a negative picture without a picture; map the column of the picture, or drop the row")
        belongs = self.paired and len(false) == len(others)
        match: list[tuple[int | None, ...]] = [(1,) * len(texts) + (0,) * len(false)]
        for j in range(len(others)):
            match.append((0,) * len(texts) + tuple((1 if j == k else None) if belongs else None for k in range(len(false))))
        kept = self._kept(read, DEFAULTS) | ({"captions.repeated": repeated} if repeated else {})
        said = [*texts, *false]
        named = {"id": value_of(read.row, columns["id"][0])} if columns["id"] else {}
        images = (pictures, *others)
        contents = spelled(prompt), said, [[str(picture) for picture in image] for image in images]
        return CounterfactualGroup(
            id=name(named, "id", "row") if named else row_id({}, *contents),
            images=images,
            candidates=tuple(Candidate(prompt, text) for text in said),
            match=tuple(match),
            edits=self._edits(read.row, columns["edit"], len(texts), len(false), len(others), belongs),
            source=self.source,
            meta=as_meta(kept),
        )

    @property
    def claim(self) -> Callable[[Mapping[str, Any]], Claim] | None:
        """What a row claims, where rows have labels."""
        return self._claim if self.label else None

    def _claim(self, row: Mapping[str, Any]) -> Claim:
        read = self._read(row)
        for option in ("negative_caption", "negative_image"):
            if negative := read.columns[option]:
                remedy = f"say ignore={negative[0]} if they are to be left out, or drop label= if every caption is true"
                raise DataError(f"row: column {negative[0]!r} is not read beside label={self.label}; {remedy}")
        labels = as_list(value_of(read.row, self.label))
        labels = labels if isinstance(labels, list) else [labels]
        if len(labels) != len(read.texts):
            raise DataError(f"row: {len(labels)} labels and {len(read.texts)} captions; give each caption one")
        if read.prompt in ("", DESCRIBE) and (text := next(filter(is_question, read.texts), None)):
            remedy = f"say {self.source}:prompt={read.columns['caption'][0]},caption={self.label} if that column has the answers"
            raise DataError(
                f"row: {quoted(text, 80)} is a question, and {self.label!r} may be its answer, not a label; {remedy}, or ask=... if the "
                "question itself answers something"
            )
        kind = value_of(read.row, read.columns["edit"][0]) if read.columns["edit"] else ""
        said = [
            Said(text, truth_of(label, self.label, self.true, self.false), name({"edit": kind}, "edit", "row"))
            for text, label in zip(read.texts, labels, strict=True)
        ]
        kept = self._kept(read, ("image", "caption", "prompt", "edit"))
        return Claim(read.pictures, read.prompt, tuple(said), self.source, kept)

    def _read(self, row: Mapping[str, Any]) -> _Read:
        row = without_nulls(row, self.ignore)
        row_pictures(row, ())  # refuses videos
        columns = {option: self.columns_of(row, option) for option in DEFAULTS}
        for option in ("caption", *(("image",) if self.image or self.usual else ())):
            if not columns[option]:
                names = f"the usual names are {', '.join(DEFAULTS[option])}" if self.usual else f"there are {_names(row)}"
                raise DataError(f"row: no column says what the {option} is ({names}); map one, as in {self.source}:{option}=COLUMN")
        texts = self._texts(row, columns["caption"])
        if not texts:
            raise DataError(f"row: column {columns['caption'][0]!r} has no text; write a caption or drop the row")
        pictures = read_pictures(_listed(row, columns["image"]), "row")
        if columns["image"] and not pictures:
            raise DataError(f"row: column {columns['image'][0]!r} names no picture; write its path, or drop the row")
        return _Read(row, columns, texts, *self._prompt(row, columns["prompt"], pictures))

    def _kept(self, read: _Read, options: Iterable[str]) -> dict[str, Any]:
        """The columns that are none of these options', nor the label."""
        used = [each for option in options for each in read.columns[option]]
        return without(read.row, [*used, self.label] if self.label else used)

    def as_answer(self, row: Mapping[str, Any], column: str) -> str:
        """What maps a column as the answer to a row's caption; an empty text where that is no question."""
        read = self._read(row)
        asked = read.columns["caption"][0]
        return f"{self.source}:prompt={asked},caption={column}" if is_question(read.texts[0]) else ""

    def _texts(self, row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
        texts = _listed(row, columns)
        for text in texts:
            if not isinstance(text, str):
                raise DataError(f"row: column {columns[0]!r} must hold a text or a list of texts, not {quoted(text)}; write it as one")
            if not self.json and _BROKEN_LIST.match(text.strip()):
                what = f"{quoted(text, 40)}, which looks like a list and is broken"
                raise DataError(f"row: column {columns[0]!r} holds {what}; write it as JSON, or say json=true if it is a caption as it is")
            if not self.json and text.strip()[:1] + text.strip()[-1:] == "{}":
                said = json_object(text)
                what = f"a JSON object ({_names(said)}), not a text" if said else f"{quoted(text, 40)}, which looks like JSON and is broken"
                key = next(iter(said)) if len(said) == 1 else "KEY"
                remedy = f"name what is said, as in caption={columns[0]}.{key}" if said else "correct it"
                if {"chosen", "rejected"} <= said.keys():
                    remedy = "name the format preference, which reads it"
                raise DataError(f"row: column {columns[0]!r} holds {what}; {remedy}, or say json=true if it is a caption as it is")
        return [text.strip() for text in texts]

    def columns_of(self, row: Mapping[str, Any], option: str) -> list[str]:
        """The columns that an option stands for: those that it names, or the first of the usual names that the row has."""
        if given := getattr(self, option):
            wanted = [given] if _has(row, given) else given.split("+")
            for column in wanted:
                if not _has(row, column) and option in ("image", "caption"):
                    raise DataError(f"row: column {column!r} is not there ({option}={given}); there are {_names(row)}")
            return [column for column in wanted if _has(row, column)]
        return [column for column in DEFAULTS[option] if column in row][:1] if self.usual or option == "id" else []

    def _prompt(self, row: Mapping[str, Any], columns: list[str], pictures: Pictures) -> tuple[Prompt, Pictures]:
        if columns and self.ask != DESCRIBE:
            raise DataError(f"row: both the column {columns[0]!r} and ask={self.ask!r} say what the texts answer; give one of them")
        ask = self.ask if pictures or self.ask != DESCRIBE else ""
        value = (value_of(row, columns[0]) if columns else "") or ask
        if not value or (value == DESCRIBE and not columns):
            return value or "", pictures
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


def _has(row: Mapping[str, Any], column: str) -> bool:
    return value_of(row, column) is not None


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, list(row)[:20])) or "none"


def _listed(row: Mapping[str, Any], columns: Sequence[str]) -> list[Any]:
    """What some columns hold, lists laid out; an empty field of a table holds nothing."""
    found: list[Any] = []
    for column in columns:
        value = value_of(row, column)
        value = as_list(value)
        found += value if isinstance(value, list) else [] if value == "" else [value]
    return found


def _distinct(texts: list[str]) -> tuple[list[str], int]:
    """The captions of a picture, and how many were said twice: people say the same."""
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(normalised(text), text)
    return list(first.values()), len(texts) - len(first)
