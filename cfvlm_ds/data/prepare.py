"""Data set preparation: checks a data set completely and writes a store (cfvlm_ds/data/stored.py) for training.

All pictures are opened before any rows are written. This work is divided into units. A unit consists of the pictures that first occur in a
range of groups; if ``pack`` is set, they are copied into one uncompressed tar, and rows refer to them by offset. The contents of every file
depend only on the data set and the options, not on the number of processes or on interruptions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.files import Summed, crc32_of, remove, replace, whole_file
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.progress import Progress, Say
from cfvlm_ds.core.reading import MALFORMED, read_json
from cfvlm_ds.core.secrets import without_secrets
from cfvlm_ds.core.untrusted import refuse_link
from cfvlm_ds.data import lines
from cfvlm_ds.data.cfgroup import to_row
from cfvlm_ds.data.check import check_texts, equal_images, look_at_rows, note_characters, opened_pictures
from cfvlm_ds.data.containers.kinds import sources_state
from cfvlm_ds.data.decoding import ENDINGS
from cfvlm_ds.data.identity import IdentityPart, identity_part, joined_identity, joined_part
from cfvlm_ds.data.overlap import Keys, joined_keys, keys_of
from cfvlm_ds.data.passes import Array, Done, Scan
from cfvlm_ds.data.picture_file import part_name, tar_member
from cfvlm_ds.data.picture_index import FACTS, PictureTable, PictureTables, find, picture_key
from cfvlm_ds.data.report import CheckReport
from cfvlm_ds.data.store import GroupStore
from cfvlm_ds.data.stored import BEGUN, FILE, PARTS, PICTURE_KEYS, PICTURES, ROW_KEYS, SCHEMA, TOGETHER, is_store

PICTURED = 1 << 15
"""Number of groups whose pictures form one unit of work. With ``pack``, a unit is one tar of a few GB for photographs."""

ROWS = 1 << 18
"""Number of groups per file of rows. It is large because each process keeps all of these files open."""

LEFT_OUT = "left_out.jsonl"
_ANY_SCHEMA = SCHEMA.partition("/")[0]
_OURS = ("groups-[0-9]*.jsonl*", "images-[0-9]*.tar", PICTURES, TOGETHER, ROW_KEYS, PICTURE_KEYS, LEFT_OUT, "tokens", "*.tmp", PARTS, FILE)
_PLACE = np.dtype([("key", "<u8"), ("name", "<u8"), ("tar", "<u4"), ("start", "<i8"), ("facts", FACTS)])
_SUFFIXES = {f".{ending}" for ending in ENDINGS}

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # json.dumps would build an encoder for each row


@dataclass(frozen=True)
class PrepareOptions:
    """Options for preparing a data set. The same data set and options always produce the same store.

    Args:
        pack: copy the pictures into tars in the store; otherwise rows refer to the original files.
        open_pictures: open every picture; otherwise sizes and digests are unknown, and later changes are not detected.
        max_pixels: maximum number of pixels in a picture, as in ``open_image``.
        on_error: handling of invalid rows and groups with an unusable picture: ``error`` aborts without writing a store; ``skip``
            leaves them out and lists them.
    """

    pack: bool = False
    open_pictures: bool = True
    max_pixels: int = 50_000_000
    on_error: Literal["error", "skip"] = "error"


class Prepared(NamedTuple):
    """Result of ``prepare``: the report of the data check, and whether the store is complete."""

    report: CheckReport
    whole: bool


def source_state(path: Path) -> str:
    """Hash the state of a data set's files (see ``sources_state``), or return "" if they cannot be read. Raises the same DataErrors as
    ``sources_of``.
    """
    try:
        return sources_state(path / FILE if path.is_dir() and is_store(path) else path)
    except OSError:
        return ""


def source_stamp(path: Path, state: str, roots: Sequence[Path], format: str, limit: int | None, options: PrepareOptions) -> str:
    """Hash the state of a data set and the options for reading and preparing it."""
    form = [SCHEMA, _PLACE.itemsize, PICTURED, ROWS, *dataclasses.astuple(options)]
    parts = [*form, os.path.abspath(path), state, [os.path.abspath(root) for root in roots], format, limit]
    return hashlib.sha256(json.dumps(parts).encode("utf-8", "surrogatepass")).hexdigest()


def prepare(
    source: GroupStore,
    out: Path,
    stamp: str,
    options: PrepareOptions,
    say: Say,
    *,
    shard: int = 0,
    of: int = 1,
    anew: bool = False,
    scan: Scan | None = None,
) -> Prepared:
    """Check a data set and write a store. The work is divided into ``of`` shards; this call processes shard ``shard``.

    Every process checks all rows, but each picture is opened by only one process. Work that an earlier call finished is not repeated. Rows
    are written only after the pictures of all shards have been checked. If another shard has not finished, call this function again later.
    If the report lists problems and ``on_error`` is ``error``, nothing more is written.

    Unfinished work in ``out`` that belongs to different data or options is discarded if there is only one shard. If ``anew`` is True, a
    complete store of different data or options is also discarded. If ``pack`` is False, pictures that were opened for the discarded work
    are opened again only if their files have changed. Raises OSError, and ConfigError if ``out`` contains other files, or if it contains
    work of different data or options that is not discarded.
    """
    refuse_link(out, "name the folder itself with --out")
    known = _left_by_another(source, out, stamp, anew or (of == 1 and not (out / FILE).is_file()))
    work, report = _begun(out, stamp), CheckReport(str(source.path))
    job = _Job(source, out, work, stamp, options, say, shard, of, known, scan or Scan(), report)
    try:
        whole = job.is_ended() or job.run()
    except FileNotFoundError:  # another process finished the store and removed this process's temporary files
        if not ((out / FILE).exists() and (whole := job.is_ended())):
            raise
    if whole:
        remove(work)
    return Prepared(report, whole)


@dataclass(frozen=True)
class _Job:
    source: GroupStore
    out: Path
    work: Path
    stamp: str
    options: PrepareOptions
    say: Say
    shard: int
    of: int
    known: PictureTables
    scan: Scan
    report: CheckReport

    def run(self) -> bool:
        """Process this shard, and return whether the store is now complete."""
        source, out, strict = self.source, self.out, self.options.on_error == "error"
        seen = look_at_rows(self.report, source, self.say, self.scan)
        if self.is_ended():
            return True
        units, files = (_Files(self.work, kind, -(-len(source) // size)) for kind, size in (("images", PICTURED), ("groups", ROWS)))
        pictures, broken = None, dict[int, str]()
        if self.options.open_pictures or self.options.pack:
            keys, places = seen.pictures
            unit_of = places // PICTURED
            progress = Progress(self.say, "pictures", int((unit_of % self.of == self.shard).sum()), "pictures")
            for number in units.missing(self.shard, self.of):
                self._open_unit(units, number, keys[unit_of == number], places[unit_of == number], progress)
            if strict and self.report.problems:
                self.report.add(check_texts(source, None, PictureTables(_opened_before(self.work)), self.say, self.scan)[0])
                return False
            if missing := units.missing():
                self.say(
                    f"{out}: {len(missing)} of {units.count} parts of its pictures belong to other shards; run this command again when "
                    "they have finished"
                )
                return False
            pictures = np.concatenate([np.load(units.file(number, "npy"), allow_pickle=False) for number in range(units.count)])
            pictures = pictures[np.argsort(pictures["key"])]
            broken = {int(key): reason for record in units.records() for key, reason in record["broken"].items()}
        if strict and self.report.problems:
            return False
        table = None if pictures is None else PictureTable(pictures["key"], pictures["facts"])
        names = partial(_embedded_path, out, pictures) if self.options.pack and pictures is not None else None
        writer = RowLines(source, out if self.options.pack else source.roots[0], table, broken, frozenset(seen.repeats), names)
        progress = Progress(self.say, "rows", len(source) / self.of, "groups")
        for number in files.missing(self.shard, self.of):
            self._write_rows(files, number, writer, progress)
        if strict and self.report.problems:
            return False
        if missing := files.missing():
            self.say(
                f"{out}: {len(missing)} of {files.count} files of rows belong to other shards; the last shard to finish completes the store"
            )
            return False
        return self._end(units, files, pictures)

    def is_ended(self) -> bool:
        """Return whether the store is complete. Raises ConfigError if the store, complete or not, belongs to different data or options."""
        for name in (FILE, BEGUN, FILE):  # FILE is written before BEGUN is removed
            if (stamp := _read(self.out / name, "source")) == self.stamp:
                return name == FILE
            if stamp is not None:
                break
        raise ConfigError(
            f"{self.out} was prepared from another state of {self.source.path}, or with other options; remove it, or name another folder "
            "with --out"
        )

    def _open_unit(self, units: _Files, number: int, keys: Array, places: Array, progress: Progress) -> None:
        """Open the pictures of one unit and record their properties; if ``pack`` is set, write the pictures to a tar."""
        records, broken, problems = list[tuple[Any, ...]](), dict[int, str](), list[str]()
        pack, file = self.options.pack, self.out / f"{units.name(number)}.tar"
        known = None if pack else PictureTables([*_opened_before(self.work, number), self.known])
        wanted = opened_pictures(self.source, keys, places, self.options.max_pixels, self.scan, known, contents=pack)

        def members() -> Iterator[bytes]:
            place = tarfile.BLOCKSIZE
            for k, opened in enumerate(progress.over(wanted)):
                key = picture_key(opened.path)
                if isinstance(opened.found, str):
                    broken[key] = opened.found
                    problems.append(f"{self.source.where(opened.group)}: {opened.found}")
                elif not pack:
                    records.append((key, picture_key(opened.path, self.source.roots[0]), 0, 0, tuple(opened.found)))
                else:
                    suffix, size = opened.path.suffix.lower(), len(opened.content)
                    yield (member := tar_member(f"{number:05}-{k:07}{suffix if suffix in _SUFFIXES else ''}", opened.content))
                    name = picture_key(self.out / part_name(file.name, place, size), self.out)
                    records.append((key, name, number, place, tuple(opened.found._replace(ctime=0))))
                    place += len(member)
            yield bytes(2 * tarfile.BLOCKSIZE + -(place + tarfile.BLOCKSIZE) % tarfile.RECORDSIZE)

        try:
            record = _written(file, members()) if pack else dict[str, Any]()
            deque(() if pack else members(), 0)
        finally:  # keep the results if the call is interrupted
            with whole_file(units.file(number, "npy"), shared=True) as handle:
                np.save(handle, np.sort(np.array(records, _PLACE), order="key"), allow_pickle=False)
        if problems and self.options.on_error == "error":  # the next call opens these pictures again
            self.report.problems.extend(problems)
        else:
            units.note(number, pictures=len(records), broken=broken, **record)

    def _write_rows(self, files: _Files, number: int, writer: RowLines, progress: Progress) -> None:
        """Write a file of rows, its index, and the arrays from which ``_end`` builds the tables."""
        places, parts = range(number * ROWS, min((number + 1) * ROWS, len(self.source))), list[Chunk]()
        report = CheckReport(self.report.manifest)

        def encoded() -> Iterator[bytes]:
            for part in self.scan.over(places, writer, progress):
                yield part.lines
                report.add(part.report)
                parts.append(part)

        record = _written(file := self.out / f"{files.name(number)}.jsonl", encoded())
        self.report.add(report)
        if report.problems and self.options.on_error == "error":
            return
        identity, keys = joined_part([part.identity for part in parts]), joined_keys([part.keys for part in parts])
        with whole_file(files.file(number, "npz"), shared=True) as handle:
            rows = np.concatenate([part.rows for part in parts])
            np.savez(handle, order=np.frombuffer(identity.order, np.uint8), rows=rows, row_keys=keys.rows, picture_keys=keys.pictures)
        index = crc32_of(lines.write_index(file))
        found = {"groups": identity.rows, "index": index, "known": identity.known, "sums": identity.sums, "problems": report.problems}
        files.note(number, **record, **found)

    def _end(self, units: _Files, files: _Files, pictures: Array | None) -> bool:
        """Complete the store by writing its tables and store.json, and return True. Raises DataError if no group is usable."""
        records = files.records()
        arrays = [np.load(files.file(number, "npz"), allow_pickle=False) for number in range(files.count)]
        identity = joined_identity(  # arrays of an npz file are read when they are accessed
            IdentityPart(record["groups"], held["order"].tobytes(), record["known"], record["sums"])
            for record, held in zip(records, arrays, strict=True)
        )
        number = sum(record["groups"] for record in records)
        left_out = len(self.source) - number
        problems = list(dict.fromkeys([*self.report.problems, *itertools.chain(*(record["problems"] for record in records))]))
        if not number:
            raise DataError(f"{problems[0]} (and none of the {left_out} groups can be used)")
        keys = joined_keys([Keys(held["row_keys"], held["picture_keys"]) for held in arrays])
        tables = {ROW_KEYS: _array(keys.rows), PICTURE_KEYS: _array(keys.pictures)}
        most_pixels = 0
        if pictures is not None:
            order = np.argsort(pictures["name"], kind="stable")
            facts = pictures["facts"]
            most_pixels = int((facts["width"].astype(np.int64) * facts["height"]).max(initial=0))
            tables[PICTURES] = PictureTable(pictures["name"][order], facts[order]).parts()
        if self.source.together is not None:
            rows = np.concatenate([held["rows"] for held in arrays])
            firsts = np.append(np.flatnonzero(np.diff(rows, prepend=-1)), number)
            tables[TOGETHER] = _array(firsts.astype("<u4"))
        if left_out:
            tables[LEFT_OUT] = (json.dumps({"problem": problem}, ensure_ascii=False).encode() + b"\n" for problem in problems)
        shown = ("file", "bytes", "crc32", "groups", "index", "pictures")
        record = {
            "schema": SCHEMA,
            "groups": number,
            "source": self.stamp,
            "of": without_secrets(str(self.source.path)),
            "format": self.source.format,
            "roots": [without_secrets(os.path.abspath(root)) for root in self.source.roots],
            "identity": identity,
            "found": {
                "images": self.report.num_images,
                "most_pixels": most_pixels,
                "false_cells": self.report.num_false_cells,
                "metadata": self.report.unused if self.report.metadata else "",
                "left_out": left_out,
            },
            "rows": [{name: entry[name] for name in shown if name in entry} for entry in records if entry["groups"]],
            "images": [{name: entry[name] for name in shown if name in entry} for entry in units.records()] if self.options.pack else [],
            "tables": [_written(self.out / name, parts) for name, parts in tables.items()],
        }
        self.is_ended()
        for left in self.out.glob("*.tmp"):  # left by killed calls
            left.unlink(missing_ok=True)
        replace(self.out / FILE, json.dumps(record, indent=1).encode(), shared=True)
        return True


# Rows --------------------------------------------------------------------------------------------------------------------------------


class Chunk(NamedTuple):
    """Encoded rows of a range of groups, and their entries for the store's tables. ``rows`` contains the source row of each group."""

    lines: bytes
    rows: Array
    identity: IdentityPart
    keys: Keys
    report: CheckReport


