"""Make a packed store of a data set: its rows in shards, and its pictures in uncompressed tars, where each is read by its offset.

A shard holds the groups of a range of rows, and the pictures that come first in it; a picture that many groups show is there once. Pictures
are packed before rows, whose names of them say where in a tar they are. What a shard is made of depends on the data set alone: whoever
packs it, in however many processes and after however many kills, its bytes are the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from cfvlm_ds.core.distributed import cores_per_rank
from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.files import remove, replace, whole_file
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.reading import MAX_RECORD, parse_json, read_bytes
from cfvlm_ds.core.untrusted import refuse_link
from cfvlm_ds.data import lines
from cfvlm_ds.data.check import first_uses, look_at_rows
from cfvlm_ds.data.decoding import MAX_BYTES, open_image
from cfvlm_ds.data.formats.cfgroup import to_row
from cfvlm_ds.data.packed import FILE, SCHEMA, index_sum
from cfvlm_ds.data.passes import Share
from cfvlm_ds.data.picture_file import part_name, picture_bytes
from cfvlm_ds.data.picture_index import picture_key
from cfvlm_ds.data.report import CheckReport
from cfvlm_ds.data.store import GroupStore

ROWS = 1 << 15
"""Groups of a shard: a few GB of photographs, and some hundred shards for ten million groups."""

_PLACE = np.dtype([("key", "<u8"), ("shard", "<u4"), ("start", "<i8"), ("length", "<i8")])
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}
_AT_ONCE = 64  # pictures that are read before they are written

Say = Callable[[str], object]


def pack(source: GroupStore, out: Path, say: Say, *, shard: int = 0, of: int = 1, max_pixels: int) -> bool:
    """Pack the shards of one process among ``of`` that share the work; returns whether the store is whole.

    Every picture is opened once, within ``max_pixels``, and every row is looked at. What is there from an earlier call is not made again.
    The pictures of all shards must be packed before any rows: where some are missing, the same call does the rest later. Raises DataError
    with the first problem of the data, ConfigError for a folder that holds something else, OSError.
    """
    stamp = _stamp(source)
    work = _begun(source, out, stamp)
    if (out / FILE).exists():
        remove(work)
        return True
    report = CheckReport(str(source.path))
    keys, places = look_at_rows(report, source, say, Share()).pictures
    if report.problems:
        more = len(report.problems) - 1
        raise DataError(report.problems[0] + (f" ({more} more: see `cfvlm-ds data check {source.path}`)" if more else ""))
    shards = range(-(-len(source) // ROWS))
    progress = Progress(say, "pictures", int((places // ROWS % of == shard).sum()), "pictures")
    for each in shards[shard::of]:
        within = places // ROWS == each
        if not (work / f"images-{each:05}.json").exists():
            _pack_pictures(source, out, work, each, keys[within], places[within], max_pixels, progress)
    if missing := [each for each in shards if not (work / f"images-{each:05}.json").exists()]:
        say(f"{out}: the pictures of {len(missing)} of {len(shards)} shards are still to be packed; run this again when they are")
        return False
    found = np.concatenate([np.load(work / f"images-{each:05}.npy", allow_pickle=False) for each in shards])
    found = found[np.argsort(found["key"])]
    progress = Progress(say, "rows", sum(min(ROWS, len(source) - each * ROWS) for each in shards[shard::of]), "groups")
    for each in shards[shard::of]:
        if not (work / f"groups-{each:05}.json").exists():
            _pack_rows(source, out, work, each, found, progress)
    if missing := [each for each in shards if not (work / f"groups-{each:05}.json").exists()]:
        say(f"{out}: the rows of {len(missing)} of {len(shards)} shards are still to be packed by others; the last one ends the store")
        return False
    record = {
        "schema": SCHEMA,
        "groups": len(source),
        "source": stamp,
        "shards": [
            {"rows": _record(work / f"groups-{each:05}.json"), "images": _record(work / f"images-{each:05}.json")} for each in shards
        ],
    }
    for left in out.glob("*.tmp"):  # by calls that were killed
        left.unlink(missing_ok=True)
    replace(out / FILE, json.dumps(record, indent=1).encode(), shared=True)
    remove(work)
    return True


def _stamp(source: GroupStore) -> str:
    """What a store is recognised by: the data set, as it is now."""
    parts = [SCHEMA, ROWS, len(source), source.rows.state, [str(root) for root in source.roots]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _begun(source: GroupStore, out: Path, stamp: str) -> Path:
    """The folder of what is under way. Raises ConfigError where the store is of other data, or no store."""
    refuse_link(out, "name the folder itself with --out")
    work, whole = out / "parts", out / FILE
    if out.exists() and not (work.is_dir() or whole.is_file()) and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there and no packed store; name another folder with --out")
    file = work / "source.json"
    if not whole.is_file():
        work.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            replace(file, json.dumps({"source": stamp}).encode(), shared=True)
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
        if _record(whole if whole.is_file() else file)["source"] == stamp:
            return work
    raise ConfigError(f"{out} was packed from another state of {source.path}; remove it, or name another folder with --out")


def _pack_pictures(
    source: GroupStore,
    out: Path,
    work: Path,
    shard: int,
    keys: npt.NDArray[Any],
    places: npt.NDArray[Any],
    max_pixels: int,
    progress: Progress,
) -> None:
    """The tar of a shard, and where in it each picture is."""
    found = []
    with whole_file(out / f"images-{shard:05}.tar", shared=True) as handle:
        written = _Summed(handle)
        for number, (key, path, content) in enumerate(_contents(source, keys, places, max_pixels)):
            suffix = path.suffix.lower()
            member = tarfile.TarInfo(f"{shard:05}-{number:07}{suffix if suffix in _SUFFIXES else ''}")
            member.size = len(content)
            written.write(member.tobuf(tarfile.USTAR_FORMAT))
            found.append((key, shard, written.size, len(content)))
            written.write(content)
            written.write(bytes(-len(content) % tarfile.BLOCKSIZE))
            progress.advance()
        written.write(bytes(2 * tarfile.BLOCKSIZE))
        written.write(bytes(-written.size % tarfile.RECORDSIZE))
    with whole_file(work / f"images-{shard:05}.npy", shared=True) as handle:
        np.save(handle, np.array(found, _PLACE), allow_pickle=False)
    _note(work / f"images-{shard:05}.json", out / f"images-{shard:05}.tar", written, pictures=len(found))


def _contents(source: GroupStore, keys: npt.NDArray[Any], places: npt.NDArray[Any], max_pixels: int) -> Iterator[tuple[int, Path, bytes]]:
    """Key, name and bytes of each picture, once it has been opened."""

    def look(use: tuple[int, Path]) -> bytes | str:
        try:
            open_image(use[1], max_pixels)
            return picture_bytes(use[1], MAX_BYTES)
        except (OSError, ValueError) as error:
            return str(error) if isinstance(error, DataError) else f"{use[1]}: image cannot be read ({error}); restore it"

    uses = first_uses(source, keys, places)
    with ThreadPoolExecutor(cores_per_rank()) as pool:
        while chunk := [use for _, use in zip(range(_AT_ONCE), uses, strict=False)]:
            for (index, path), content in zip(chunk, pool.map(look, chunk), strict=True):
                if isinstance(content, str):
                    raise DataError(f"{source.where(index)}: {content}")
                yield picture_key(path), path, content


def _pack_rows(source: GroupStore, out: Path, work: Path, shard: int, found: npt.NDArray[Any], progress: Progress) -> None:
    """The rows of a shard and their index."""
    file = out / f"groups-{shard:05}.jsonl"
    named = partial(_named, out, found)
    places = range(shard * ROWS, min((shard + 1) * ROWS, len(source)))
    with whole_file(file, shared=True) as handle:
        written = _Summed(handle)
        for index in places:
            group = source[index]
            inside = dataclasses.replace(group, images=tuple(tuple(map(named, image)) for image in group.images))
            line = json.dumps(to_row(inside, out), ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass") + b"\n"
            if len(line) > lines.MAX_LINE:
                raise DataError(f"{source.where(index)}: the row has more than {lines.MAX_LINE} bytes; split it")
            written.write(line)
            progress.advance()
    index_file = lines.write_index(file)
    _note(work / f"groups-{shard:05}.json", file, written, groups=len(places), index=index_sum(index_file))


def _named(out: Path, found: npt.NDArray[Any], picture: Path) -> Path:
    """The picture's name in the store."""
    key = np.uint64(picture_key(picture))
    at = int(found["key"].searchsorted(key))
    if at == len(found) or (place := found[at])["key"] != key:
        raise DataError(f"{picture}: the picture is not packed; the data set was written meanwhile: remove the store and pack it again")
    return out / part_name(f"images-{int(place['shard']):05}.tar", int(place["start"]), int(place["length"]))


class _Summed:
    """A file that is written, its size and its sum."""

    def __init__(self, handle: IO[bytes]) -> None:
        self._handle, self._sum, self.size = handle, hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        """Write data."""
        self._handle.write(data)
        self._sum.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        """Of what was written."""
        return self._sum.hexdigest()


def _note(file: Path, of: Path, written: _Summed, **more: int) -> None:
    replace(file, json.dumps({"file": of.name, "bytes": written.size, "sha256": written.sha256, **more}).encode(), shared=True)


def _record(file: Path) -> Any:
    return parse_json(read_bytes(file, MAX_RECORD).decode())
