"""Picture files. A picture is a separate file, or a part of a container with a path such as ``images.tar#512+60123``.

Such a path gives the container, offset and length of a member of an uncompressed tar or of a value in an Arrow file. The picture can
therefore be read without listing the container's contents. This module handles both kinds, so all code that opens pictures, reads their
sizes or confines their paths uses it.
"""

from __future__ import annotations

import functools
import io
import os
import re
import tarfile
from pathlib import Path
from typing import cast

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.reading import HeldFile, TooLarge, open_regular

_PART = re.compile(r"(?P<file>.+\.(?i:tar|arrow|bin))#(?P<start>0|[1-9][0-9]{0,17})\+(?P<length>0|[1-9][0-9]{0,17})", re.DOTALL)
"""Pattern for the name of a part of a container. Leading zeros and non-ASCII digits are not allowed, so each part has exactly one name."""

_OPEN = 256  # number of containers that a process keeps open, because opening files is slow on parallel file systems


def part_name(container: str, start: int, length: int) -> str:
    """Return the name of a part of a container, such as ``images.tar#512+60123`` for 60,123 bytes starting at byte 512."""
    return f"{container}#{start}+{length}"


def tar_member(name: str, content: bytes) -> bytes:
    """Encode a picture as a member of an uncompressed tar. The picture's bytes follow a header of ``tarfile.BLOCKSIZE`` bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    return b"".join([member.tobuf(tarfile.USTAR_FORMAT), content, bytes(-len(content) % tarfile.BLOCKSIZE)])


def picture_file(path: Path) -> Path:
    """Return the file that contains a picture, usually the picture itself. Confinement and existence checks apply to this file."""
    match = _PART.fullmatch(path.name) if "#" in path.name else None
    return path if match is None else path.with_name(match["file"])


def picture_stat(path: Path) -> tuple[int, int]:
    """Return a picture's size in bytes and its file's inode change time in ns, which reveals every change, because users cannot set it.

    Raises OSError if the file cannot be accessed, and DataError if the picture is a byte range beyond the end of its file.
    """
    stat = picture_file(path).stat()
    part = _part(path)
    return (stat.st_size if part is None else _inside(path, part, stat.st_size)[1]), stat.st_ctime_ns


def open_picture(path: Path) -> io.BufferedReader:
    """Open a picture for reading. A part of a container is read into memory. The reader therefore cannot reach the container's other bytes,
    and has no file descriptor with which an image library could read the container from its start. Raises the same errors as picture_stat,
    and ValueError for a file that is not regular.
    """
    if (part := _part(path)) is None:
        return cast(io.BufferedReader, open_regular(path))
    file = picture_file(path)
    stat = file.stat()
    container = _container(str(file), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    content = container.read(*_inside(path, part, os.fstat(container.number).st_size))
    return io.BufferedReader(cast(io.RawIOBase, io.BytesIO(content)))


def picture_bytes(path: Path, limit: int) -> bytes:
    """Read all bytes of a picture. Raises the same errors as ``open_picture``, and TooLarge for more than ``limit`` bytes."""
    if picture_stat(path)[0] > limit:  # checked before reading
        raise TooLarge(f"it has more than {limit} bytes, the limit for such a file")
    with open_picture(path) as handle:
        return handle.read()


def _part(path: Path) -> tuple[int, int] | None:
    """Return the offset and length of a part of a container, or None if the picture is a separate file."""
    match = _PART.fullmatch(path.name)
    return None if match is None else (int(match["start"]), int(match["length"]))


def _inside(path: Path, part: tuple[int, int], size: int) -> tuple[int, int]:
    if (end := sum(part)) > size:
        raise DataError(
            f"{path}: it ends at byte {end}, but its file has {size} bytes; get a complete {picture_file(path).name}, or create the data "
            "again"
        )
    return part


@functools.lru_cache(_OPEN)
def _container(path: str, *state: int) -> HeldFile:
    """Open a container, and keep it open for later calls. ``state`` identifies the file's version, so a replaced file is reopened."""
    return HeldFile(path)
