"""Rows of a manifest by number: JSON values with their places, or an error in place of a value."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.reading import DuplicateKey, parse_json
from cfvlm_ds.data.lines import IndexedLines


class Rows(Protocol):
    """Rows of a file by number. Threads and forked processes can share one object."""

    path: Path
    roots: tuple[Path, ...]
    """Folders to which the names of a container's own pictures are relative."""

    def __len__(self) -> int: ...

    def where(self, row: int) -> str:
        """Return the place of a row for messages."""
        ...

    def value(self, row: int) -> Any:
        """Return the JSON value, or a DataError that names the place."""
        ...


class LineRows:
    """Rows of JSON lines, read on access."""

    roots: tuple[Path, ...] = ()

    def __init__(self, lines: IndexedLines) -> None:
        self.path, self._lines = lines.path, lines

    def __len__(self) -> int:
        return len(self._lines)

    def where(self, row: int) -> str:
        return self._lines.where(row)

    def value(self, row: int) -> Any:
        try:
            line = self._lines.line(row)
        except DataError as error:
            return error
        except OSError as error:
            return DataError(f"{self.where(row)}: the row cannot be read ({error.strerror}); look at the file's disk and start again")
        value = _parsed(line, lambda: self.where(row), "write one JSON object per line, or put a list in a file named .json")
        if isinstance(value, list):
            return DataError(f"{self.where(row)}: the line is a list, not an object; write one object per line, or name the file .json")
        return value


def half_of_character(error: UnicodeEncodeError, where: str) -> DataError:
    """Build the error for a text with half a surrogate pair, which cannot be encoded."""
    half = ascii(error.object[error.start])[1:-1]
    return DataError(f"{where}: {half} is half of a character, and no tokenizer or file takes it; write the whole or remove it")


def _parsed(data: bytes, where: Callable[[], str], remedy: str) -> Any:
    """Parse a JSON text, or return the error."""
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
        return half_of_character(error, where())
    except UnicodeDecodeError as error:
        return DataError(f"{where()}: byte {error.start + 1} is not UTF-8; save the file as UTF-8")
    except DuplicateKey as error:
        return DataError(f"{where()}: {error}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of nested brackets
        return DataError(f"{where()}: JSON that cannot be parsed ({error}); {remedy}")