@dataclass(frozen=True)
class RowLines:
    """Callable that converts groups to rows of the native format and leaves out unusable groups.

    Args:
        source: the data set.
        root: folder that picture paths are relative to.
        pictures: picture table; None if no picture was opened.
        broken: mapping from the key of each broken picture to its problem.
        repeats: indices of groups that repeat an earlier group's id.
        name: function that returns the path to write for a picture; None to write its absolute path.
    """

    source: GroupStore
    root: Path
    pictures: PictureTable | None
    broken: Mapping[int, str]
    repeats: frozenset[int]
    name: Callable[[Path], Path] | None = None

    def __call__(self, places: Sequence[int], done: Done) -> Chunk:
        report, written, groups, kept = CheckReport(str(self.source.path)), list[bytes](), list[CounterfactualGroup](), list[int]()
        root = Path(os.path.abspath(self.root))
        for index, group in self.source.entries(places):
            done()
            if isinstance(group, DataError) or index in self.repeats:  # already reported by the row check
                continue
            try:
                line = self._line(group, root)
            except DataError as error:
                report.problems.append(f"{self.source.where(index)}: {error}")
                continue
            note_characters(report, group, partial(self.source.where, index))
            written.append(line)
            groups.append(group)
            kept.append(index)
        rows, together = np.array(kept, np.int64), self.source.together
        if together is not None:
            rows = np.searchsorted(together, rows, "right") - 1
        identity, keys = identity_part(groups, self.source.roots, self.pictures), keys_of(groups, self.pictures)
        return Chunk(b"".join(written), rows, identity, keys, report)

    def _line(self, group: CounterfactualGroup, root: Path) -> bytes:
        for picture in itertools.chain(*group.images):
            if self.broken and (reason := self.broken.get(picture_key(picture))) is not None:
                raise DataError(reason)
        if self.pictures is not None and (problem := next(equal_images(group, self.pictures), None)) is not None:
            raise DataError(problem)
        name = self.name or _absolute
        named = group.with_images(tuple(tuple(map(name, image)) for image in group.images))
        line = _ENCODER.encode(to_row(named, root)).encode("utf-8", "surrogatepass") + b"\n"
        if len(line) > lines.MAX_LINE:
            raise DataError(f"the row has more than {lines.MAX_LINE} bytes; split it")
        return line


