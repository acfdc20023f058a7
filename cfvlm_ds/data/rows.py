"""The rows of a manifest at random: values that JSON gives, each with its place, and what is wrong in place of a value."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.reading import MIB, DuplicateKey, HeldFile, TooLarge, lines, open_regular, parse_json, read_bytes
from cfvlm_ds.data import lines as of_lines
from cfvlm_ds.data.lines import IndexedLines, State, state_of

MAX_LIST = 128 * MIB
"""Bytes of a manifest that is one JSON list, which is in memory at once, several times its size."""


class Rows(Protocol):
    """Rows of a file, by number; one object serves all threads, and processes that are forked."""

    path: Path
    state: State

    def __len__(self) -> int: ...

    def where(self, row: int) -> str:
        """The place of a row, as people name it."""
        ...

    def value(self, row: int) -> Any:
        """What JSON says, or a DataError that names the place."""
        ...


class LineRows:
    """Rows of JSON lines, read when they are asked for."""

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
        return _parsed(line, lambda: self.where(row), "write one JSON object per line, or put a list in a file named .json")


class ListRows:
    """Items of one JSON list, in memory."""

    def __init__(self, path: Path, state: State, items: list[Any]) -> None:
        self.path, self.state, self._items = path, state, items

    def __len__(self) -> int:
        return len(self._items)

    def where(self, row: int) -> str:
        return f"{self.path}: item {row + 1}"

    def value(self, row: int) -> Any:
        return self._items[row]


def open_rows(path: Path, **options: Any) -> Rows:
    """The rows of a file: JSON lines, or one JSON list if its name ends in .json; ``options`` as of IndexedLines.open. Raises DataError for
    a file that cannot be read at all, or has no row."""
    try:
        found = (
            _list_rows(path)
            if path.suffix == ".json" and not _starts_with_an_object(path)
            else LineRows(IndexedLines.open(path, **options))
        )
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(_missing(path)) from error
    except ValueError as error:
        raise DataError(f"{path}: the manifest cannot be read: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: the manifest cannot be read ({error.strerror}); name a readable .jsonl or .json file") from error
    if not len(found):
        raise DataError(f"{path}: the manifest has no rows; write one JSON object per line, or check the step that built it")
    return found


def _starts_with_an_object(path: Path) -> bool:
    """Whether the first line is an object by itself: published data sets name files of one object per line .json too."""
    with open_regular(path) as handle:
        try:
            return isinstance(_parsed(next(lines(handle, of_lines.MAX_LINE), b""), lambda: "", ""), dict)
        except TooLarge:
            return False


def _list_rows(path: Path) -> ListRows:
    state = state_of(HeldFile(path))
    try:
        content = read_bytes(path, MAX_LIST)
    except TooLarge as error:
        raise DataError(f"{path}: {error}; write one object per line to a file named .jsonl, which is read row by row") from error
    items = _parsed(content, lambda: str(path), "correct it, or name the file .jsonl if it holds one object per line")
    if isinstance(items, DataError):
        raise items
    if not isinstance(items, list):
        raise DataError(f"{path}: holds a {type(items).__name__}, not a list of rows; write [...] or name the file .jsonl")
    return ListRows(path, state, items)


def _parsed(data: bytes, where: Callable[[], str], remedy: str) -> Any:
    """The value of a JSON text, or what is wrong with it."""
    try:
        text = data.decode("utf-8-sig")
        value = parse_json(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return DataError(f"{where()}: broken JSON at {line}column {error.colno} ({error.msg}); {remedy}")
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        return DataError(f"{where()}: {half} is half of a character, and no tokenizer or file takes it; write the whole or remove it")
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
