"""Rows of a container: their types, and the conversion of parser errors to DataErrors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.reading import MIB

Row: TypeAlias = dict[str, Any]
Rows: TypeAlias = Iterator[tuple[str, Row | DataError]]
"""Iterator over (location, row). An invalid row is replaced with a DataError that does not name the location."""

MAX_ROW = 4 * MIB
"""Maximum size of a row as JSON without its pictures, in bytes. It equals the limit for a row in a JSON lines file."""


def rows_of(path: Path, read: Callable[[Path], Rows]) -> Rows:
    """Yield the location and value of each row that ``read`` parses. If the parser fails, raises a DataError that names the file and the
    last row read.
    """
    where = ""
    try:
        for where, row in read(path):
            yield where, row
    except (DataError, MemoryError):
        raise
    except Exception as error:  # parsers raise nearly anything on damaged bytes
        after, why = f" after {where}" if where else "", " ".join(str(error).split())[:300] or type(error).__name__
        remedy = "it is compressed, truncated, damaged or of another kind; unpack it, or get a complete copy"
        if isinstance(error, OSError) and error.strerror:
            why, remedy = error.strerror, "check the disk and the permissions"
        raise DataError(f"{path}: cannot be read{after} ({why}); {remedy}") from error