def _absolute(picture: Path) -> Path:
    if picture.is_absolute() and ".." not in picture.parts:  # a third of the time of os.path.abspath
        return picture
    return Path(os.path.abspath(picture))


def _embedded_path(out: Path, pictures: Array, picture: Path) -> Path:
    """Return a picture's path inside one of the store's tar files. Raises DataError for a picture that is not packed."""
    if (at := find(pictures["key"], picture_key(picture))) is None:
        raise DataError(f"{picture}: the picture is not packed, because the data set has changed; remove the store and prepare it again")
    place = pictures[at]
    return _absolute(out / part_name(f"images-{int(place['tar']):05}.tar", int(place["start"]), int(place["facts"]["size"])))


# Files -------------------------------------------------------------------------------------------------------------------------------


class _Files:
    """Numbered files of one kind. Each complete file has a record, a small JSON file in the folder for unfinished work."""

    def __init__(self, work: Path, kind: str, count: int) -> None:
        self._work, self._kind, self.count = work, kind, count

    def name(self, number: int) -> str:
        """Return the name of a file, such as ``groups-00007``."""
        return f"{self._kind}-{number:05}"

    def file(self, number: int, suffix: str) -> Path:
        """Return the path of a file's record (suffix ``json``) or of its arrays (``npy`` or ``npz``)."""
        return self._work / f"{self.name(number)}.{suffix}"

    def missing(self, shard: int = 0, of: int = 1) -> list[int]:
        """Return the numbers of the incomplete files in a shard, or by default in all shards."""
        return [number for number in range(self.count)[shard::of] if not self.file(number, "json").exists()]

    def note(self, number: int, **record: Any) -> None:
        replace(self.file(number, "json"), json.dumps(record).encode(), shared=True)

    def records(self) -> list[Any]:
        return [read_json(self.file(number, "json")) for number in range(self.count)]


