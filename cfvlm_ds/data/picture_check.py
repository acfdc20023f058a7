"""The pictures of a manifest: each is opened once, and those of a group are compared with each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cfvlm_ds.core.distributed import cores_per_rank
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup, Pictures
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.data.decoding import MAX_BYTES, open_image
from cfvlm_ds.data.passes import Scan
from cfvlm_ds.data.picture_file import picture_bytes, picture_stat
from cfvlm_ds.data.picture_index import Picture, PictureTable, digest_of, find, picture_key, picture_of
from cfvlm_ds.data.report import CheckReport
from cfvlm_ds.data.store import GroupStore, told_apart
from cfvlm_ds.data.stored import StoredRows

_CHUNK = 64  # pictures that are opened before any is handed on

Array = npt.NDArray[Any]


def open_pictures(
    report: CheckReport, store: GroupStore, keys: Array, places: Array, max_pixels: int, progress: Callable[[str], object], scan: Scan
) -> tuple[PictureTable, dict[int, str]]:
    """Open each picture once; returns those that are sound, and what is wrong with each other one by its key.

    A problem is named by the first group that shows the picture.
    """
    broken = dict[int, str]()

    def sound() -> Iterator[tuple[Path, Picture]]:
        counted = Progress(progress, "check of images", len(keys), "images")
        for each in counted.over(opened_pictures(store, keys, places, max_pixels, scan)):
            if isinstance(each.found, Picture):
                yield each.path, each.found
            else:
                broken[picture_key(each.path)] = each.found
                report.problems.append(f"{store.where(each.group)}: {each.found}")

    return PictureTable.of(sound()), broken


def first_uses(store: GroupStore, keys: Array, places: Array) -> Iterator[tuple[int, Path]]:
    """The pictures with these keys, each with the group that shows it first; only those groups are read."""
    left = np.ones(len(keys), bool)
    for index in np.unique(places).tolist():
        group = store.entry(index)
        for image in () if isinstance(group, DataError) else group.images:
            for picture in image:
                if (found := find(keys, picture_key(picture))) is not None and left[found] and places[found] == index:
                    left[found] = False
                    yield index, picture


class OpenedPicture(NamedTuple):
    """A picture, the first group that shows it, what is to be known of it or what is wrong with it, and its bytes if they are wanted."""

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
    """Open the pictures with these keys, except those that are ``known`` and have not been written since."""
    # Threads suffice: PIL decodes without holding the interpreter lock. Chunks bound the memory of pending work for millions of files.
    prepared = store.rows.pictures if isinstance(store.rows, StoredRows) else None
    wanted, pool = first_uses(store, keys, places), ThreadPoolExecutor(cores_per_rank())
    look = partial(opened_picture, known=known, prepared=prepared, max_pixels=max_pixels, contents=contents)
    try:
        while chunk := [use for _, use in zip(range(_CHUNK), wanted, strict=False)]:
            for (index, path), found in zip(chunk, pool.map(look, [path for _, path in chunk]), strict=True):
                scan.alive()
                yield OpenedPicture(index, path, *found)
    finally:
        pool.shutdown(cancel_futures=True)


def opened_picture(
    path: Path, known: PictureTable | None, prepared: PictureTable | None, max_pixels: int, contents: bool
) -> tuple[Picture | str, bytes]:
    """What is to be known of a picture, or what is wrong with it, and its bytes if they are wanted: opened unless it is ``known`` and has
    not been written since. One of a store must be the one that was ``prepared``."""
    try:
        before = None if known is None else known.find(path)
        if before is not None and 0 < before.width * before.height <= max_pixels and picture_stat(path) == (before.size, before.ctime):
            return before, b""
        found = picture_of(path, *open_image(path, max_pixels).size)
        before = None if prepared is None else prepared.find(path)
        if before is not None and before._replace(ctime=found.ctime) != found:
            return f"{path}: the picture is not the one that was prepared; restore it, or prepare the data again", b""
        content = picture_bytes(path, MAX_BYTES) if contents else b""
        if contents and digest_of(content) != found.digest:
            return f"{path}: the picture was written while it was read; start again when it is whole", b""
        return found, content
    except DataError as error:
        return str(error), b""
    except (OSError, ValueError) as error:
        return f"{path}: image cannot be read ({error}); restore it, or correct its path in the manifest", b""


def equal_images(group: CounterfactualGroup, pictures: PictureTable) -> Iterator[str]:
    """What is wrong with images of a group that differ by its truth table and not by their bytes."""
    for second in range(1, len(group.images)):
        for first in range(second):
            if told_apart(group, first, second) and _same_bytes(group.images[first], group.images[second], pictures):
                files = " and ".join(", ".join(map(str, group.images[place])) for place in (second, first))
                yield (
                    f"group {group.id!r}: counterfactual image {second} equals image {first} byte for byte ({files}) though match tells "
                    "them apart; redo the edit, or remove it"
                )


def _same_bytes(first: Pictures, second: Pictures, pictures: PictureTable) -> bool:
    def same(a: Path, b: Path) -> bool:
        one, other = pictures.find(a), pictures.find(b)
        return one is not None and other is not None and (one.size, one.digest) == (other.size, other.digest)

    return all(a == b or same(a, b) for a, b in zip(first, second, strict=True))
