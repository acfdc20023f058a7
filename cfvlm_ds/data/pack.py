"""Make a packed store of a data set: its rows in shards, and its pictures in uncompressed tars, where each is read by its offset.

A tar holds the pictures that come first in a range of groups; a picture that many groups show is there once. Pictures are packed before
rows, which say where in a tar they are. What a file is made of depends on the data set alone: whoever packs it, in however many processes
and after however many kills, its bytes are the same.
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
from cfvlm_ds.core.reading import read_json
from cfvlm_ds.core.untrusted import refuse_link
from cfvlm_ds.data import lines
from cfvlm_ds.data.check import look_at_rows
from cfvlm_ds.data.decoding import ENDINGS, MAX_BYTES, open_image
from cfvlm_ds.data.formats.cfgroup import to_row
from cfvlm_ds.data.packed import BEGUN, FILE, PARTS, PICTURES, SCHEMA, TOGETHER, index_sum
from cfvlm_ds.data.passes import Scan
from cfvlm_ds.data.picture_check import first_uses
from cfvlm_ds.data.picture_file import part_name, picture_bytes
from cfvlm_ds.data.picture_index import FACTS, PictureTable, digest_of, picture_key
from cfvlm_ds.data.report import CheckReport
from cfvlm_ds.data.store import GroupStore

PICTURED = 1 << 15
"""Groups whose pictures are in one tar: a few GB of photographs, and some hundred files for ten million groups."""

ROWS = 1 << 18
"""Groups in one file of rows: some tens of files that a process keeps open."""

_PLACE = np.dtype([("key", "<u8"), ("tar", "<u4"), ("start", "<i8"), ("facts", FACTS)])
_SUFFIXES = {f".{ending}" for ending in ENDINGS}
_AT_ONCE = 64  # pictures that are read before they are written

Say = Callable[[str], object]


def pack(source: GroupStore, out: Path, say: Say, *, shard: int = 0, of: int = 1, max_pixels: int) -> bool:
    """Pack the shards of one process among ``of`` that scan the work; returns whether the store is whole.

    Every picture is opened once, within ``max_pixels``, and every row is looked at. What is there from an earlier call is not made again.
    The pictures of all shards must be packed before any rows: where some are missing, the same call does the rest later. Raises DataError
    with the first problem of the data, ConfigError for a folder that holds something else, OSError.
    """
    stamp = _stamp(source)
    work = _begun(source, out, stamp)
    try:
        whole = (out / FILE).exists() or _packed(source, out, work, stamp, say, shard, of, max_pixels)
    except FileNotFoundError:  # others have ended it at the same time, and taken what this call was writing for what was left
        if not (whole := (out / FILE).exists()):
            raise
    if whole:
        remove(work)
    return whole


def _packed(source: GroupStore, out: Path, work: Path, stamp: str, say: Say, shard: int, of: int, max_pixels: int) -> bool:
    """Whether the store is whole, once this call has done its part."""
    report = CheckReport(str(source.path))
    keys, places = look_at_rows(report, source, say, Scan()).pictures
    if report.problems:
        more = len(report.problems) - 1
        raise DataError(report.problems[0] + (f" ({more} more: see `cfvlm-ds data check {source.path}`)" if more else ""))
    if (out / FILE).exists():  # others have been as far meanwhile
        return True
    tars, files = (_Files(work, kind, -(-len(source) // size)) for kind, size in (("images", PICTURED), ("groups", ROWS)))
    progress = Progress(say, "pictures", int((places // PICTURED % of == shard).sum()), "pictures")
    for number in tars.missing(shard, of):
        within = places // PICTURED == number
        _pack_pictures(source, out, tars, number, keys[within], places[within], max_pixels, progress)
    if missing := tars.missing():
        say(f"{out}: the pictures of {len(missing)} of {tars.count} tars are still to be packed by others; run this again when they are")
        return False
    found = np.concatenate([np.load(tars.file(number, "npy"), allow_pickle=False) for number in range(tars.count)])
    found = found[np.argsort(found["key"])]
    progress = Progress(say, "rows", len(source) / of, "groups")
    for number in files.missing(shard, of):
        _pack_rows(source, out, files, number, found, progress)
    if missing := files.missing():
        say(f"{out}: {len(missing)} of {files.count} files of rows are still to be packed by others; who comes last ends the store")
        return False
    record = {"schema": SCHEMA, "groups": len(source), "source": stamp, "rows": files.records(), "images": tars.records()}
    record["pictures"] = _write_table(out, found)
    if source.together is not None:
        record["together"] = _write_together(out, source.together, len(source))
    for left in out.glob("*.tmp"):  # by calls that were killed
        left.unlink(missing_ok=True)
    replace(out / FILE, json.dumps(record, indent=1).encode(), shared=True)
    return True


class _Files:
    """Files of one kind, and what was noted of each when it was whole."""

    def __init__(self, work: Path, kind: str, count: int) -> None:
        self._work, self._kind, self.count = work, kind, count

    def name(self, number: int) -> str:
        """``kind-00007``."""
        return f"{self._kind}-{number:05}"

    def file(self, number: int, suffix: str) -> Path:
        """What is noted of a file."""
        return self._work / f"{self.name(number)}.{suffix}"

    def missing(self, shard: int = 0, of: int = 1) -> list[int]:
        """The files of a shard that are not whole."""
        return [number for number in range(self.count)[shard::of] if not self.file(number, "json").exists()]

    def note(self, number: int, written: _Summed, **more: int) -> None:
        """A file is whole."""
        record = {"file": written.path.name, "bytes": written.size, "sha256": written.sha256, **more}
        replace(self.file(number, "json"), json.dumps(record).encode(), shared=True)

    def records(self) -> list[Any]:
        """What was noted."""
        return [_record(self.file(number, "json")) for number in range(self.count)]


def _stamp(source: GroupStore) -> str:
    """What a store is recognised by: the data set, as it is now and as it is read."""
    roots = [str(root) for root in source.roots]
    parts = [SCHEMA, _PLACE.itemsize, PICTURED, ROWS, len(source), source.rows.state, roots, source.format]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _begun(source: GroupStore, out: Path, stamp: str) -> Path:
    """The folder of what is under way. Raises ConfigError where the store is of other data, or no store."""
    refuse_link(out, "name the folder itself with --out")
    work, whole, file = out / PARTS, out / FILE, out / BEGUN
    if out.exists() and not (file.is_file() or whole.is_file()) and (not out.is_dir() or _holds_something(out)):
        raise ConfigError(f"{out} is there and no packed store; name another folder with --out")
    if not whole.is_file():
        work.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            replace(file, json.dumps({"source": stamp}).encode(), shared=True)
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
        if _record(whole if whole.is_file() else file)["source"] == stamp:
            return work
    raise ConfigError(
        f"{out} was packed from another state of {source.path}, or with another format or root; remove it, or name another with --out"
    )


def _holds_something(out: Path) -> bool:
    """Whether a folder holds more than a call leaves that was killed, or is, before it has written anything: in the end that is removed."""
    return any(
        each.relative_to(out) != Path(PARTS) and not each.name.endswith(".tmp") for each in (*out.iterdir(), *(out / PARTS).glob("*"))
    )


def _pack_pictures(
    source: GroupStore,
    out: Path,
    tars: _Files,
    number: int,
    keys: npt.NDArray[Any],
    places: npt.NDArray[Any],
    max_pixels: int,
    progress: Progress,
) -> None:
    """A tar, and where in it each picture is."""
    found = []
    with _Summed.of(out / f"{tars.name(number)}.tar") as written:
        for k, (key, path, content, size) in enumerate(_contents(source, keys, places, max_pixels)):
            suffix = path.suffix.lower()
            member = tarfile.TarInfo(f"{number:05}-{k:07}{suffix if suffix in _SUFFIXES else ''}")
            member.size = len(content)
            written.write(member.tobuf(tarfile.USTAR_FORMAT))
            found.append((key, number, written.size, (len(content), 0, digest_of(content), *size)))
            written.write(content)
            written.write(bytes(-len(content) % tarfile.BLOCKSIZE))
            progress.advance()
        written.write(bytes(2 * tarfile.BLOCKSIZE))
        written.write(bytes(-written.size % tarfile.RECORDSIZE))
    with whole_file(tars.file(number, "npy"), shared=True) as handle:
        np.save(handle, np.array(found, _PLACE), allow_pickle=False)
    tars.note(number, written, pictures=len(found))


def _write_table(out: Path, found: npt.NDArray[Any]) -> dict[str, Any]:
    """What is known of the pictures, by their names in the store; the record of its file."""
    names = (part_name(f"images-{int(each['tar']):05}.tar", int(each["start"]), int(each["facts"]["size"])) for each in found)
    keys = np.fromiter((picture_key(Path("/", name)) for name in names), np.uint64, len(found))
    order = np.argsort(keys, kind="stable")
    with _Summed.of(out / PICTURES) as written:
        for part in PictureTable(keys[order], found["facts"][order]).parts():
            written.write(part)
    return {"file": written.path.name, "bytes": written.size, "sha256": written.sha256}


def _write_together(out: Path, firsts: npt.NDArray[Any], groups: int) -> dict[str, Any]:
    """Which groups are of one row, so that they stay together in an epoch; the record of its file."""
    held = np.append(firsts[: np.searchsorted(firsts, groups)], groups).astype("<u4")
    with _Summed.of(out / TOGETHER) as written:
        np.lib.format.write_array(written, held, allow_pickle=False)
    return {"file": written.path.name, "bytes": written.size, "sha256": written.sha256}


def _contents(
    source: GroupStore, keys: npt.NDArray[Any], places: npt.NDArray[Any], max_pixels: int
) -> Iterator[tuple[int, Path, bytes, tuple[int, int]]]:
    """Key, name, bytes and size of each picture, once it has been opened."""

    def look(use: tuple[int, Path]) -> tuple[bytes, tuple[int, int]] | str:
        try:
            size = open_image(use[1], max_pixels).size
            return picture_bytes(use[1], MAX_BYTES), size
        except (OSError, ValueError) as error:
            return str(error) if isinstance(error, DataError) else f"{use[1]}: image cannot be read ({error}); restore it"

    uses = first_uses(source, keys, places)
    with ThreadPoolExecutor(cores_per_rank()) as pool:
        while chunk := [use for _, use in zip(range(_AT_ONCE), uses, strict=False)]:
            for (index, path), seen in zip(chunk, pool.map(look, chunk), strict=True):
                if isinstance(seen, str):
                    raise DataError(f"{source.where(index)}: {seen}")
                yield picture_key(path), path, *seen


def _pack_rows(source: GroupStore, out: Path, files: _Files, number: int, found: npt.NDArray[Any], progress: Progress) -> None:
    """A file of rows and its index."""
    file, named = out / f"{files.name(number)}.jsonl", partial(_named, out, found)
    places = range(number * ROWS, min((number + 1) * ROWS, len(source)))
    with _Summed.of(file) as written:
        for index in places:
            group = source[index]
            inside = dataclasses.replace(group, images=tuple(tuple(map(named, image)) for image in group.images))
            line = json.dumps(to_row(inside, out), ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass") + b"\n"
            if len(line) > lines.MAX_LINE:
                raise DataError(f"{source.where(index)}: the row has more than {lines.MAX_LINE} bytes; split it")
            written.write(line)
            progress.advance()
    files.note(number, written, groups=len(places), index=index_sum(lines.write_index(file)))


def _named(out: Path, found: npt.NDArray[Any], picture: Path) -> Path:
    """The picture's name in the store."""
    key = np.uint64(picture_key(picture))
    at = int(found["key"].searchsorted(key))
    if at == len(found) or (place := found[at])["key"] != key:
        raise DataError(f"{picture}: the picture is not packed; the data set was written meanwhile: remove the store and pack it again")
    return out / part_name(f"images-{int(place['tar']):05}.tar", int(place["start"]), int(place["facts"]["size"]))


class _Summed:
    """A file that is written, its size and its sum."""

    def __init__(self, path: Path, handle: IO[bytes]) -> None:
        self.path, self._handle, self._sum, self.size = path, handle, hashlib.sha256(), 0

    @classmethod
    @contextlib.contextmanager
    def of(cls, path: Path) -> Iterator[_Summed]:
        """A file that appears whole at the end of the block."""
        with whole_file(path, shared=True) as handle:
            yield cls(path, handle)

    def write(self, data: bytes) -> None:
        """Write data."""
        self._handle.write(data)
        self._sum.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        """Of what was written."""
        return self._sum.hexdigest()


def _record(file: Path) -> Any:
    return read_json(file)
