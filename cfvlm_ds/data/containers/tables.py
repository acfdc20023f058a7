"""CSV and TSV tables: a line of column names, followed by rows of text. A quoted field may contain line breaks."""

from __future__ import annotations

import csv
import io
from functools import partial
from pathlib import Path

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.reading import open_regular
from cfvlm_ds.data.containers.rows import MAX_ROW, Row, Rows

_INDEX = "index"
"""Name for an unnamed first column, such as the index that pandas writes."""


def _rows(path: Path, delimiter: str) -> Rows:
    csv.field_size_limit(MAX_ROW)
    with open_regular(path) as raw:
        if (head := raw.peek(4)[:4])[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head:  # type: ignore[attr-defined]
            raise DataError(f"{path}: its text is UTF-16; save the file as UTF-8")
        reader = csv.reader(io.TextIOWrapper(raw, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
        try:
            columns = next((line for line in reader if line), [])
            columns[:1] = [columns[0] or _INDEX] if len(columns) > 1 else columns
            _check_columns(path, columns)
            for line in reader:
                if line:
                    yield f"line {reader.line_num}", _row(columns, line, reader.line_num)
        except csv.Error as error:
            remedy = 'write a quote within quotes twice (""), close every quote, and shorten long fields'
            raise DataError(f"{path}:{reader.line_num}: not a table ({error}); {remedy}") from error
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise DataError(
                f"{path}:{reader.line_num + 1}: byte 0x{byte:02x} at or after this line is not UTF-8; save the file as UTF-8"
            ) from error


csv_rows, tsv_rows = partial(_rows, delimiter=","), partial(_rows, delimiter="\t")


def _check_columns(path: Path, columns: list[str]) -> None:
    if not columns:
        raise DataError(f"{path}: the table is empty; its first line must have the column names")
    for number, column in enumerate(columns, 1):
        if not column.strip():
            raise DataError(f"{path}: column {number} has no name in the first line; write one")
        if columns.index(column) < number - 1:
            raise DataError(f"{path}: two columns are called {column!r}; give them different names")


def _row(columns: list[str], line: list[str], number: int) -> Row | DataError:
    if len(line) != len(columns):
        problem = f"the row (line {number}) has {len(line)} fields, but the first line names {len(columns)} columns"
        return DataError(f"{problem}; put fields with separators in quotes")
    return dict(zip(columns, line, strict=True))
