"""Format detection by the keys of a row, and a sample row of each format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.data.formats.captions import DEFAULTS
from cfvlm_ds.data.formats.chat import without_nulls
from cfvlm_ds.data.formats.preference import unpacked


class Sample(NamedTuple):
    """Sample row of a format, with its description and the options it needs."""

    what: str
    row: dict[str, Any]
    options: str = ""


_ASKED = {"from": "human", "value": "<image>\nWhat colour is the bus?"}
_SYSTEM = {"role": "system", "content": "Be brief."}
_PARTS = [{"type": "image"}, {"type": "text", "text": "How many dogs are there?"}]

SAMPLES: dict[str, Sample] = {
    "cfgroup": Sample(
        "counterfactual groups: images x texts with a truth table",
        {
            "id": "dog-17", "prompt": "Describe the image.", "images": [{"id": "i0", "path": "a.jpg"}, {"id": "i1", "path": "b.jpg"}],
            "texts": [{"id": "t0", "text": "two dogs"}, {"id": "t1", "text": "three dogs"}],
            "match": [["i0", "t0", 1], ["i0", "t1", 0], ["i1", "t0", 0], ["i1", "t1", 1]],
        },
    ),
    "pairs": Sample(
        "Winoground's rows: two pictures, two captions",
        {"id": 7, "image_0": "ex_7_img_0", "image_1": "ex_7_img_1", "caption_0": "a dog bites a man", "caption_1": "a man bites a dog"},
    ),
    "cfvlm": Sample(
        "CF-VLM's published rows: a caption, and counterfactual captions with pictures",
        {
            "orig_input": "COCO Yes: <|vision_start|>a.jpg<|vision_end|>", "orig_output": "two dogs",
            "cf_samples": [{"cf_text": "three dogs", "cf_image_path": "b.jpg"}],
        },
    ),
    "llava": Sample(
        "LLaVA's and ShareGPT's conversations about pictures",
        {
            "id": "33471", "image": "a.jpg",
            "conversations": [
                _ASKED, {"from": "gpt", "value": "White and red."},
                {"from": "human", "value": "Is it moving?"}, {"from": "gpt", "value": "Yes."},
            ],
        },
    ),
    "messages": Sample(
        "chat rows of OpenAI, TRL, LLaMA-Factory, ms-swift",
        {"images": ["a.jpg"], "messages": [_SYSTEM, {"role": "user", "content": _PARTS}, {"role": "assistant", "content": "Two."}]},
    ),
    "preference": Sample(
        "a chosen and a rejected answer, rejected pictures: columns of TRL, LLaMA-Factory, ms-swift",
        {"prompt": "How many dogs are there?", "image": "a.jpg", "chosen": "Two.", "rejected": "Three."},
    ),
    "captions": Sample(
        "columns: a picture, its caption, false captions, other pictures; COCO's captions JSON",
        {"image": "a.jpg", "caption": "two dogs", "negative_caption": "three dogs", "negative_image": "b.jpg"},
    ),
    "webdataset": Sample(
        "samples of a tar: KEY.jpg with KEY.txt or KEY.json",
        {"__key__": "000017", "jpg": "shard-000.tar#512+60123", "txt": "two dogs", "json": {"license": "CC0"}},
    ),
    "hf": Sample(
        "columns of any name, each of them mapped",
        {"picture": "a.jpg", "qa": {"question": "How many dogs?", "answer": "Two."}, "wrong": ["Three.", "One."]},
        "image=picture,prompt=qa.question,caption=qa.answer,negative_caption=wrong",
    ),
}  # fmt: skip

_KEYS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("webdataset", ("__key__",)),
    ("cfgroup", ("images", "texts", "match")),
    ("pairs", ("image_0", "image_1", "caption_0", "caption_1")),
    ("cfvlm", ("orig_input", "orig_output", "cf_samples")),
    ("preference", ("chosen", "rejected")),
    ("preference", ("chosen_messages", "rejected_messages")),
    ("preference", ("response", "rejected_response")),
    ("preference", ("messages", "rejected_response")),
    ("preference", ("messages", "rejected_messages")),
    ("preference", ("messages", "rejected_images")),
    ("preference", ("chosen", "rejected_images")),
    ("llava", ("conversations",)),
    ("messages", ("messages",)),
    ("messages", ("prompt", "completion")),
    ("messages", ("query", "response")),
    ("messages", ("instruction", "output")),
)
"""Formats and their keys; the order counts, because a row may have the keys of several formats."""

_KTO = ("label", "kto_tag")
"""Columns that mark the answer of a row for KTO as good or bad: of TRL and ms-swift, and of LLaMA-Factory."""


def kto_label(rows: Iterable[Any]) -> str | None:
    """Return the column that makes conversations rows for KTO: all its values that are not null are true or false, or 1 or 0."""
    for key in _KTO:
        values = [row[key] for row in rows if isinstance(row, Mapping) and row.get(key) is not None]
        if values and all(value in (0, 1) for value in values):
            return key
    return None


def recognised(row: Mapping[str, Any], where: str) -> str:
    """Return the name of a row's format. Raises DataError, beginning with ``where``, for a row of no known format."""
    row = unpacked(without_nulls(row))
    for named, keys in _KEYS:
        if all(key in row for key in keys):
            return named
    if all(any(column in row for column in DEFAULTS[option]) for option in ("image", "caption")):
        return "captions"
    if "texts" in row or "match" in row:
        return "cfgroup"  # which reports the missing keys
    shown = ", ".join(repr(key) for key in list(row)[:20]) or "none"
    raise DataError(
        f"{where}: no format has the keys of this row ({shown}); name one, and map its columns, as in "
        "--format captions:image=COLUMN,caption=COLUMN (`cfvlm-ds data formats` lists all formats)"
    )
