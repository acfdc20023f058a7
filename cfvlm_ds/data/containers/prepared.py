"""Cache of containers converted to JSON lines. Each conversion is a folder with rows.jsonl and copied pictures, written once and reused.

The folder's name contains a hash of the container's path and of the sizes and times of its files. Row n is line n of rows.jsonl. The line
for an invalid row is a JSON string with the error message. If the container consists of several files, their row counts are recorded. The
folder is written under a temporary name and renamed when it is complete, so an interrupted conversion starts over.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.files import cache_folder, file_lock, whole_folder
from cfvlm_ds.core.progress import Alive, Progress, Say, no_op
from cfvlm_ds.core.reading import MALFORMED, read_json
from cfvlm_ds.data.containers.kinds import CONTAINERS, sources_of, sources_state
from cfvlm_ds.data.containers.rows import MAX_ROW, rows_of
from cfvlm_ds.data.picture_file import part_name, tar_member

_FORM = 3  # version of the written files; a new version makes existing folders obsolete
_LINES, _PICTURES, _SOURCES = "rows.jsonl", "pictures.tar", "sources.json"
ENDING = ".prepared"
"""Suffix of a conversion's folder name."""
_KNOWN = 100_000  # number of pictures remembered to recognise repeats; consecutive questions are often about the same picture


class Prepared(NamedTuple):
    """Result of converting a container: its rows as JSON lines, and the folders that its picture names are relative to. If the container
    consists of several files, ``sources`` gives the name and row count of each.
    """

    lines: Path
    roots: tuple[Path, ...]
    sources: tuple[tuple[str, int], ...] = ()


def prepare(
    path: Path,
    container: str,
    cache: Sequence[Path] | None = None,
    say: Say = no_op,
    alive: Alive = no_op,
) -> Prepared:
    """Convert the rows of ``path`` to JSON lines in the first writable folder of ``cache`` (default: the folder of the data, then the
    user's cache). If a folder of ``cache`` already contains the converted rows, they are reused.

    Raises DataError for a container that cannot be read completely, or if no folder is writable.
    """
    sources, cache = sources_of(path), [path.parent, cache_folder()] if cache is None else cache
    try:
        name = _name(path, container)
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read ({error.strerror}); correct the path") from error
    for folder in cache:
        if (folder / name / _LINES).is_file():
            return _prepared(path, folder / name)
    problem = ""
    for folder in cache:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with file_lock(folder / f"{name}.lock", lambda: say(f"{path}: another process is preparing its rows; waiting for it"), alive):
                if not (folder / name / _LINES).is_file():
                    with whole_folder(folder / name) as partial:
                        _write(path, container, sources, partial, say, alive)
            return _prepared(path, folder / name)
        except OSError as error:
            problem = problem or f"{folder} ({error.strerror or error})"
    raise DataError(f"{path}: its rows cannot be prepared in {problem}; free some space there, or set XDG_CACHE_HOME to a writable folder")


def _prepared(path: Path, folder: Path) -> Prepared:
    sources: tuple[tuple[str, int], ...] = ()
    with contextlib.suppress(*MALFORMED):
        sources = tuple((str(name), int(rows)) for name, rows in read_json(folder / _SOURCES))
    copied = [folder] if (folder / _PICTURES).is_file() else []
    return Prepared(folder / _LINES, (path.parent if not path.is_dir() else path, *copied), sources)


def _name(path: Path, container: str) -> str:
    state = json.dumps([_FORM, container, os.path.abspath(path), sources_state(path)])
    digest = hashlib.blake2b(state.encode("utf-8", "surrogatepass"), digest_size=8)
    return f"{path.name[:80].replace('*', '_')}.{digest.hexdigest()}{ENDING}"


def _write(path: Path, container: str, sources: Sequence[Path], folder: Path, say: Say, alive: Alive) -> None:
    progress = Progress(say, f"preparing {path}", None, "rows")
    pictures, counted = _Pictures(folder / _PICTURES), dict.fromkeys(sources, 0)
    try:
        with open(folder / _LINES, "xb") as lines:
            for source in sources:
                for _, row in progress.over(rows_of(source, CONTAINERS[container])):
                    alive()
                    counted[source] += 1
                    lines.write(_line(row, pictures) + b"\n")
    finally:
        pictures.close()
    if len(sources) > 1:
        (folder / _SOURCES).write_text(json.dumps([(source.name, rows) for source, rows in counted.items()]))


def _line(row: dict[str, Any] | DataError, pictures: _Pictures) -> bytes:
    if not isinstance(row, DataError):
        try:
            line = json.dumps(row, default=pictures.name_of).encode()
            if len(line) <= MAX_ROW:
                return line
            row = DataError(f"the row has {len(line)} bytes as JSON, over the limit of {MAX_ROW} for one row; shorten it")
        except DataError as error:  # one of the row's values is an error
            row = error
        except (ValueError, RecursionError, TypeError) as error:
            row = DataError(f"the row cannot be written as JSON ({error}); correct it")
    return json.dumps(str(row)).encode()


class _Pictures:
    """Tar file for the copied pictures. A picture that occurs several times is stored once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: IO[bytes] | None = None
        self._known: dict[bytes, str] = {}
        self._count = 0

    def name_of(self, value: Any) -> str:
        """Return a reference to the picture with the bytes ``value``, adding it to the tar if it is new.

        If ``value`` is a DataError, it is raised. Raises TypeError for any other type.
        """
        if isinstance(value, DataError):
            raise value
        if not isinstance(value, bytes):
            raise TypeError(f"a value of type {type(value).__name__}")
        digest = hashlib.blake2b(value, digest_size=16).digest()
        if digest not in self._known:
            if len(self._known) >= _KNOWN:
                self._known.clear()
            self._known[digest] = self._add(value)
        return self._known[digest]

    def close(self) -> None:
        if self._handle is not None:
            self._handle.write(bytes(2 * tarfile.BLOCKSIZE))
            self._handle.close()

    def _add(self, value: bytes) -> str:
        if self._handle is None:
            self._handle = open(self._path, "xb")  # noqa: SIM115  # closed by close()
        place = self._handle.tell() + tarfile.BLOCKSIZE
        self._handle.write(tar_member(f"{self._count:09d}.img", value))
        self._count += 1
        return part_name(_PICTURES, place, len(value))
