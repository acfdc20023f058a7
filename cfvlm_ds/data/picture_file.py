"""Where a picture's bytes are: a file of its own, or a part of a container, which is named by a path such as ``images.tar#512+60123``.

The name says file, offset and length, so that nothing has to be listed to find a picture: a member of an uncompressed tar, or a value of an
Arrow file. Whatever opens, measures or confines a picture does so here, and works for both.
"""

from __future__ import annotations

import functools
import io
import os
import re
import tarfile
from pathlib import Path
from typing import Any, cast

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.reading import HeldFile, TooLarge, open_regular, read_within

_PART = re.compile(r"(?P<file>.+\.(?i:tar|arrow|bin))#(?P<start>0|[1-9][0-9]{0,17})\+(?P<length>0|[1-9][0-9]{0,17})", re.DOTALL)
"""One name for a part and no other: without leading zeros, or digits of other scripts."""

_OPEN = 256  # containers that a process keeps open: opening a file is what parallel file systems are slow at


def part_name(container: str, start: int, length: int) -> str:
    """The name of ``length`` bytes of a container from ``start`` on."""
    return f"{container}#{start}+{length}"


def tar_member(name: str, content: bytes) -> bytes:
    """A picture as a member of an uncompressed tar; its bytes begin behind a header of ``tarfile.BLOCKSIZE``."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    return b"".join([member.tobuf(tarfile.USTAR_FORMAT), content, bytes(-len(content) % tarfile.BLOCKSIZE)])


def picture_file(path: Path) -> Path:
    """The file that a picture is in: itself as a rule. Confinement and questions of existence are about this one."""
    found = _PART.fullmatch(path.name) if "#" in path.name else None
    return path if found is None else path.with_name(found["file"])


def picture_stat(path: Path) -> tuple[int, int]:
    """A picture's size in bytes, and the time of the last change of its file, in ns, which nobody can set back.

    Raises OSError, and DataError for a part that its file does not hold.
    """
    stat = picture_file(path).stat()
    part = _part(path)
    return (stat.st_size if part is None else _inside(path, part, stat.st_size)[1]), stat.st_ctime_ns


def open_raw(path: Path) -> io.RawIOBase:
    """The bytes of a picture, without a buffer. Raises as picture_stat does, and ValueError for what is no regular file."""
    if (part := _part(path)) is None:
        raw: io.RawIOBase = cast(Any, open_regular(path)).detach()
        return raw
    file = picture_file(path)
    stat = file.stat()
    container = _container(str(file), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return _Part(path, container, *_inside(path, part, os.fstat(container.number).st_size))


def open_picture(path: Path) -> io.BufferedReader:
    """The bytes of a picture, to read; nothing outside of them is ever read. Raises as ``open_raw`` does."""
    return io.BufferedReader(open_raw(path), 1 << 16)


def picture_bytes(path: Path, limit: int) -> bytes:
    """All bytes of a picture. Raises as ``open_raw`` does, and TooLarge for more than ``limit``."""
    if (size := picture_stat(path)[0]) <= limit:  # nothing is read of one that says it is larger
        with open_picture(path) as handle:
            content = read_within(handle, size, limit)
        if len(content) <= limit:
            return content
    raise TooLarge(f"it has more than {limit} bytes, the bound for such a file")


def _part(path: Path) -> tuple[int, int] | None:
    """Offset and length of a part; None for a file of its own."""
    found = _PART.fullmatch(path.name)
    return None if found is None else (int(found["start"]), int(found["length"]))


def _inside(path: Path, part: tuple[int, int], size: int) -> tuple[int, int]:
    if (end := sum(part)) > size:
        raise DataError(
            f"{path}: it ends at byte {end}, and its file has {size}; get {picture_file(path).name} whole, or make the data again"
        )
    return part


@functools.lru_cache(_OPEN)
def _container(path: str, *state: int) -> HeldFile:
    """The file in this state: one that was put in its place is another."""
    return HeldFile(path)


class _Part(io.RawIOBase):
    """Some bytes of a container, as a file. It has no descriptor to give away: image libraries would read the container from its start."""

    def __init__(self, path: Path, container: HeldFile, start: int, length: int) -> None:
        self._path, self._container, self._start, self._length, self._place = path, container, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        if place < 0:
            raise ValueError(f"negative seek position {place}")
        self._place = place
        return place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._length - self._place))
        got = self._container.read(self._start + self._place, wanted)
        if wanted and not got:
            raise DataError(f"{self._path}: its file has become shorter while it was read; get it whole again")
        view[: len(got)] = got
        self._place += len(got)
        return len(got)
