"""Functions that open manifests. JSON lines are read directly; a container is first converted to JSON lines."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.progress import Alive, Say, no_op
from cfvlm_ds.core.reading import counted_from, is_there, similar_names
from cfvlm_ds.data.containers.kinds import LINES, container_of
from cfvlm_ds.data.containers.prepared import Prepared, prepare
from cfvlm_ds.data.lines import IndexedLines
from cfvlm_ds.data.rows import LineRows, Rows


class PreparedRows(LineRows):
    """Rows of a container that was converted to JSON lines. Row n is line n of the converted file."""

    def __init__(self, path: Path, lines: IndexedLines, prepared: Prepared) -> None:
        super().__init__(lines)
        self.path, self.roots = path, prepared.roots
        self._files = [name for name, _ in prepared.sources]
        self._ends = list(accumulate(rows for _, rows in prepared.sources))

    def where(self, row: int) -> str:
        """Return the location of a row: the path, the file name if the path refers to several files, and the item number."""
        if (file := bisect_right(self._ends, row)) == len(self._ends):
            return f"{self.path}: item {row + 1}"
        return f"{self.path}: {self._files[file]}, item {row + 1 - (self._ends[file - 1] if file else 0)}"

    def value(self, row: int) -> Any:
        value = super().value(row)
        return DataError(f"{self.where(row)}: {value}") if isinstance(value, str) else value


def open_rows(
    path: Path,
    *,
    cache: Sequence[Path] | None = None,
    alive: Alive = no_op,
    progress: Say = no_op,
) -> Rows:
    """Open the rows of a JSON lines file or a container.

    A container is converted to JSON lines on first use, in the first writable folder of ``cache`` (default: the folder of the data, then
    the user's cache folder). Raises DataError for a file that cannot be read or has no rows.
    """
    options: Any = {"alive": alive, "progress": progress}
    try:
        kind = container_of(path) if is_there(path) else LINES
        if kind == LINES:
            rows: Rows = LineRows(IndexedLines.scanned(path, **options))
        else:
            prepared = prepare(path, kind, cache, progress, alive)
            rows = PreparedRows(path, IndexedLines.scanned(prepared.lines, **options), prepared)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(_missing(path)) from error
    except ValueError as error:
        raise DataError(f"{path}: the manifest cannot be read: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: the manifest cannot be read ({error.strerror}); name a readable .jsonl or .json file") from error
    if not len(rows):
        raise DataError(f"{path}: the manifest has no rows; add some, or check the step that built it")
    return rows


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path}: no such manifest, and its folder {path.parent} does not exist; correct the path{counted_from(path)}"
    return f"{path}: no such manifest; {similar_names(path) or 'correct the path'}{counted_from(path)}"
