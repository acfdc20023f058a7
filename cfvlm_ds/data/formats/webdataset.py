"""Samples of a WebDataset tar: the members ``KEY.EXTENSION`` of one key, by their extensions.

    {"__key__": "000017", "jpg": "shard-000.tar#512+60123", "txt": "two dogs on a lawn", "json": {"license": "CC0"}}

(The tar itself has ``000017.jpg``, ``000017.txt`` and ``000017.json``.) The picture is the member with a picture's extension, or ``image``;
the caption is ``txt`` or ``caption``, or said in ``json``. ``neg_caption.txt`` and ``neg_image.jpg``, as in triplets, are a false caption
and another picture. A ``json`` that is a row of ``llava``, ``messages`` or ``preference`` is read as one, about the sample's picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.data.decoding import ENDINGS
from cfvlm_ds.data.formats.captions import Captions
from cfvlm_ds.data.formats.chat import IMAGES, without_nulls
from cfvlm_ds.data.formats.llava import Llava
from cfvlm_ds.data.formats.messages import Messages
from cfvlm_ds.data.formats.preference import preference_group

PICTURES = (*ENDINGS, "image", "img")
_NEGATIVE = tuple(f"{before}{ending}" for before in ("neg_image", "negative_image") for ending in ("", *(f".{p}" for p in PICTURES)))
_TEXTS = ("txt", "caption", "caption.txt", "text", "text.txt")
_NEGATIVE_TEXTS = ("neg_caption", "neg_caption.txt", "negative_caption", "negative_caption.txt")
_CAPTIONS = Captions(image="__picture__", caption="__caption__", negative_caption="__false__", negative_image="__other__", id="__key__")


def webdataset_group(row: Mapping[str, Any]) -> CounterfactualGroup:
    """One sample as a group. Raises DataError without file and line."""
    given = without_nulls(row)
    row = {key.lower(): value for key, value in given.items()}
    if len(row) < len(given):
        raise DataError(
            f"sample {row.get('__key__')!r} has members that differ in upper and lower case alone ({', '.join(given)}); keep one"
        )
    said = row.pop("json", {})
    if not isinstance(said, Mapping):
        raise DataError(f"sample {row.get('__key__')!r}: its json is a {type(said).__name__}, not an object; write it as {{...}}")
    said = without_nulls(said)
    picture = _only(row, PICTURES)
    for keys, read in ((("conversations",), Llava()), (("messages", "completion"), Messages()), (("chosen", "rejected"), preference_group)):
        if any(key in said for key in keys):
            found = read({"id": row.get("__key__"), **_about_sample(said, row, picture)})
            assert isinstance(found, CounterfactualGroup)
            return found
    if picture is None and (named := [key for key in ("image", "jpg", "png") if isinstance(said.get(key), str)]):
        row["image"], picture = said[named[0]], "image"
    if picture is None:
        raise DataError(
            f"sample {row.get('__key__')!r} has no picture ({', '.join(row)}); its member must end in one of {', '.join(PICTURES)}"
        )
    taken = {
        "__picture__": picture,
        "__caption__": _only(row, _TEXTS),
        "__other__": _only(row, _NEGATIVE),
        "__false__": _only(row, _NEGATIVE_TEXTS),
    }
    columns = {column: row.pop(key) for column, key in taken.items() if key is not None}
    for column, keys in (("__caption__", ("caption", "text")), ("__false__", ("negative_caption", "neg_caption"))):
        found_key = next((key for key in keys if key in said), None)
        if column not in columns and found_key:
            columns[column] = said.pop(found_key)
    if "__caption__" not in columns:
        raise DataError(f"sample {row.get('__key__')!r} has no text ({', '.join(row)}); it must be in KEY.txt, or the caption of KEY.json")
    return _CAPTIONS({**said, **row, **columns})


def _about_sample(said: Mapping[str, Any], row: Mapping[str, Any], picture: str | None) -> dict[str, Any]:
    """A row about the sample's picture, which it may name as it was called elsewhere; that and further members are kept beside."""
    kept = {f"sample.{key}": value for key, value in row.items() if key not in ("__key__", picture)}
    named = [key for key in IMAGES if key in said and (not isinstance(said[key], list) or len(said[key]) == 1)]
    if picture is None or (len(named) != 1 and any(key in said for key in IMAGES)):
        return {**said, **kept}
    others = {key: value for key, value in said.items() if key not in IMAGES}
    return {**others, **kept, "image": row[picture], **{f"json.{key}": said[key] for key in named}}


def _only(row: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """The one of these members that the sample has. Raises DataError for two."""
    given = [key for key in keys if key in row]
    if len(given) > 1:
        raise DataError(
            f"sample {row.get('__key__')!r} has both {given[0]!r} and {given[1]!r}; which of them is meant is not known, remove one"
        )
    return given[0] if given else None
