"""Samples of a WebDataset tar. Members ``KEY.EXTENSION`` with the same key form a sample; their extensions are its columns.

    {"__key__": "000017", "jpg": "shard-000.tar#512+60123", "txt": "two dogs on a lawn", "json": {"license": "CC0"}}

(The tar contains ``000017.jpg``, ``000017.txt`` and ``000017.json``.) The picture is the member with a picture extension or the extension
``image``. The caption is ``txt`` or ``caption``, or a value in ``json``. ``neg_caption.txt`` and ``neg_image.jpg`` are a negative caption
and a negative picture. If ``json`` is a row in the format ``llava``, ``messages`` or ``preference``, it is read in that format, with the
sample's picture. Labels are read as in ``captions``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cfvlm_ds.core.conversation import DESCRIBE
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup, Groups
from cfvlm_ds.data.decoding import ENDINGS
from cfvlm_ds.data.fields import Row
from cfvlm_ds.data.formats.captions import Captions
from cfvlm_ds.data.formats.chat import IMAGES, only, without_nulls
from cfvlm_ds.data.formats.llava import Llava
from cfvlm_ds.data.formats.messages import Messages
from cfvlm_ds.data.formats.preference import Preference
from cfvlm_ds.data.formats.truth import Claim, check_label

PICTURES = (*ENDINGS, "image", "img")
_NEGATIVE = tuple(f"{before}{ending}" for before in ("neg_image", "negative_image") for ending in ("", *(f".{p}" for p in PICTURES)))
_TEXTS = ("txt", "caption", "caption.txt", "text", "text.txt")
_NEGATIVE_TEXTS = ("neg_caption", "neg_caption.txt", "negative_caption", "negative_caption.txt")


class _Members(Captions):
    """Captions format that reads the members of a sample as columns."""

    source = "webdataset"

    def __post_init__(self) -> None:
        """Skip the option checks, because these options are not set by the user."""


@dataclass(frozen=True)
class WebDataset:
    """Format of the samples in a WebDataset tar.

    Args:
        caption: member or ``json`` column with the caption; ``txt.KEY`` selects a value from a ``txt`` member that contains a JSON object.
        json: whether captions may be JSON objects.
        ask: prompt for the captions; empty for no prompt.
        label: member or ``json`` column that marks the text as true or false.
        true: values of the label that mean true, joined by ``+``.
        false: values of the label that mean false.
        ignore: members and ``json`` columns that are not read, joined by ``+``.
    """

    caption: str = ""
    json: bool = False
    ask: str = DESCRIBE
    label: str = ""
    true: str = ""
    false: str = ""
    ignore: str = ""

    def __post_init__(self) -> None:
        check_label(self.label, self.true, self.false)

    def __call__(self, row: Row) -> CounterfactualGroup | Groups:
        """Convert a sample to a group. The caller adds the file and line to any DataError."""
        read, columns = self._read(row)
        return read(columns)

    def claim(self, row: Row) -> Claim:
        """Return the claim of a sample, which contains its labelled texts. The option ``label`` must be set."""
        read, columns = self._read(row)
        if isinstance(read, Preference):
            raise DataError(f"{_named(row)} has a chosen and a rejected answer instead of a label; use the format without label=")
        return read.claim(columns)

    def _read(self, row: Row) -> tuple[_Members | Llava | Messages | Preference, dict[str, Any]]:
        """Return the format in which a sample is read, and the sample's columns for this format."""
        given = without_nulls(row, self.ignore)
        row = {key.lower(): value for key, value in given.items()}
        if len(row) < len(given):
            raise DataError(f"{_named(row)} has members that differ only in case ({', '.join(given)}); keep one")
        json_row = row.pop("json", {})
        if not isinstance(json_row, Mapping):
            raise DataError(f"{_named(row)}: its json is a {type(json_row).__name__}, not an object; write it as {{...}}")
        json_row = without_nulls(json_row, self.ignore)
        picture = only(row, PICTURES, "are pictures")
        labels: dict[str, Any] = {"label": self.label, "true": self.true, "false": self.false, "ignore": self.ignore}
        for keys, read in (
            (("conversations",), Llava(**labels)),
            (("messages", "completion"), Messages(**labels)),
            (("chosen", "rejected"), Preference(self.ignore)),
        ):
            if any(key in json_row for key in keys):
                if self.caption:
                    problem = f"its json has {keys[0]!r}, so caption={self.caption} would be ignored; leave the option out"
                    raise DataError(f"{_named(row)}: {problem}")
                return read, {"id": row.get("__key__"), **_about_sample(json_row, row, picture)}
        if not picture and (named := [key for key in ("image", "jpg", "png") if isinstance(json_row.get(key), str)]):
            row["image"], picture = json_row[named[0]], "image"
        if not picture:
            raise DataError(
                f"{_named(row)} has no picture (only {', '.join(row)}); the extension of a picture must be one of {', '.join(PICTURES)}"
            )
        texts = [
            only(row, members, "are texts") or next((key for key in keys if key in json_row), "")
            for members, keys in ((_TEXTS, ("caption", "text")), (_NEGATIVE_TEXTS, ("negative_caption", "neg_caption")))
        ]
        texts[0] = self.caption or texts[0]
        if not texts[0]:
            raise DataError(f"{_named(row)} has no text (only {', '.join(row)}); write it to KEY.txt, or as the caption in KEY.json")
        columns: dict[str, Any] = {
            "image": picture,
            "caption": texts[0],
            "negative_caption": texts[1],
            "negative_image": only(row, _NEGATIVE, "are negative pictures"),
            "id": "__key__",
        }
        return _Members(**columns, json=self.json, ask=self.ask, **labels), {**json_row, **row}


def _named(row: Row) -> str:
    return f"sample {row.get('__key__')!r}"


def _about_sample(json_row: Row, row: Row, picture: str) -> dict[str, Any]:
    """Return the row in the member ``json``, with the sample's picture as its image. The row's own image path and the sample's other
    members are kept as metadata.
    """
    kept = {f"sample.{key}": value for key, value in row.items() if key not in ("__key__", picture)}
    named = [key for key in IMAGES if key in json_row and (not isinstance(json_row[key], list) or len(json_row[key]) == 1)]
    if not picture or (len(named) != 1 and any(key in json_row for key in IMAGES)):
        return {**json_row, **kept}
    others = {key: value for key, value in json_row.items() if key not in IMAGES}
    return {**others, **kept, "image": row[picture], **{f"json.{key}": json_row[key] for key in named}}
