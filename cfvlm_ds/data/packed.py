"""A packed store: a folder of files of rows, each with its index, of uncompressed tars of pictures, and store.json that names them all.

It may be copied anywhere, and is written by nobody: files are held against their sizes and the sums of their indexes, not against times.
What was known of each picture when it was packed is in a table of its own, so that nothing has to be opened to know sizes and contents.
"""

from __future__ import annotations

import functools
import hashlib
import os
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.reading import MIB, HeldFile, read_json
from cfvlm_ds.core.untrusted import own_file
from cfvlm_ds.data.decoding import MAX_ASPECT, MAX_PIXELS
from cfvlm_ds.data.lines import IndexedLines, state_of
from cfvlm_ds.data.picture_file import picture_file
from cfvlm_ds.data.picture_index import Picture, PictureTable
from cfvlm_ds.data.rows import LineRows

SCHEMA = "cfstore/1"
FILE, PICTURES, TOGETHER = "store.json", "pictures.table", "together.npy"
PARTS = "parts"
"""Folder of what is under way."""
BEGUN = f"{PARTS}/source.json"
_OPEN = 200  # files of rows that a process keeps open


def is_store(folder: Path) -> bool:
    """Whether a folder is a packed store, or is to become one."""
    return os.path.lexists(folder / FILE) or (folder / BEGUN).is_file()


class PackedRows:
    """The rows of a packed store, shard after shard."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError for a folder that is no store, or whose files are not those that its store.json names."""
        self.path = folder
        self.roots: tuple[Path, ...] = (folder,)
        self._file, self._remedy = folder / FILE, "pack the data again, or copy the store whole"
        if not os.path.lexists(self._file):
            begun = " whole yet: run `cfvlm-ds data pack` again, for all shards" if (folder / BEGUN).is_file() else "; name the data file"
            raise DataError(f"{folder} is a folder and no packed store{begun}")
        try:
            self.state = state_of(HeldFile(self._file))
            record = read_json(self._file)
            if record["schema"] != SCHEMA:
                raise ValueError(f"its schema is not {SCHEMA}")
            table, together = record.get("pictures"), record.get("together")
            self._sums = dict[str, str]()
            for each in (*record["rows"], *record["images"], *(each for each in (table, together) if each is not None)):
                file = own_file(folder, each["file"], self._file)
                size = file.stat().st_size if file.is_file() else "no"
                if size != each["bytes"]:
                    raise ValueError(f"{file.name} has {size} bytes and not {each['bytes']}")
                self._sums[file.name] = str(each["sha256"])
            self.pictures = None if table is None else PackedPictures(folder, record["images"], PictureTable.opened(folder / table["file"]))
            """What was known of each picture when it was packed."""
            self.together = None if together is None else np.lib.format.open_memmap(folder / together["file"], mode="r")
            """Groups before each of the rows that were packed, and in all, where a row had several."""
            self._shards = [(folder / each["file"], int(each["index"]), int(each["groups"])) for each in record["rows"]]
            self._firsts = list(accumulate((groups for *_, groups in self._shards), initial=0))
            if not self._shards or any(groups < 1 for *_, groups in self._shards):
                raise ValueError("it has a file of no rows, or none at all")
            if self.together is not None and not _are_firsts(self.together, self._firsts[-1]):
                raise ValueError(f"{together['file']} does not fit its groups")
        except (OSError, ValueError, EOFError, TypeError, KeyError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            reason = error.strerror if isinstance(error, OSError) else f"key {error}" if isinstance(error, KeyError) else error
            raise DataError(f"{self._file}: the store cannot be read ({reason}); {self._remedy}") from error
        except ConfigError as error:
            raise DataError(str(error)) from error
        self._opened = functools.lru_cache(_OPEN)(self._shard)
        for shard in range(len(self._shards)):
            self._opened(shard)

    def __len__(self) -> int:
        return self._firsts[-1]

    def where(self, row: int) -> str:
        """``file:line`` of a row, in its shard."""
        rows, place = self._find(row)
        return rows.where(place)

    def value(self, row: int) -> Any:
        """What JSON says, or a DataError that names the place."""
        rows, place = self._find(row)
        return rows.value(place)

    def altered(self, progress: Callable[[str], object], alive: Callable[[], object]) -> Iterator[str]:
        """A sentence for each file whose sha256 is not that of store.json; reads them all."""
        counted = Progress(progress, f"sha256 of the files of {self.path}", sum(map(self._size, self._sums)) / 1e6, "MB")
        for name, expected in self._sums.items():
            try:
                held, found, place = HeldFile(self.path / name), hashlib.sha256(), 0
                while block := held.read(place, MIB):
                    found.update(block)
                    place += len(block)
                    counted.advance(len(block) / 1e6)
                    alive()
            except (OSError, ValueError) as error:
                yield f"{self.path / name}: the file cannot be read ({error}); {self._remedy}"
                continue
            if found.hexdigest() != expected:
                yield f"{self.path / name}: it is not the file that was packed (its sha256 is another); {self._remedy}"

    def _size(self, name: str) -> int:
        return (self.path / name).stat().st_size

    def _find(self, row: int) -> tuple[LineRows, int]:
        shard = bisect_right(self._firsts, row) - 1
        return self._opened(shard), row - self._firsts[shard]

    def _shard(self, shard: int) -> LineRows:
        """The rows of a shard. Its index has a sum of each row, and store.json one of the index: a shard in another's place is noticed."""
        file, index, groups = self._shards[shard]
        try:
            lines = IndexedLines.open(file, fixed=True)
            if lines.file is None or index_sum(lines.file) != index or len(lines) != groups:
                raise ValueError("its index is another than store.json says")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"{file}: the rows cannot be read ({reason}); {self._remedy}") from error
        return LineRows(lines)


def _are_firsts(together: Any, groups: int) -> bool:
    """Whether an array says how many groups are before each row, and in all."""
    fits = together.dtype == np.uint32 and together.ndim == 1 and len(together) > 1 and together[0] == 0 and together[-1] == groups
    return bool(fits and (together[1:] > together[:-1]).all())


class PackedPictures(PictureTable):
    """The pictures of a store by their names in it, wherever the store is. What its table says is believed as far as a picture may be."""

    def __init__(self, folder: Path, tars: list[Mapping[str, Any]], table: PictureTable) -> None:
        self._folder, self._table, self.file = os.path.abspath(folder), table, None
        self._times = {str(each["file"]): (folder / each["file"]).stat().st_mtime_ns for each in tars}

    def __len__(self) -> int:
        return len(self._table)

    def __reduce__(self) -> Any:
        return object.__reduce__(self)

    def find(self, path: Path) -> Picture | None:
        """What was known of a picture; a file that is written from now on is one of another time."""
        time = self._times.get(picture_file(path).name)
        if time is None or os.path.abspath(path.parent) != self._folder:
            return None
        known = self._table.find(Path("/", path.name))
        if known is None or not 0 < known.width * known.height <= MAX_PIXELS:
            return None
        aspect = max(known.width, known.height) / min(known.width, known.height)
        return None if aspect > MAX_ASPECT else known._replace(mtime=time)


def index_sum(file: Path) -> int:
    """The checksum of an index."""
    total, held, place = 0, HeldFile(file), 0
    while block := held.read(place, MIB):
        total, place = zlib.crc32(block, total), place + len(block)
    return total
