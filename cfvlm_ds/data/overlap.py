"""What a training set has in common with evaluation sets: their pictures, and whole rows. A result on what was trained on says little."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cfvlm_ds.core.conversation import normalised, normalised_prompt
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.data.passes import Done, Scan, contains
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


class _Keys(NamedTuple):
    """Sorted distinct keys of 64 bits."""

    rows: Array
    pictures: Array


def shared_with(
    train: Sequence[CounterfactualGroup],
    evaluation: Mapping[str, Sequence[CounterfactualGroup]],
    pictures: PictureTable | None,
    scan: Scan,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, Shared]:
    """What each evaluation set shares with the training set.

    A row is its prompts, texts and pictures, whatever its id, order of texts or labels; a picture is its contents where they are known,
    its path otherwise. Rows that cannot be read were named by the check. ``say`` is told how far it is. Memory: 8 bytes for each row and
    picture of the evaluation sets.
    """
    wanted = {
        name: _all_keys(groups, pictures, scan, Progress(say, f"overlap: {name}", len(groups), "groups"))
        for name, groups in evaluation.items()
    }
    names = list(wanted)
    every = [np.unique(np.concatenate([np.empty(0, np.uint64), *(wanted[name][k] for name in names)])) for k in range(2)]
    hits = [np.zeros(len(keys), bool) for keys in every]

    def work(places: Sequence[int], done: Done) -> list[Array]:
        found = _keys((train[index] for index in places), pictures, done)
        return [np.flatnonzero(contains(np.asarray(mine), keys)) for mine, keys in zip(found, every, strict=True)]

    if any(len(keys) for keys in every):
        for part in scan.over(range(len(train)), work, Progress(say, "overlap: training groups", len(train), "groups")):
            for hit, places in zip(hits, part, strict=True):
                hit[places] = True
    found = {}
    for name in names:
        counts = [int(hit[np.searchsorted(keys, mine)].sum()) for hit, keys, mine in zip(hits, every, wanted[name], strict=True)]
        found[name] = Shared(*counts, *map(len, wanted[name]))
    return found


def _all_keys(groups: Sequence[CounterfactualGroup], pictures: PictureTable | None, scan: Scan, progress: Progress) -> _Keys:
    def work(places: Sequence[int], done: Done) -> _Keys:
        return _keys((groups[index] for index in places), pictures, done)

    parts = list(scan.over(range(len(groups)), work, progress))
    return _Keys(*(np.unique(np.concatenate([np.empty(0, np.uint64), *(part[k] for part in parts)])) for k in range(2)))


def row_key(group: CounterfactualGroup, pictures: Sequence[Sequence[int]]) -> int:
    """64 bits that stand for what a row says, whatever its id, the order of its texts and images, or its labels; ``pictures`` are the keys
    of each image's."""
    texts = sorted((json.dumps(normalised_prompt(each.prompt), default=str), normalised(each.text)) for each in group.candidates)
    content = json.dumps([texts, sorted(map(list, pictures))], ensure_ascii=False).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _keys(groups: Any, pictures: PictureTable | None, done: Done) -> _Keys:
    rows, shown = set[int](), set[int]()
    for group in groups:
        of_images = [[_picture(picture, pictures) for picture in image] for image in group.images]
        shown.update(key for keys in of_images for key in keys)
        rows.add(row_key(group, of_images))
        done()
    return _Keys(*(np.unique(np.fromiter(found, np.uint64, len(found))) for found in (rows, shown)))


def _picture(path: Any, pictures: PictureTable | None) -> int:
    known = pictures.find(path) if pictures is not None else None
    return picture_key(path) if known is None else int.from_bytes(known.digest[:8], "little")
