"""Files that appear whole or not at all, and small ones of a run folder, on a disk that may be full or fail for a while.

What the small ones say is not worth a training.
Nothing is written through a link.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from cfvlm_ds.core.errors import ConfigError, unwritten
from cfvlm_ds.core.secrets import print_line

Say = Callable[[str], object]


def create(path: Path) -> IO[bytes]:
    """A new file to write, in place of a file or a link of this name; never the file that a link leads to. Raises OSError."""
    path.unlink(missing_ok=True)
    return open(path, "xb")


class Summed:
    """A file that is written from its beginning to its end, with its size and CRC-32."""

    def __init__(self, handle: IO[bytes]) -> None:
        self._handle, self.size, self.crc32, self.flush = handle, 0, 0, handle.flush

    def write(self, data: Any) -> int:
        """Write more of it."""
        self._handle.write(data)
        self.size, self.crc32 = self.size + len(data), zlib.crc32(data, self.crc32)
        return len(data)


def crc32_of(file: Path, read: Callable[[int], object] = lambda size: None) -> int:
    """Compute the CRC-32 of a file; ``read`` is called with the bytes of each block. Raises OSError."""
    found = 0
    with file.open("rb", buffering=0) as handle:
        while block := handle.read(_BLOCK):
            found = zlib.crc32(block, found)
            read(len(block))
    return found


_BLOCK = 1 << 24  # bytes read at a time


def cache_folder() -> Path:
    """The user's folder for what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "cfvlm_ds"


def remove(path: Path) -> None:
    """Remove a folder with all it holds, or a file; of a link, only the link."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def whole_file(path: Path, shared: bool = False) -> Iterator[IO[bytes]]:
    """A file to write under another name, which becomes ``path`` at the end of the block: a reader, or a crash, never meets half of it.

    ``shared`` is for a file that several processes may write at the same time. Otherwise raises ConfigError where another process writes
    it. Raises OSError that names the file, and leaves nothing.
    """
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp" if shared else f"{path.name}.tmp")
    held = None
    try:
        if (held := fresh(temporary)) is None:
            raise ConfigError(f"{path} is being written by another process; wait for it, or name another file")
        with os.fdopen(os.dup(held), "wb") as file:
            yield file
        if not shared and not is_same(temporary, held):  # on a file system without locks
            raise FileExistsError(errno.EEXIST, _BY_ANOTHER, str(path))
        os.replace(temporary, path)
    except OSError as error:
        if error.filename not in (None, str(temporary)):  # of another file that the block works with
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        if held is not None:
            with contextlib.suppress(OSError):
                if is_same(temporary, held):
                    temporary.unlink()
            os.close(held)


def fresh(path: Path) -> int | None:
    """A new file, open and locked, in place of what a kill has left under its name; None where another process holds it."""
    while True:
        new = not os.path.lexists(path)
        if path.is_symlink():
            path.unlink()
        try:
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if new else 0), 0o666)
        except FileExistsError:  # another process was faster
            continue
        except FileNotFoundError:
            if new:  # its folder is gone
                raise
            continue
        try:
            mine = lock(handle, path)
            if mine and is_same(path, handle):
                if new:
                    return handle
                path.unlink()
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        if not (mine or new):
            return None


@contextlib.contextmanager
def alone(path: Path, waiting: Callable[[], object] = lambda: None, alive: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold a lock, a file that is there meanwhile. A process that waits for it calls ``waiting`` once, and ``alive`` again and again."""
    held = fresh(path)
    if held is None:
        waiting()
    while held is None:
        alive()
        time.sleep(_LOOK_S)
        held = fresh(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(held)


def lock(handle: int, path: Path) -> bool:
    """Lock an open file until it is closed; False where another process has it. On a file system without locks, which is reported once,
    nothing is locked."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        if not _told:
            _told.append(path)
            print_line(f"warning: {path.parent} has no file locks ({error.strerror}); start one process at a time there", error=True)
    return True


_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_LOOK_S = 0.5  # between two looks at whether another process has ended
_BY_ANOTHER = "another process has begun to write it meanwhile; start one at a time"
_told: list[Path] = []


@contextlib.contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """An empty folder to write to, which becomes ``final`` at the end of the block; until then what was there stays.

    One process at a time may do so: the first of two finds its folder gone and raises FileExistsError, the second goes on. Raises OSError,
    and leaves nothing.
    """
    partial, older, made = final.with_name(f"{final.name}.partial"), aside_of(final), None
    try:
        if older.exists() and not final.exists():  # a kill between the two renames of an earlier one
            os.replace(older, final)
        remove(partial)
        partial.mkdir(parents=True)
        made = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)  # as long as it is open nothing else has its number
        yield partial
        if not is_same(partial, made):
            raise FileExistsError(errno.EEXIST, _BY_ANOTHER, str(final))
        remove(older)
        put_in_place(partial, final, older)
        remove(older)
    finally:
        if made is not None:
            if is_same(partial, made):
                remove(partial)
            os.close(made)


def is_same(path: Path, opened: int) -> bool:
    """Whether a path still leads to what was opened there."""
    return path.exists() and os.path.samestat(path.stat(), os.fstat(opened))


def aside_of(final: Path) -> Path:
    """Where ``whole_folder`` keeps the older folder while it puts the new one in its place: a name that is nobody else's."""
    return final.with_name(f"{final.name}.replaced.partial")


def put_in_place(finished: Path, final: Path, older: Path) -> None:
    """Rename a folder to ``final``; what was there has the name ``older`` then, or its own again where that fails. Raises OSError."""
    if final.exists():
        os.replace(final, older)
    try:
        os.replace(finished, final)
    except OSError:
        if older.exists() and not final.exists():
            os.replace(older, final)
        raise


def replace(path: Path, content: bytes, shared: bool = False) -> None:
    """Write the whole content of a file as ``whole_file`` does."""
    with whole_file(path, shared) as file:
        file.write(content)


def update(path: Path, content: bytes) -> None:
    """``replace`` unless the file has this content already: a run that goes on needs no room for it."""
    with contextlib.suppress(OSError):
        if path.read_bytes() == content:
            return
    replace(path, content)


def write_if_possible(path: Path, text: str, say: Say) -> bool:
    """``replace``, but a file that cannot be written is only a warning; returns whether it was written."""
    try:
        replace(path, text.encode())
    except OSError as error:
        say(f"warning: {unwritten(path, error)}; the run goes on without it")
        return False
    return True
