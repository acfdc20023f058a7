"""Files of a work folder that all shards read: of those that start together one makes it, and the others wait."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cfvlm_ds.core.errors import StorageError, unwritten
from cfvlm_ds.core.files import alone


def made_once(path: Path, make: Callable[[], None], is_current: Callable[[Path], bool] = Path.exists) -> Path:
    """The file at ``path``, which ``make`` writes where there is none, or none that ``is_current``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone(path.with_name(f"{path.name}.lock")):
            if not path.is_file() or not is_current(path):
                make()
    except OSError as error:
        raise StorageError(f"{unwritten(path, error)}; make room, or correct the folder") from error
    return path
