"""Files of a work folder that all shards read: of those that start together one makes it, and the others wait."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cfvlm_ds.core.errors import StorageError, unwritten


def made_once(path: Path, is_whole: Callable[[Path], bool], make: Callable[[], None]) -> Path:
    """The file at ``path``, which ``make`` writes where there is none that is whole. Where a file system keeps no locks, all processes make
    the same one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.parent) as alone:
            if path.is_symlink() or not path.is_file() or not is_whole(path):
                for left in path.parent.glob(f"{path.name}.*.tmp") if alone else ():  # by a kill
                    left.unlink()
                make()
    except OSError as error:
        raise StorageError(f"{unwritten(path, error)}; make room, or correct the folder") from error
    return path


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder, which leaves no file in it; gives whether there are such locks."""
    handle, locked = os.open(folder, os.O_RDONLY), False
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
            locked = True
        yield locked
    finally:
        os.close(handle)
