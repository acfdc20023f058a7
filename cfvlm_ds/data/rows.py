"""Rows of a manifest, accessed by index: JSON values and their locations. The value of an invalid row is a DataError."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from pathlib import Path
from typing import Any, Protocol

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.reading import DuplicateKey, parse_json
from cfvlm_ds.data.lines import IndexedLines


class Rows(Protocol):
    """Rows of a file, accessed by index. An instance can be shared by threads and forked processes."""

    path: Path
    roots: tuple[Path, ...]
    """Folders that picture paths can be relative to, in addition to the data roots."""

    def __len__(self) -> int: ...

    def where(self, row: int) -> str:
        """Return the location of a row for use in messages, such as ``groups.jsonl:7``."""
        ...

    def value(self, row: int) -> Any:
        """Return the JSON value of a row, or a DataError that names its location."""
        ...


class LineRows:
    """Rows of a JSON lines file, read on access."""

    roots: tuple[Path, ...] = ()

    def __init__(self, lines: IndexedLines) -> None:
        self.path, self._lines = lines.path, lines

    def __len__(self) -> int:
        return len(self._lines)

    def where(self, row: int) -> str:
        return self._lines.where(row)

    def value(self, row: int) -> Any:
        try:
            remedy = "write one JSON object per line, or name a file with a list .json and a table .csv or .tsv"
            value = parsed(self._lines.line(row), self.where(row), remedy)
        except DataError as error:
            return error
        except OSError as error:
            return DataError(f"{self.where(row)}: the row cannot be read ({error.strerror}); check the disk and start again")
        if isinstance(value, list):
            return DataError(f"{self.where(row)}: the line is a list, not an object; write one object per line, or name the file .json")
        return value


def parsed(data: bytes, where: object, remedy: str, decoder: json.JSONDecoder | None = None) -> Any:
    """Parse a JSON text in UTF-8. ``decoder`` is passed to parse_json. Raises a DataError whose message begins with ``where``."""
    try:
        text = data.decode("utf-8-sig" if data.startswith(BOM_UTF8) else "utf-8")  # utf-8-sig is slow: its decoder is in Python
        value = parse_json(text, decoder)
        if decoder is None and ("\\ud" in text or "\\uD" in text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(f"{where}: broken JSON at {line}column {error.colno} ({error.msg}); {remedy}") from error
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise DataError(
            f"{where}: {half} is half of a surrogate pair, which no tokenizer accepts; write both halves, or remove it"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from error
    except DuplicateKey as error:
        raise DataError(f"{where}: {error}") from error
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or thousands of nested brackets
        raise DataError(f"{where}: the JSON cannot be parsed ({error}); {remedy}") from error
