"""What containers yield."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.reading import MIB

Row: TypeAlias = dict[str, Any]
Rows: TypeAlias = Iterator[tuple[str, Row | DataError]]
"""Each row with its place, or what is wrong with it (the place not included)."""

MAX_ROW = 4 * MIB
"""Bytes of a row as JSON, the pictures in it not counted: as of a line of JSON lines."""


def unreadable(path: Path, error: Exception, remedy: str) -> DataError:
    """The sentence for a file that cannot be read, or not any further."""
    why = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())[:300]
    return DataError(f"{path}: cannot be read ({why or type(error).__name__}); {remedy}")
