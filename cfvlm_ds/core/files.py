"""File writing: atomic files and folders, file locks, and optional files, for which a write error is only a warning.

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
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from cfvlm_ds.core.errors import ConfigError, unwritten
from cfvlm_ds.core.progress import Alive, Say, no_op
from cfvlm_ds.core.secrets import print_line


def create(path: Path) -> IO[bytes]:
    """Open a new file for writing. An existing file or link of this name is replaced; a link's target stays unchanged. Raises OSError."""
    path.unlink(missing_ok=True)
    return open(path, "xb")


class Summed:
    """Wrapper around a file that is open for writing. It tracks the size and CRC-32 of the data written so far."""

    def __init__(self, handle: IO[bytes]) -> None:
        self._handle, self.size, self.crc32, self.flush = handle, 0, 0, handle.flush

    def write(self, data: Any) -> int:
        """Write data, and return its length in bytes."""
        self._handle.write(data)
        self.size, self.crc32 = self.size + len(data), zlib.crc32(data, self.crc32)
        return len(data)


def crc32_of(file: Path) -> int:
    """Compute the CRC-32 of a file. Raises OSError."""
    checksum = 0
    with file.open("rb", buffering=0) as handle:
        while block := handle.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


_BLOCK = 1 << 24  # bytes read at a time


def cache_folder() -> Path:
    """Return the package's folder in the user's cache, for files that can be recreated."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "cfvlm_ds"


def remove(path: Path) -> None:
    """Remove a file, a link (but not its target), or a folder with its contents."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def whole_file(path: Path, shared: bool = False) -> Iterator[IO[bytes]]:
    """Open a temporary file that is renamed to ``path`` at the end of the block. Readers therefore never see a partial file at ``path``,
    even after a crash.

    If ``shared`` is True, several processes can write the file at the same time. Otherwise, raises ConfigError if another process is
    writing it. If writing fails, raises an OSError that names ``path``.
    """
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp" if shared else f"{path.name}.tmp")
    held = None
    try:
        if (held := create_locked(temporary)) is None:
            raise ConfigError(f"{path} is being written by another process; wait for it, or name another file")
        with os.fdopen(os.dup(held), "wb") as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        if error.filename not in (None, str(temporary)):  # an error from the block about another file
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        if held is not None:
            with contextlib.suppress(OSError):
                if is_same(temporary, held):
                    temporary.unlink()
            os.close(held)


def create_locked(path: Path) -> int | None:
    """Create and lock a new file. A file that a killed process left behind is replaced. Return the descriptor, or None if another process
    holds the lock.
    """
    while True:
        new = not os.path.lexists(path)
        if path.is_symlink():
            path.unlink()
        try:
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if new else 0), 0o666)
        except FileExistsError:  # another process was faster
            continue
        except FileNotFoundError:
            if new:  # the folder does not exist
                raise
            continue
        try:
            locked = lock(handle, path)
            if locked and is_same(path, handle):
                if new:
                    return handle
                path.unlink()
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        if not (locked or new):
            return None


@contextlib.contextmanager
def file_lock(path: Path, waiting: Alive = no_op, alive: Alive = no_op) -> Iterator[None]:
    """Hold the lock file ``path`` for the duration of the block.

    If another process holds it, ``waiting`` is called once, and ``alive`` is called repeatedly until the lock is free.
    """
    held = create_locked(path)
    if held is None:
        waiting()
    while held is None:
        alive()
        time.sleep(_POLL_S)
        held = create_locked(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(held)


def lock(handle: int, path: Path) -> bool:
    """Lock an open file until it is closed. Return False if another process holds the lock.

    If the file system does not support locks, print a warning once and return True. The filelock package is not suitable: it locks a
    separate file, and raises an error on a file system without locks.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        if not _reported:
            _reported.append(path)
            print_line(
                f"warning: the file system of {path.parent} has no file locks ({error.strerror}); run one process at a time there",
                error=True,
            )
    return True


_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_POLL_S = 0.5
_reported: list[Path] = []


@contextlib.contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Create an empty temporary folder that is renamed to ``final`` at the end of the block. Until then, an existing ``final`` is kept.

    If two processes create the same folder at the same time, the later one removes the other's temporary folder and continues; the earlier
    one raises FileExistsError. Raises OSError if a folder cannot be written.
    """
    partial, older, descriptor = final.with_name(f"{final.name}.partial"), aside_of(final), None
    try:
        if older.exists() and not final.exists():  # an earlier process was killed between its two renames
            os.replace(older, final)
        remove(partial)
        partial.mkdir(parents=True)
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)  # while it is open, its inode number is not reused
        yield partial
        if not is_same(partial, descriptor):
            raise FileExistsError(errno.EEXIST, "another process has started to write it; run one process at a time", str(final))
        remove(older)
        put_in_place(partial, final, older)
        remove(older)
    finally:
        if descriptor is not None:
            if is_same(partial, descriptor):
                remove(partial)
            os.close(descriptor)


def is_same(path: Path, opened: int) -> bool:
    """Return whether a path still refers to the file or folder that is open as descriptor ``opened``."""
    return path.exists() and os.path.samestat(path.stat(), os.fstat(opened))


def aside_of(final: Path) -> Path:
    """Return the path where ``whole_folder`` keeps the old folder until the new one has replaced it."""
    return final.with_name(f"{final.name}.replaced.partial")


def put_in_place(finished: Path, final: Path, older: Path) -> None:
    """Rename an existing ``final`` to ``older``, then ``finished`` to ``final``. If the second rename fails, the first is undone. Raises
    OSError.
    """
    if final.exists():
        os.replace(final, older)
    try:
        os.replace(finished, final)
    except OSError:
        if older.exists() and not final.exists():
            os.replace(older, final)
        raise


def replace(path: Path, content: bytes, shared: bool = False) -> None:
    """Write ``content`` to ``path`` atomically (see ``whole_file``)."""
    with whole_file(path, shared) as file:
        file.write(content)


def write_if_possible(path: Path, text: str, say: Say) -> bool:
    """Write an optional file with ``replace``. If that fails, only warn. Return whether the file was written."""
    try:
        replace(path, text.encode())
    except OSError as error:
        say(f"warning: {unwritten(path, error)}; the run continues without it")
        return False
    return True
