"""Picture table: size, inode change time, digest and dimensions of each picture, looked up by path. All processes memory-map the table.

Before a picture is used, its file is compared with the table. If size and change time match, the picture is accepted. If only the change
time differs, the contents are hashed again. A picture with changed contents is rejected.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.progress import Progress, Say, no_op
from cfvlm_ds.core.ranks import cores_per_rank
from cfvlm_ds.core.sequences import side_by_side
from cfvlm_ds.core.text import hashed
from cfvlm_ds.data.decoding import MAX_BYTES, Size, image_size
from cfvlm_ds.data.passes import Array
from cfvlm_ds.data.picture_file import picture_bytes, picture_stat

FACTS = np.dtype([("size", "<i8"), ("ctime", "<i8"), ("digest", "V16"), ("width", "<u4"), ("height", "<u4")])
RECORD = np.dtype([("key", "<u8"), ("facts", FACTS)])
_BLOCK = 1 << 20  # records written at a time
_AT_ONCE = 4096  # pictures processed or cached at a time


class Picture(NamedTuple):
    """Properties of a readable picture: size in bytes, inode change time of its file in ns (0 in a packed store), digest of its bytes, and
    width and height in pixels (0 if unknown).
    """

    size: int
    ctime: int
    digest: bytes
    width: int
    height: int


@lru_cache(_AT_ONCE)
def picture_key(path: Path, root: Path | None = None) -> int:
    """Hash a picture's path to 64 bits. A path inside ``root`` is made relative to it, as in stores; any other path is made absolute."""
    name, folder = os.path.abspath(path), "" if root is None else os.path.join(os.path.abspath(root), "")
    return hashed(os.fsencode(name.removeprefix(folder)))


def find(keys: Array, key: int) -> int | None:
    """Return the index of ``key`` in the sorted ``keys``, or None if it is absent."""
    place = int(keys.searchsorted(np.uint64(key)))
    return place if place < len(keys) and int(keys[place]) == key else None


def content_digest(path: Path) -> bytes:
    """Hash a file's contents to 128 bits. Raises OSError, and ValueError for a file that is not regular or has more than MAX_BYTES."""
    return hashlib.blake2b(picture_bytes(path, MAX_BYTES), digest_size=16).digest()


def picture_of(path: Path, width: int, height: int) -> Picture:
    """Build a picture's table entry. Raises the same errors as picture_stat and content_digest."""
    return Picture(*picture_stat(path), content_digest(path), width, height)


class PictureTable:
    """Table of picture properties, looked up by path. The table consists of arrays sorted by picture key.

    ``roots`` are the folders that a store's picture paths are relative to; None means that paths are absolute.
    """

    def __init__(self, keys: Array, facts: Array, roots: Sequence[Path | None] = (None,)) -> None:
        self._keys, self._facts, self._roots = keys, facts, roots
        self._recent = lru_cache(_AT_ONCE)(self._find)

    @classmethod
    def opened(cls, file: Path, roots: Sequence[Path | None] = (None,)) -> PictureTable:
        """Memory-map a table file. Processes share its pages, which the system can evict when memory is short. Raises OSError."""
        count = file.stat().st_size // RECORD.itemsize
        if not count:
            return cls.of(())
        keys = np.memmap(file, np.dtype("<u8"), "r", 0, (count,))
        return cls(np.asarray(keys), np.asarray(np.memmap(file, FACTS, "r", keys.nbytes, (count,))), roots)

    @classmethod
    def of(cls, pictures: Iterable[tuple[Path, Picture]]) -> PictureTable:
        """Build a table in memory from an iterable of pictures, chunk by chunk. If a path occurs several times, its last entry is used."""
        items, parts = iter(pictures), [np.empty(0, RECORD)]
        while chunk := list(islice(items, _AT_ONCE)):
            parts.append(np.array([(picture_key(path), tuple(picture)) for path, picture in chunk], RECORD))
        records = np.concatenate(parts)[::-1]
        keys, positions = np.unique(records["key"], return_index=True)
        return cls(keys, records["facts"][positions])

    @classmethod
    def of_files(cls, paths: Iterable[Path], say: Say = no_op) -> PictureTable:
        """Build a table by hashing the contents of files. Unreadable files are left out; the error is reported when they are opened."""

        def look(path: Path) -> Picture | None:
            with contextlib.suppress(OSError, ValueError):
                return picture_of(path, 0, 0)
            return None

        distinct = list(dict.fromkeys(paths))
        counted = Progress(say, "hashing pictures", len(distinct), "pictures")
        entries = side_by_side(look, counted.over(distinct), cores_per_rank(), _AT_ONCE)
        return cls.of((path, picture) for path, picture in entries if picture is not None)

    def parts(self) -> Iterator[bytes]:
        """Yield the table in chunks of bytes. Their concatenation is a table file for ``opened``."""
        for array in (self._keys, self._facts):
            for start in range(0, len(array), _BLOCK):
                yield np.ascontiguousarray(array[start : start + _BLOCK]).tobytes()

    def __len__(self) -> int:
        return len(self._keys)

    def sides(self) -> list[int]:
        """Return the longer side of every picture, in pixels."""
        sides: list[int] = np.maximum(self._facts["width"], self._facts["height"]).tolist()
        return sides

    def find(self, path: Path) -> Picture | None:
        """Return a picture's entry, or None if the table lacks the picture."""
        return self._recent(path)

    def _find(self, path: Path) -> Picture | None:
        place = next((place for root in self._roots if (place := find(self._keys, picture_key(path, root))) is not None), None)
        if place is None:
            return None
        size, ctime, digest, width, height = self._facts[place].item()
        return Picture(size, ctime, bytes(digest), width, height)

    def verify(self, path: Path) -> None:
        """Raise DataError if the contents of a picture have changed since it was added to the table. A picture that is not in the table is
        not checked.
        """
        known = self.find(path)
        if known is None:
            return
        try:
            size, ctime = picture_stat(path)
            if (size, ctime) == (known.size, known.ctime):
                return
            same = size == known.size and content_digest(path) == known.digest
        except (OSError, ValueError):
            return  # opening the picture will report the problem
        if not same:
            raise DataError(
                f"{path}: the picture has changed since the data were checked for this run; restore it, or set another "
                "train.output_dir to train on it"
            )


class PictureTables(PictureTable):
    """Combination of tables. A picture's entry comes from the first table that has the picture."""

    def __init__(self, tables: Sequence[PictureTable]) -> None:
        self._tables = tuple(tables)

    def __len__(self) -> int:
        return sum(map(len, self._tables))

    def find(self, path: Path) -> Picture | None:
        return next((picture for table in self._tables if (picture := table.find(path)) is not None), None)


def sizes_of(paths: Iterable[Path], known: PictureTable | None, max_pixels: int, pool: Executor) -> dict[Path, Size]:
    """Return the width and height of each picture. Pictures missing from the table are opened. Raises the same errors as image_size."""
    distinct = list(dict.fromkeys(paths))
    entries = {} if known is None else {path: picture for path in distinct if (picture := known.find(path)) and picture.width}
    unknown = [path for path in distinct if path not in entries]
    sizes = {path: (picture.width, picture.height) for path, picture in entries.items()}
    return sizes | dict(zip(unknown, pool.map(partial(image_size, max_pixels=max_pixels), unknown), strict=True))
