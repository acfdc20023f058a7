"""Container detection: the files that a path refers to, and their kind."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.reading import MALFORMED, read_json
from cfvlm_ds.core.text import few
from cfvlm_ds.core.untrusted import own_file
from cfvlm_ds.data.containers.arrow import arrow_rows, parquet_rows
from cfvlm_ds.data.containers.image_folder import picture_rows
from cfvlm_ds.data.containers.json_file import is_lines, json_rows
from cfvlm_ds.data.containers.rows import Rows
from cfvlm_ds.data.containers.tables import csv_rows, tsv_rows
from cfvlm_ds.data.containers.tar import tar_rows
from cfvlm_ds.data.decoding import ENDINGS

LINES = "jsonl"
"""Kind of a JSON lines file. All containers are converted to this kind."""

CONTAINERS: dict[str, Callable[[Path], Rows]] = {
    "json": json_rows,
    "csv": csv_rows,
    "tsv": tsv_rows,
    "parquet": parquet_rows,
    "arrow": arrow_rows,
    "tar": tar_rows,
    "pictures": picture_rows,
}
"""File kind -> function that yields the rows of such a file."""

_SUFFIXES = {".json": "json", ".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".parquet": "parquet", ".arrow": "arrow", ".tar": "tar"}
_SUFFIXES |= {f".{ending}": "pictures" for ending in ENDINGS}
_IN_FOLDERS = ("*.arrow", "*.parquet", "*.tar")
_NUMBERED = re.compile(r"(.+)-\d{5}-of-\d{5}", re.ASCII)
"""Pattern for the stem of a numbered shard's file name, as written by the hub and ``datasets``; it captures the split's name."""
COMPRESSED = {
    ".tgz": "gunzip", ".gz": "gunzip", ".tbz2": "bunzip2", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd", ".zip": "unzip",
}  # fmt: skip
"""Suffix of a compressed file -> command to unpack it."""
_SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".ods")


def container_of(path: Path) -> str:
    """Return the kind of data at a path, such as ``csv``. It depends on the file's suffix or, for a folder, on the files in it.

    Raises DataError for a compressed file, and the same errors as ``sources_of``.
    """
    return _kind(path, sources_of(path)[0])


def sources_of(path: Path) -> list[Path]:
    """Return the files that a path refers to: the path itself, the files in a folder, or the matches of a pattern such as
    ``train-*.parquet``. They are sorted by name unless a saved data set defines their order.

    Raises DataError for a folder that contains no data, several splits or several kinds of files, and for a pattern that matches no files,
    JSON files, or several kinds of files.
    """
    if path.is_dir():
        return _in_folder(path)
    if glob.has_magic(path.name) and not os.path.lexists(path):
        files = sorted(path.parent / name for name in glob.glob(path.name, root_dir=path.parent))
        if not files:
            raise DataError(f"{path}: no file matches; correct the pattern")
        if len(kinds := {_kind(path, file) for file in files}) > 1 or LINES in kinds or "json" in kinds:
            together = ", ".join(kind for kind in CONTAINERS if kind != "json")
            raise DataError(f"{path}: a pattern must match files of one kind ({together}); this one matches {', '.join(sorted(kinds))}")
        return files
    return [path]


def sources_state(path: Path) -> str:
    """Hash the names, sizes, modification times and inode change times of a path's files. Inode change times reveal every change, because
    users cannot set them. Raises OSError, and the same errors as ``sources_of``.
    """
    sources = sources_of(path)
    captions = [text for file in sources if _is_picture(file) and (text := file.with_suffix(".txt")).is_file()]
    states = [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns, stat.st_ctime_ns) for file in (*sources, *captions)]
    return hashlib.blake2b(repr(states).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _is_picture(path: Path) -> bool:
    return _SUFFIXES.get(path.suffix.lower()) == "pictures"


def _kind(path: Path, file: Path) -> str:
    for ending, command in COMPRESSED.items():
        if file.name.lower().endswith(ending):
            raise DataError(
                f"{path}: the file is compressed, but rows and pictures are read at offsets; unpack it first ({command} {file.name})"
            )
    if file.suffix.lower() in _SPREADSHEETS:
        raise DataError(f"{path}: the file is a spreadsheet; save it as CSV in UTF-8, with the column names in the first line")
    kind = _SUFFIXES.get(file.suffix.lower(), LINES)
    if kind == "json":
        try:
            return LINES if is_lines(file) else kind
        except (OSError, ValueError):
            return LINES  # the JSON lines reader reports the error
    return kind


def _refuse_unread(path: Path, pictures: list[Path]) -> None:
    """Raise DataError if a caption in an image folder does not belong to exactly one picture, or if the folder also contains data that
    would be ignored.
    """
    texts = {picture.with_suffix(".txt").name: picture for picture in pictures}
    others = sorted(file.name for file in path.iterdir() if file.suffix.lower() == ".txt" and file.name not in texts)
    others += [name for name in ("metadata.csv", "metadata.jsonl") if (path / name).is_file()]
    others += sorted(folder.name for folder in path.iterdir() if folder.is_dir() and any(map(_is_picture, folder.iterdir())))
    if others:
        raise DataError(
            f"{path}: {few(others)} would be ignored next to captions in .txt files; move it away, or name the pictures as {path}/*.png"
        )
    if len(texts) < len(pictures):
        twice = next(picture for picture in pictures if texts[picture.with_suffix(".txt").name] != picture)
        raise DataError(f"{path}: {twice.with_suffix('.txt').name} is the caption of several pictures, such as {twice.name}; rename one")


def _in_folder(path: Path) -> list[Path]:
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(folder.name for folder in path.iterdir() if folder.is_dir())[:10])
        raise DataError(f"{path}: contains several splits ({splits}); name one of its folders")
    if (path / "state.json").is_file():
        return _saved(path)
    if len(kinds := [pattern for pattern in _IN_FOLDERS if any(path.glob(pattern))]) > 1:
        raise DataError(f"{path}: contains files of several kinds ({', '.join(kinds)}); name those of one kind, such as {path / kinds[0]}")
    if kinds:
        files = sorted(path.glob(kinds[0]))
        names = sorted({split[1] for file in files if (split := _NUMBERED.fullmatch(file.stem))})
        if len(names) > 1:
            one = path / f"{names[0]}-*{files[0].suffix}"
            raise DataError(f"{path}: contains several splits ({', '.join(names[:10])}); name the files of one split, such as {one}")
        return files
    pictures = sorted(filter(_is_picture, path.iterdir()))
    if any(picture.with_suffix(".txt").is_file() for picture in pictures):
        _refuse_unread(path, pictures)
        return pictures
    raise DataError(
        f"{path} is a folder without {', '.join(_IN_FOLDERS)} or captions in .txt files, and not a store; name the data file "
        "(after the model, if the command takes one)"
    )


def _saved(path: Path) -> list[Path]:
    """Return the files of a data set saved by ``datasets``, in the order of state.json. Raises DataError if state.json lists none."""
    try:
        listed = read_json(path / "state.json")["_data_files"]
        files = [own_file(path, entry["filename"], path / "state.json") for entry in listed]
    except MALFORMED as error:
        raise DataError(
            f"{path}: state.json does not list the files of a saved data set ({error}); save it again with save_to_disk"
        ) from error
    if not files:
        raise DataError(f"{path}: the saved data set has no files; save it again with save_to_disk")
    return files
