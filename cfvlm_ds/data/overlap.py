"""Overlap between a training set and evaluation sets: shared pictures and rows, on which results are not informative."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cfvlm_ds.core.conversation import normalised, normalised_prompt
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.text import hashed
from cfvlm_ds.data.passes import Array, contains
from cfvlm_ds.data.picture_index import PictureTable, picture_key


class Shared(NamedTuple):
    """Numbers of distinct rows and pictures in an evaluation set: shared with the training set, and in total."""

    rows: int
    pictures: int
    num_rows: int
    num_pictures: int

    def __str__(self) -> str:
        parts = [(self.rows, self.num_rows, "rows"), (self.pictures, self.num_pictures, "pictures")]
        return " and ".join(f"{count} of its {number} {what}" for count, number, what in parts if count)


class Keys(NamedTuple):
    """Sorted distinct 64-bit keys of row contents and of pictures."""

    rows: Array
    pictures: Array


def shared_with(train: Keys, evaluation: Keys) -> Shared:
    """Count the rows and pictures that an evaluation set shares with the training set.

    Rows are equal if their prompts, texts and pictures are equal, regardless of ids, labels and order. Pictures are compared
    by contents if these are known, otherwise by path.
    """
    rows, pictures = (int(contains(train_keys, keys).sum()) for train_keys, keys in zip(train, evaluation, strict=True))
    return Shared(rows, pictures, *map(len, evaluation))


def keys_of(groups: Iterable[CounterfactualGroup], pictures: PictureTable | None) -> Keys:
    """Compute the keys of groups. ``pictures`` contains picture digests; if it is None, pictures are identified by path."""
    rows, shown = set[int](), set[int]()
    for group in groups:
        of_images = [[_picture(picture, pictures) for picture in image] for image in group.images]
        shown.update(key for keys in of_images for key in keys)
        rows.add(row_key(group, of_images))
    return Keys(*(np.unique(np.fromiter(keys, np.uint64, len(keys))) for keys in (rows, shown)))


def joined_keys(parts: Sequence[Keys]) -> Keys:
    """Merge the keys of several parts of a data set."""
    return Keys(*(_distinct(np.concatenate(keys)) for keys in zip(*parts, strict=True)))


def _distinct(keys: Array) -> Array:
    """Sort keys in place and return them without duplicates. ``np.unique`` gives the same result but takes twice the memory."""
    keys.sort()
    first = np.ones(len(keys), bool)
    np.not_equal(keys[1:], keys[:-1], out=first[1:])
    return keys[first]


def row_key(group: CounterfactualGroup, pictures: Sequence[Sequence[int]]) -> int:
    """Hash the texts, prompts and pictures of a row to 64 bits. The hash does not depend on the row's id, its labels, or the order of its
    texts and images. ``pictures`` contains the picture keys of each image.
    """
    texts = sorted((json.dumps(normalised_prompt(text.prompt), default=str), normalised(text.text)) for text in group.candidates)
    return hashed(json.dumps([texts, sorted(map(list, pictures))], ensure_ascii=False))


def _picture(path: Any, pictures: PictureTable | None) -> int:
    known = pictures.find(path) if pictures is not None else None
    return picture_key(path) if known is None else int.from_bytes(known.digest[:8], "little")
