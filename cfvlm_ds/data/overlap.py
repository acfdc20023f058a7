"""What a training set has in common with evaluation sets: their pictures, and whole rows. A result on what was trained on says little."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cfvlm_ds.core.conversation import normalised, normalised_prompt
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.text import hashed
from cfvlm_ds.data.passes import contains
from cfvlm_ds.data.picture_index import PictureTable, picture_key

Array = npt.NDArray[Any]


class Shared(NamedTuple):
    """Of an evaluation set: how many of its distinct rows and pictures training has too, and how many there are."""

    rows: int
    pictures: int
    num_rows: int
    num_pictures: int

    def __str__(self) -> str:
        parts = [(self.rows, self.num_rows, "rows"), (self.pictures, self.num_pictures, "pictures")]
        return " and ".join(f"{count} of its {number} {what}" for count, number, what in parts if count)


class Keys(NamedTuple):
    """Sorted distinct keys of 64 bits: of what rows say, and of pictures."""

    rows: Array
    pictures: Array


def shared_with(train: Keys, evaluation: Keys) -> Shared:
    """Count what an evaluation set shares with the training set.

    A row is its prompts, texts and pictures, whatever its id, order of texts or labels; a picture is its contents where they are known,
    its path otherwise.
    """
    rows, pictures = (int(contains(had, asked).sum()) for had, asked in zip(train, evaluation, strict=True))
    return Shared(rows, pictures, *map(len, evaluation))


def keys_of(groups: Iterable[CounterfactualGroup], pictures: PictureTable | None) -> Keys:
    """The keys of groups, whose pictures' contents are in the table."""
    rows, shown = set[int](), set[int]()
    for group in groups:
        of_images = [[_picture(picture, pictures) for picture in image] for image in group.images]
        shown.update(key for keys in of_images for key in keys)
        rows.add(row_key(group, of_images))
    return Keys(*(np.unique(np.fromiter(found, np.uint64, len(found))) for found in (rows, shown)))


def joined_keys(parts: Sequence[Keys]) -> Keys:
    """The keys of several parts of a data set."""
    return Keys(*(np.unique(np.concatenate(each)) for each in zip(*parts, strict=True)))


def row_key(group: CounterfactualGroup, pictures: Sequence[Sequence[int]]) -> int:
    """64 bits that stand for what a row says, whatever its id, the order of its texts and images, or its labels; ``pictures`` are the keys
    of each image's."""
    texts = sorted((json.dumps(normalised_prompt(each.prompt), default=str), normalised(each.text)) for each in group.candidates)
    return hashed(json.dumps([texts, sorted(map(list, pictures))], ensure_ascii=False))


def _picture(path: Any, pictures: PictureTable | None) -> int:
    known = pictures.find(path) if pictures is not None else None
    return picture_key(path) if known is None else int.from_bytes(known.digest[:8], "little")