def _opened_before(work: Path, number: int | None = None) -> list[PictureTable]:
    """Load the tables of pictures that earlier calls opened in unit ``number``, or in all units if it is None."""
    tables = []
    for file in sorted(work.glob("images-*.npy" if number is None else f"images-{number:05}.npy")):
        with contextlib.suppress(OSError, ValueError):
            records = np.load(file, allow_pickle=False)
            tables.append(PictureTable(records["key"], records["facts"]))
    return tables


def _left_by_another(source: GroupStore, out: Path, stamp: str, remove_it: bool) -> PictureTables:
    """If ``remove_it`` is True, remove from ``out`` any store, complete or not, that belongs to different data or options. Return the
    picture tables of the removed store; there are none if nothing was removed.
    """
    whole, known = out / FILE, list[PictureTable]()
    ours = whole.is_file() and not whole.is_symlink() and str(_read(whole, "schema")).startswith(_ANY_SCHEMA)
    if not (remove_it and (ours or (out / BEGUN).is_file())) or _read(whole if whole.is_file() else out / BEGUN, "source") == stamp:
        return PictureTables([])
    with contextlib.suppress(OSError, ValueError):
        known.append(PictureTable.opened(out / PICTURES, source.roots))
    known += _opened_before(out / PARTS)
    for file in itertools.chain(*map(out.glob, _OURS)):
        remove(file)
    return PictureTables(known)


