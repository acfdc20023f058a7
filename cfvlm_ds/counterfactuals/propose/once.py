"""Files that all shard jobs of a work folder share. One job writes such a file while the others wait."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cfvlm_ds.core.errors import StorageError, unwritten
from cfvlm_ds.core.files import file_lock


def made_once(path: Path, make: Callable[[], None], is_current: Callable[[Path], bool] = Path.exists) -> Path:
    """Call ``make`` to write the file ``path`` if it is missing or outdated. Return ``path``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(path.with_name(f"{path.name}.lock")):
            if not path.is_file() or not is_current(path):
                make()
    except OSError as error:
        raise StorageError(f"{unwritten(path, error)}; free some space, or correct the folder") from error
    return path
