"""WebDataset tars. Members whose names agree up to the first dot form a row; the rest of each name is the column name.

Pictures are not copied. A row refers to them by the offset and length of their bytes (``shard.tar#512+60123``), so a tar must not be
compressed. Texts and JSON become values in the rows.
"""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import IO, Any, cast

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.reading import MIB, open_regular
from cfvlm_ds.data.containers.rows import MAX_ROW, Row, Rows
from cfvlm_ds.data.decoding import ENDINGS
from cfvlm_ds.data.rows import parsed

TEXTS = ("txt", "text", "caption", "cls", "json", "id")
_PLAIN = "write the tar with the files themselves (tar --dereference --hard-dereference)"
_HEADER = MIB
"""Maximum size in bytes of a member's header, including a long name; real headers take a few kB."""


def tar_rows(path: Path) -> Rows:
    """Yield the location and columns of each sample in a tar."""
    with open_regular(path) as handle, tarfile.open(fileobj=cast(Any, _Headers(handle)), mode="r:") as tar:
        yield from _samples(path, handle, tar)


class _Headers:
    """File object for reading the headers of a tar. Raises ValueError for a header of more than _HEADER bytes."""

    def __init__(self, handle: IO[bytes]) -> None:
        self._handle, self.name = handle, ""
        self.seek, self.tell, self.seekable = handle.seek, handle.tell, handle.seekable

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _HEADER:
            raise ValueError(f"a header of {size} bytes")
        return self._handle.read(size)


def _samples(path: Path, handle: IO[bytes], tar: tarfile.TarFile) -> Rows:
    size = os.fstat(handle.fileno()).st_size
    key, sample, problem = "", Row(), ""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # otherwise all members would stay in memory
        if member.isdir() or os.path.basename(member.name).startswith("."):
            continue
        is_file = member.isreg() and not member.issparse()
        if is_file and member.offset_data + member.size > size:
            raise DataError(f"{path}: member {member.name!r} ends after the end of the file, so the tar is truncated; get a complete copy")
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        if not stem or not extension:
            continue  # not part of a sample, for instance a README
        if (own_key := f"{folder}/{stem}" if folder else stem) != key:
            if sample:
                yield f"sample {key!r}", DataError(problem) if problem else {"__key__": key, **sample}
            key, sample, problem = own_key, {}, ""
        if extension in sample:
            problem = problem or f"sample {key!r} has two members {base!r}; give every sample its own key"
        if not is_file:
            problem = problem or f"sample {key!r}: {base!r} is a link or not a regular file; {_PLAIN}"
            sample[extension] = None
            continue
        try:
            sample[extension] = _value(path, handle, member, extension.lower())
        except DataError as error:
            problem = problem or f"sample {key!r}: {error}"
    if sample:
        yield f"sample {key!r}", DataError(problem) if problem else {"__key__": key, **sample}
    handle.seek(tar.offset)
    if len(handle.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:  # a complete tar ends with blocks of zeros
        raise DataError(f"{path}: the tar is truncated; get a complete copy")


def _value(path: Path, handle: IO[bytes], member: tarfile.TarInfo, extension: str) -> Any:
    """Return the contents of a text or JSON member, or a reference to the bytes of any other member. Raises DataError for a text or JSON
    member that is too long or malformed.
    """
    last = extension.rpartition(".")[2]
    place = f"{path.name}#{member.offset_data}+{member.size}"
    if last in ENDINGS or (last not in TEXTS and not extension.endswith(("caption", "text"))):
        return place  # a picture, or other data, such as features, whose names become metadata
    if member.size > MAX_ROW:
        raise DataError(f"{member.name!r} has {member.size} bytes, over the limit of {MAX_ROW} for a text; shorten it")
    handle.seek(member.offset_data)
    content = handle.read(member.size)
    if last == "json":
        return parsed(content, repr(member.name), "correct it")
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{member.name!r}: byte {error.start + 1} is not UTF-8; save the text as UTF-8") from error
