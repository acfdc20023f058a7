"""Picture check: each picture of a manifest is opened once, and the pictures of a group are compared with each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup, Pictures
from cfvlm_ds.core.progress import Progress, Say
from cfvlm_ds.core.ranks import cores_per_rank
from cfvlm_ds.core.sequences import side_by_side
from cfvlm_ds.data.decoding import MAX_BYTES, open_image
from cfvlm_ds.data.passes import Array, Scan
from cfvlm_ds.data.picture_file import picture_bytes, picture_stat
from cfvlm_ds.data.picture_index import Picture, PictureTable, find, picture_key, picture_of
from cfvlm_ds.data.report import CheckReport
from cfvlm_ds.data.store import GroupStore, told_apart
from cfvlm_ds.data.stored import StoredRows

_AHEAD = 64  # number of pictures opened ahead of their use


def open_pictures(
    report: CheckReport, store: GroupStore, keys: Array, places: Array, max_pixels: int, progress: Say, scan: Scan
) -> tuple[PictureTable, dict[int, str]]:
    """Open each picture once. Return a table of the readable pictures, and a mapping from each broken picture's key to its problem.

    The problems are also added to ``report``, with the location of the first group that contains the picture.
    """
    broken = dict[int, str]()

    def sound() -> Iterator[tuple[Path, Picture]]:
        counted = Progress(progress, "checking images", len(keys), "images")
        for opened in counted.over(opened_pictures(store, keys, places, max_pixels, scan)):
            if isinstance(opened.found, Picture):
                yield opened.path, opened.found
            else:
                broken[picture_key(opened.path)] = opened.found
                report.problems.append(f"{store.where(opened.group)}: {opened.found}")

    return PictureTable.of(sound()), broken


def first_uses(store: GroupStore, keys: Array, places: Array) -> Iterator[tuple[int, Path]]:
    """For each picture, yield the index of the first group that contains it, and its path. ``places[k]`` is the index of this group for the
    picture with the key ``keys[k]``. Only these groups are read.
    """
    left = np.ones(len(keys), bool)
    for index in np.unique(places).tolist():
        group = store.entry(index)
        for image in () if isinstance(group, DataError) else group.images:
            for picture in image:
                if (position := find(keys, picture_key(picture))) is not None and left[position] and places[position] == index:
                    left[position] = False
                    yield index, picture


class OpenedPicture(NamedTuple):
    """Result for a picture: the index of the first group that contains it, its path, its properties or problem, and its bytes (empty unless
    requested).
    """

    group: int
    path: Path
    found: Picture | str
    content: bytes


def opened_pictures(
    store: GroupStore,
    keys: Array,
    places: Array,
    max_pixels: int,
    scan: Scan,
    known: PictureTable | None = None,
    *,
    contents: bool = False,
) -> Iterator[OpenedPicture]:
    """Yield an OpenedPicture for each picture key. A picture in the table ``known`` is opened only if its file has changed."""
    prepared = store.rows.pictures if isinstance(store.rows, StoredRows) else None

    def opened(use: tuple[int, Path]) -> tuple[Picture | str, bytes]:
        return opened_picture(use[1], known, prepared, max_pixels, contents)

    # Threads suffice, because PIL releases the interpreter lock while decoding.
    for (index, path), result in side_by_side(opened, first_uses(store, keys, places), cores_per_rank(), _AHEAD):
        scan.alive()
        yield OpenedPicture(index, path, *result)


def opened_picture(
    path: Path, known: PictureTable | None, prepared: PictureTable | None, max_pixels: int, contents: bool
) -> tuple[Picture | str, bytes]:
    """Return a picture's properties or problem, and its bytes (empty unless requested).

    A picture in the table ``known`` is opened only if its file has changed. A picture in a store must match its entry in the table
    ``prepared``.
    """
    try:
        known_before = None if known is None else known.find(path)
        if (
            known_before is not None
            and 0 < known_before.width * known_before.height <= max_pixels
            and picture_stat(path) == (known_before.size, known_before.ctime)
        ):
            return known_before, b""
        picture = picture_of(path, *open_image(path, max_pixels).size)
        known_before = None if prepared is None else prepared.find(path)
        if known_before is not None and known_before._replace(ctime=picture.ctime) != picture:
            return f"{path}: the picture has changed since it was prepared; restore it, or prepare the data again", b""
        return picture, picture_bytes(path, MAX_BYTES) if contents else b""
    except DataError as error:
        return str(error), b""
    except (OSError, ValueError) as error:
        return f"{path}: image cannot be read ({error}); restore it, or correct its path in the manifest", b""


def equal_images(group: CounterfactualGroup, pictures: PictureTable) -> Iterator[str]:
    """Yield a problem for each pair of images in a group that are byte-identical although the truth table distinguishes them."""
    for second in range(1, len(group.images)):
        for first in range(second):
            if told_apart(group, first, second) and _same_bytes(group.images[first], group.images[second], pictures):
                files = " and ".join(", ".join(map(str, group.images[place])) for place in (second, first))
                yield (
                    f"group {group.id!r}: counterfactual image {second} is byte-identical to image {first} ({files}), but match "
                    "distinguishes them; redo the edit, or remove it"
                )


def _same_bytes(first: Pictures, second: Pictures, pictures: PictureTable) -> bool:
    def same(a: Path, b: Path) -> bool:
        one, other = pictures.find(a), pictures.find(b)
        return one is not None and other is not None and (one.size, one.digest) == (other.size, other.digest)

    return all(a == b or same(a, b) for a, b in zip(first, second, strict=True))
