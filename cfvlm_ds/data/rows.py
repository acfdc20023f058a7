"""The rows of a manifest at random: values that JSON gives, each with its place, and what is wrong in place of a value."""

from __future__ import annotations

import difflib
import json
from bisect import bisect_right
from codecs import BOM_UTF8
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.files import cache_folder
from cfvlm_ds.core.reading import MIB, DuplicateKey, TooLarge, parse_json
from cfvlm_ds.data.containers.json_file import json_rows
from cfvlm_ds.data.containers.kinds import LINES, container_of, is_there, sources_state
from cfvlm_ds.data.containers.prepared import Prepared, prepare, prepared_places
from cfvlm_ds.data.containers.rows import rows_of
from cfvlm_ds.data.lines import IndexedLines, State

MAX_LIST = 16 * MIB
"""Bytes of one JSON value whose rows are held in memory, several times its size; JSON lines are made of a larger one."""


class Rows(Protocol):
    """Rows of a file, by number; one object serves all threads, and processes that are forked."""

    path: Path
    state: State
    roots: tuple[Path, ...]
    """Folders that the names of a container's own pictures are relative to."""

    def __len__(self) -> int: ...

    def where(self, row: int) -> str:
        """The place of a row, as people name it."""
        ...

    def value(self, row: int) -> Any:
        """What JSON says, or a DataError that names the place."""
        ...


class LineRows:
    """Rows of JSON lines, read when they are asked for."""

    roots: tuple[Path, ...] = ()

    def __init__(self, lines: IndexedLines) -> None:
        self.path, self.state, self._lines = lines.path, lines.state, lines

    def __len__(self) -> int:
        return len(self._lines)

    def where(self, row: int) -> str:
        return self._lines.where(row)

    def value(self, row: int) -> Any:
        try:
            line = self._lines.line(row)
        except DataError as error:
            return error
        except TooLarge as error:
            remedy = "shorten it, or split the file into lines (what follows was not read)"
            return DataError(f"{self.where(row)}: {error}; {remedy}")
        except OSError as error:
            return DataError(f"{self.where(row)}: the row cannot be read ({error.strerror}); look at the file's disk and start again")
        value = _parsed(line, lambda: self.where(row), "write one JSON object per line, or put a list in a file named .json")
        if isinstance(value, list):
            return DataError(f"{self.where(row)}: the line is a list, not an object; write one object per line, or name the file .json")
        return value


class ListRows:
    """Rows of one JSON value, in memory, each with its place in it."""

    roots: tuple[Path, ...] = ()

    def __init__(self, path: Path, state: State, items: list[tuple[str, Any]]) -> None:
        self.path, self.state, self._items = path, state, items

    def __len__(self) -> int:
        return len(self._items)

    def where(self, row: int) -> str:
        return f"{self.path}: {self._items[row][0]}"

    def value(self, row: int) -> Any:
        value = self._items[row][1]
        if isinstance(value, DataError):
            return DataError(f"{self.where(row)}: {value}")
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return _half(error, self.where(row))
        return value


class PreparedRows(LineRows):
    """Rows of a container, of which JSON lines were made: row n is line n."""

    def __init__(self, path: Path, state: State, lines: IndexedLines, made: Prepared) -> None:
        super().__init__(lines)
        self.path, self.state, self.roots = path, state, made.roots
        self._files = [name for name, _ in made.sources]
        self._ends = list(accumulate(rows for _, rows in made.sources))

    def where(self, row: int) -> str:
        """The item of the path or, where that is several files, of one of them."""
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
    alive: Callable[[], object] = lambda: None,
    progress: Callable[[str], object] = lambda line: None,
) -> Rows:
    """The rows of JSON lines, or of another container, of which JSON lines are made in a folder of ``cache`` (beside the data, else in the
    user's cache folder) the first time. Raises DataError for a file that cannot be read at all, or has no row."""
    options: Any = {"alive": alive, "progress": progress}
    try:
        kind = container_of(path) if is_there(path) else LINES
        if kind == LINES:
            found: Rows = LineRows(IndexedLines.scanned(path, **options))
        elif kind == "json" and path.stat().st_size <= MAX_LIST:
            found = ListRows(path, sources_state(path), list(rows_of(path, json_rows)))
        else:
            state = sources_state(path)
            made = prepare(path, kind, prepared_places(path, cache_folder()) if cache is None else cache, progress, alive)
            found = PreparedRows(path, state, IndexedLines.scanned(made.lines, **options), made)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(_missing(path)) from error
    except ValueError as error:
        raise DataError(f"{path}: the manifest cannot be read: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: the manifest cannot be read ({error.strerror}); name a readable .jsonl or .json file") from error
    if not len(found):
        raise DataError(f"{path}: the manifest has no rows; write some, or check the step that built it")
    return found


def _half(error: UnicodeEncodeError, where: str) -> DataError:
    half = ascii(error.object[error.start])[1:-1]
    return DataError(f"{where}: {half} is half of a character, and no tokenizer or file takes it; write the whole or remove it")


def _parsed(data: bytes, where: Callable[[], str], remedy: str) -> Any:
    """The value of a JSON text, or what is wrong with it."""
    try:
        text = data.decode("utf-8-sig" if data.startswith(BOM_UTF8) else "utf-8")  # the former is decoded in Python
        value = parse_json(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return DataError(f"{where()}: broken JSON at {line}column {error.colno} ({error.msg}); {remedy}")
    except UnicodeEncodeError as error:
        return _half(error, where())
    except UnicodeDecodeError as error:
        return DataError(f"{where()}: byte {error.start + 1} is not UTF-8; save the file as UTF-8")
    except DuplicateKey as error:
        return DataError(f"{where()}: {error}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of nested brackets
        return DataError(f"{where()}: JSON that cannot be parsed ({error}); {remedy}")


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path}: no such manifest, nor its folder {path.parent}; correct the path"
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=3)
    hint = f"did you mean {' or '.join(repr(name) for name in near)}?" if near else "correct the path"
    return f"{path}: no such manifest; {hint}"