def _read(file: Path, key: str) -> str | None:
    with contextlib.suppress(*MALFORMED):
        return str(read_json(file)[key])
    return None


def _begun(out: Path, stamp: str) -> Path:
    """Return the folder for unfinished work, creating it unless the store is complete. Raises ConfigError if ``out`` has other contents."""
    work, whole, begun = out / PARTS, out / FILE, out / BEGUN
    others = [file for file in (out, *out.rglob("*")) if file.is_file() and file.suffix != ".tmp"]  # .tmp files are from a killed call
    if others and not (begun.is_file() or whole.is_file()):
        raise ConfigError(f"{out} exists and is not a store; name another folder with --out")
    if not whole.is_file():
        work.mkdir(parents=True, exist_ok=True)
        if not begun.exists():
            replace(begun, json.dumps({"source": stamp}).encode(), shared=True)
    return work


def _array(array: Array) -> Iterator[bytes]:
    np.lib.format.write_array(buffer := io.BytesIO(), array, allow_pickle=False)
    yield buffer.getvalue()


def _written(file: Path, parts: Iterable[bytes]) -> dict[str, Any]:
    """Write a file under a temporary name, rename it, and return its name, size and CRC-32."""
    with whole_file(file, shared=True) as handle:
        written = Summed(handle)
        for part in parts:
            written.write(part)
    return {"file": file.name, "bytes": written.size, "crc32": written.crc32}
