"""Stores: data sets that ``cfvlm-ds data prepare`` writes and training opens. A store consists of indexed files of rows, a table of
pictures and smaller tables, and store.json.

The files listed in store.json never change. When a store is opened, their sizes and the checksums of the indexes and tables are verified.
Modification times are not, so a copy of a store is valid. Pictures are in tars in the store or in their original files. The table gives the
file size, digest and dimensions of every picture, so no picture has to be opened to determine them.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.files import crc32_of
from cfvlm_ds.core.reading import MALFORMED, read_json
from cfvlm_ds.core.untrusted import own_file
from cfvlm_ds.data.cfgroup import NATIVE, from_row
from cfvlm_ds.data.lines import IndexedLines, index_file
from cfvlm_ds.data.overlap import Keys
from cfvlm_ds.data.picture_index import PictureTable
from cfvlm_ds.data.rows import LineRows
from cfvlm_ds.data.store import GroupStore

SCHEMA = "cfstore/3"
FILE, PICTURES, TOGETHER, ROW_KEYS, PICTURE_KEYS = "store.json", "pictures.table", "together.npy", "row_keys.npy", "picture_keys.npy"
PARTS = "parts"
"""Name of the folder for unfinished work."""
BEGUN = f"{PARTS}/source.json"


def is_store(folder: Path) -> bool:
    """Return whether a folder is a store, complete or unfinished."""
    return os.path.lexists(folder / FILE) or (folder / BEGUN).is_file()


class StoredRows:
    """Rows of a store, and the results of its data check.

    Args:
        folder: the store.
        roots: folders of the pictures; used if the folders recorded in the store no longer exist.

    Raises DataError for a folder that is not a store, or whose files do not match store.json.
    """

    def __init__(self, folder: Path, roots: Sequence[Path] = ()) -> None:
        self.path = folder
        self._file, self._remedy = folder / FILE, "prepare the data again, or copy the complete store"
        if not os.path.lexists(self._file):
            begun = ": run `cfvlm-ds data prepare` again, for all shards" if (folder / BEGUN).is_file() else "; name the data file"
            raise DataError(f"{folder} is not a complete store{begun}")
        try:
            record = read_json(self._file)
            if record["schema"] != SCHEMA:
                raise ValueError(f"its schema is not {SCHEMA}")
            names = set[str]()
            for entry in (*record["rows"], *record["images"], *record["tables"]):
                file = own_file(folder, entry["file"], self._file)
                size = file.stat().st_size if file.is_file() else "no"
                if size != entry["bytes"]:
                    raise ValueError(f"{file.name} has {size} bytes instead of {entry['bytes']}")
                names.add(file.name)
            if strange := [entry["file"] for entry in record["tables"] if crc32_of(folder / entry["file"]) != entry["crc32"]]:
                raise ValueError(f"{strange[0]} has changed since it was prepared")
            before = [Path(str(root)) for root in record["roots"]]
            self.roots = (folder,) if record["images"] else tuple(before if before[0].is_dir() or not roots else roots)
            """Folders that picture paths are relative to."""
            self.stamp, self.identity, self.found = str(record["source"]), dict(record["identity"]), dict(record["found"])
            """Hash of the source's files and of the options, identity of the data set, and counts from the data check."""
            self.pictures = PictureTable.opened(folder / PICTURES, self.roots) if PICTURES in names else None
            """Properties of the pictures at the time of preparation; None if no picture was opened."""
            self.keys = Keys(*(_mapped(folder / name) for name in (ROW_KEYS, PICTURE_KEYS)))
            self.together = _mapped(folder / TOGETHER) if TOGETHER in names else None
            """Index of each source row's first group, followed by the total number of groups; None if every row was one group."""
            shards = [(folder / entry["file"], int(entry["index"]), int(entry["groups"])) for entry in record["rows"]]
            self._firsts = list(accumulate((groups for *_, groups in shards), initial=0))
            if not 0 < self._firsts[-1] == record["groups"] == self.identity["rows"]:
                raise ValueError("its files have a different number of groups")
        except MALFORMED as error:
            if isinstance(error, DataError):
                raise
            reason = error.strerror if isinstance(error, OSError) else f"key {error}" if isinstance(error, KeyError) else error
            raise DataError(f"{self._file}: the store cannot be read ({reason}); {self._remedy}") from error
        except ConfigError as error:
            raise DataError(str(error)) from error
        self._shards = [self._opened(*shard) for shard in shards]

    def __len__(self) -> int:
        return self._firsts[-1]

    def where(self, row: int) -> str:
        rows, place = self._find(row)
        return rows.where(place)

    def value(self, row: int) -> Any:
        rows, place = self._find(row)
        return rows.value(place)

    def _find(self, row: int) -> tuple[LineRows, int]:
        shard = bisect_right(self._firsts, row) - 1
        return self._shards[shard], row - self._firsts[shard]

    def _opened(self, file: Path, index: int, groups: int) -> LineRows:
        """Open a file of rows. The index contains a checksum of each row, and store.json contains the index's checksum, so a file from
        another store is detected.
        """
        try:
            if crc32_of(index_file(file)) != index or len(lines := IndexedLines.mapped(file)) != groups:
                raise ValueError("its index does not match store.json")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"{file}: the rows cannot be read ({reason}); {self._remedy}") from error
        return LineRows(lines)


def _mapped(file: Path) -> Any:
    return np.lib.format.open_memmap(file, mode="r")


def open_store(path: Path, roots: Sequence[Path] = (), limit: int | None = None) -> GroupStore:
    """Open the groups of a store. Raises the same errors as StoredRows."""
    stored = StoredRows(path, roots)
    return GroupStore(stored, stored.roots, from_row, None, NATIVE, limit)
