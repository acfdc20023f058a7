"""The pictures of a manifest: each is opened once, and those of a group are compared with each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cfvlm_ds.core.distributed import cores_per_rank
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup, Pictures
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.data.decoding import open_image
from cfvlm_ds.data.packed import PackedRows
from cfvlm_ds.data.passes import Scan
from cfvlm_ds.data.picture_file import picture_stat
from cfvlm_ds.data.picture_index import Picture, PictureTable, picture_key, picture_of
from cfvlm_ds.data.report import CheckReport
from cfvlm_ds.data.store import GroupStore, told_apart

_CHUNK = 1024  # pictures that are opened before they are noted

Array = npt.NDArray[Any]


def open_pictures(
    report: CheckReport,
    store: GroupStore,
    keys: Array,
    places: Array,
    max_pixels: int,
    progress: Callable[[str], object],
    scan: Scan,
) -> None:
    """Open each picture once, named by the first group that shows it."""
    wanted = first_uses(store, keys, places)
    counted = Progress(progress, "check of images", len(keys), "images")
    for index, problem in counted.over(_open_all(wanted, packed_pictures(store), max_pixels, scan)):
        if problem is not None:
            report.problems.append(f"{store.where(index)}: {problem}")


def packed_pictures(store: GroupStore) -> PictureTable | None:
    """The pictures of a packed store as they were packed; None of any other data."""
    return store.rows.pictures if isinstance(store.rows, PackedRows) else None


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


def find(keys: Array, key: int) -> int | None:
    """The place of a key among sorted ones."""
    place = int(keys.searchsorted(np.uint64(key)))
    return place if place < len(keys) and int(keys[place]) == key else None


def _open_all(
    wanted: Iterator[tuple[int, Path]], packed: PictureTable | None, max_pixels: int, scan: Scan
) -> Iterator[tuple[int, str | None]]:
    """What is wrong with each picture, or None; the sound ones are noted, a chunk at a time."""
    # Threads suffice: PIL decodes without holding the interpreter lock. Chunks bound the memory of pending work for millions of files.
    pool = ThreadPoolExecutor(cores_per_rank())
    try:
        look = partial(opened_picture, known=scan.notes.known, packed=packed, max_pixels=max_pixels)
        while chunk := [use for _, use in zip(range(_CHUNK), wanted, strict=False)]:
            sound = []
            opened = pool.map(look, [path for _, path in chunk])
            for (index, path), found in zip(chunk, opened, strict=True):
                scan.alive()
                if isinstance(found, Picture):
                    sound.append((path, found))
                yield index, found if isinstance(found, str) else None
            scan.notes.add(sound)
    finally:
        pool.shutdown(cancel_futures=True)


def opened_picture(path: Path, known: PictureTable, packed: PictureTable | None, max_pixels: int) -> Picture | str | None:
    """What to note of a picture, or its problem; None for one that was sound before and has not been written since. One of a packed store
    is the one that was ``packed``."""
    try:
        before = known.find(path)
        if before is not None and before.width * before.height <= max_pixels and picture_stat(path) == (before.size, before.mtime):
            return None
        found = picture_of(path, *open_image(path, max_pixels).size)
        if packed is not None and (before := packed.find(path)) is not None and before != found:
            return f"{path}: the picture is not the one that was packed; copy the store whole, or pack the data again"
        return found
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"{path}: image cannot be read ({error.strerror}); restore it, or correct its path in the manifest"


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
