"""Hugging Face hub: data sets with an address such as ``hf://datasets/ORG/NAME/data/train-*.parquet``.

The files are fetched into the user's cache on first use. Later runs read the cached files without network access, even if the hub has newer
files, so a resumed run uses the same data. ``@REVISION`` after the name selects a branch, tag or commit. ``@~parquet`` selects the hub's
own conversion of the data set to Parquet files (``hf://datasets/ORG/NAME@~parquet/default/train/*.parquet``).
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import threading
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from cfvlm_ds.core.data_config import is_hub
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.files import cache_folder, replace
from cfvlm_ds.core.progress import Alive, Say, no_op
from cfvlm_ds.core.reading import MALFORMED, read_json
from cfvlm_ds.core.text import few, one_line

_ADDRESS = re.compile(r"hf:/{1,2}datasets/([\w.-]+/[\w.-]+?)(?:@([^/]+))?(?:/(.+))?", re.ASCII)
_CONVERTED = {"~parquet": "refs/convert/parquet"}
_OTHER_ADDRESS = re.compile(r"(https?|s3|gs|ftp):/{1,2}([^/].*)", re.ASCII | re.DOTALL)
_EVERY_S = 1.0


class _Address(NamedTuple):
    """Parsed hub address: a data set's name and revision, and the path of its files. The last part of the path can be a pattern."""

    name: str
    revision: str
    files: str


def fetched(path: str | os.PathLike[str], alive: Alive = no_op, say: Say = no_op) -> Path:
    """Return the local path of the files at a hub address, fetching them on first use. Any other path is returned unchanged.

    ``alive`` is called every second during the download. Raises DataError for a malformed address or an address on another site, and for
    files that do not exist or cannot be fetched.
    """
    if match := _OTHER_ADDRESS.fullmatch(str(path)):
        remedy = "for the Hugging Face hub, write hf://datasets/ORG/NAME/FILES; download any other file first and give its local path"
        raise DataError(f"{match[1]}://{match[2]} is an address on the network; {remedy}")
    if not is_hub(path):
        return Path(path)
    path = re.sub("^hf:/+", "hf://", str(path))  # a Path collapses the two slashes
    address = _read(path)
    record = cache_folder() / "hub" / f"{_named(address)}.json"
    if (folder := _cached_folder(record)) is None:
        say(f"fetching {path} into {record.parent}")
        problems: list[DataError] = []
        fetching = threading.Thread(target=_fetch, args=(path, address, record, problems), daemon=True)
        fetching.start()
        while fetching.is_alive():
            alive()
            fetching.join(_EVERY_S)
        if problems or (folder := _cached_folder(record)) is None:
            raise problems[0] if problems else DataError(f"{path}: the downloaded files are missing; start again")
    return folder / address.files


def _read(path: str) -> _Address:
    match = _ADDRESS.fullmatch(path)
    if match is None:
        raise DataError(f"{path} is not the address of a data set; write hf://datasets/ORG/NAME/FILES, with FILES such as train-*.parquet")
    name, revision, files = match[1], unquote(match[2] or "main"), match[3]
    if files is None:
        converted = f"{path}@~parquet/default/train/*.parquet"
        raise DataError(
            f"{path} names no files; add them, such as {path}/data/train-*.parquet, or {converted} for the Parquet files that the hub "
            "generates"
        )
    *folders, _ = parts = files.split("/")
    if any(part in ("", ".", "..") for part in parts) or any(map(glob.has_magic, folders)):
        raise DataError(f"{path}: only the last part of the file path may be a pattern, and no part may be empty, . or ..; correct it")
    return _Address(name, _CONVERTED.get(revision, revision), files)


def _named(address: _Address) -> str:
    digest = hashlib.sha256(json.dumps(address).encode()).hexdigest()[:16]
    return f"{address.name.replace('/', '--')[:80]}.{digest}"


def _cached_folder(record: Path) -> Path | None:
    """Return the folder with the files that an earlier call fetched, or None if any file is missing or has a different size."""
    try:
        cached = read_json(record)
        folder, files = record.parent / cached["folder"], cached["files"]
        complete = bool(files) and all((folder / name).stat().st_size == size for name, size in files.items())
        return folder if complete else None
    except MALFORMED:
        return None


def _fetch(path: str, address: _Address, record: Path, problems: list[DataError]) -> None:
    """Fetch the files of an address into a folder named after the commit. When all files are complete, write their names and sizes
    to the file ``record``. Errors are appended to ``problems``.
    """
    from huggingface_hub import HfApi

    api: Any = HfApi()
    where = {"repo_id": address.name, "repo_type": "dataset"}
    try:
        known = api.repo_info(**where, revision=address.revision)
        every = sorted(name for name in (file.rfilename for file in known.siblings or ()) if ".." not in name.split("/"))
        depth = address.files.count("/")
        files = [name for name in every if name.count("/") == depth and fnmatchcase(name, address.files)]
        if not files:
            problems.append(DataError(f"{path}: the data set has no such file; it contains {few(every, 20) or 'no files'}"))
            return
        folder = record.with_name(f"{address.name.replace('/', '--')[:80]}.{str(known.sha)[:40]}")
        folder.mkdir(parents=True, exist_ok=True)
        api.snapshot_download(**where, revision=known.sha, local_dir=folder, allow_patterns=[glob.escape(name) for name in files])
        sizes = {name: (folder / name).stat().st_size for name in files}
        replace(record, json.dumps({"folder": folder.name, "files": sizes}).encode(), shared=True)
    except Exception as error:  # network, hub or disk errors
        reason = f"{type(error).__name__}: {one_line(str(error), 300)}"
        command = f"`hf download --repo-type dataset {address.name} --local-dir FOLDER`"
        problems.append(
            DataError(f"{path} cannot be fetched ({reason}); on a machine with network access, run {command}, and give the files in FOLDER")
        )
