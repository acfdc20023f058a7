"""Parquet files, Arrow files and data sets that ``datasets`` has saved, read by pyarrow.

Pictures within an Arrow file stay where they are, and are named by the place of their bytes (``data.arrow#4096+60123``). In Parquet they
are compressed, or in pages of its own at least, and are copied when the rows are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.reading import MIB, open_regular
from cfvlm_ds.data.containers.rows import MAX_ROW, Row, Rows

_ROWS = 64  # of a batch: with pictures of 4 MB each, what one may have in memory
_BYTES = 256 * MIB  # of a batch of Parquet's, by what its parts are said to have uncompressed: a few kB may become as many GB

Named = Callable[[Any], str | None]
"""The name of a value's bytes, a pyarrow buffer, where they have one in the file."""


def parquet_rows(path: Path) -> Rows:
    """The rows of a Parquet file."""
    arrow = _pyarrow(path)
    from pyarrow import parquet

    with open_regular(path) as handle, parquet.ParquetFile(handle) as file:
        number = 0
        for batch in file.iter_batches(batch_size=_batch_size(file.metadata)):
            for row in _batch_rows(batch, arrow, None):
                number += 1
                yield f"row {number}", row


def _batch_size(metadata: Any) -> int:
    """Rows of a batch that is no larger than _BYTES where the rows of each part of the file are of about one size."""
    parts = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    largest = max((part.total_byte_size / part.num_rows for part in parts if part.num_rows), default=0)
    return max(1, min(_ROWS, int(_BYTES / max(largest, 1))))


def arrow_rows(path: Path) -> Rows:
    """The rows of an Arrow file, of either of its two forms."""
    arrow = _pyarrow(path)
    open_regular(path).close()  # no pipe is waited for
    with arrow.memory_map(str(path)) as mapped:
        begin, size = mapped.read_buffer(1).address, os.stat(path).st_size

        def named(value: Any) -> str | None:
            place = value.address - begin
            return f"{path.name}#{place}+{value.size}" if 0 <= place <= size - value.size else None

        number = 0
        for batch in _batches(mapped, arrow):
            batch.validate(full=True)  # offsets that lead out of the file would be read
            for start in range(0, len(batch), _ROWS):  # a writer may have put all rows into one
                for row in _batch_rows(batch.slice(start, _ROWS), arrow, named):
                    number += 1
                    yield f"row {number}", row


def _batches(mapped: Any, arrow: Any) -> Iterator[Any]:
    mapped.seek(0)
    is_file = mapped.read(6) == b"ARROW1"
    mapped.seek(0)
    if not is_file:
        yield from arrow.ipc.open_stream(mapped)
        return
    reader = arrow.ipc.open_file(mapped)
    yield from (reader.get_batch(number) for number in range(reader.num_record_batches))


def _batch_rows(batch: Any, arrow: Any, named: Named | None) -> Iterator[Row]:
    names = batch.schema.names
    if len(set(names)) < len(names):
        raise ValueError("two columns have one name")
    for row in zip(*(_values(column, arrow, named) for column in batch.columns), strict=True):
        yield dict(zip(names, row, strict=True))


def _values(array: Any, arrow: Any, named: Named | None) -> list[Any]:
    """The values of a column, bytes of pictures as bytes or, where they have one, by their name; a picture of ``datasets`` is either."""
    kind, types = array.type, arrow.types
    if isinstance(array, arrow.ExtensionArray):
        return _values(array.storage, arrow, named)
    if types.is_dictionary(kind):  # decoded, it would be as large as its longest value times its rows
        places = array.indices.unique().drop_null()
        found = dict(zip(places.to_pylist(), _values(array.dictionary.take(places), arrow, named), strict=True))
        return [found.get(place) for place in array.indices.to_pylist()]
    if types.is_struct(kind):
        if {"bytes", "path"} >= {field.name for field in kind} and "bytes" in {field.name for field in kind}:
            return _pictures(array, arrow, named)
        fields = [field.name for field in kind]
        columns = [_values(column, arrow, named) for column in array.flatten()]
        return [dict(zip(fields, row, strict=True)) if valid else None for valid, *row in zip(_valid(array), *columns, strict=True)]
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        fixed = types.is_fixed_size_list(kind)
        sizes = [kind.list_size if valid else None for valid in _valid(array)] if fixed else array.value_lengths().to_pylist()
        flat = iter(_values(array.flatten(), arrow, named))
        return [None if size is None else [next(flat) for _ in range(size)] for size in sizes]
    if types.is_binary(kind) or types.is_large_binary(kind):
        return _bytes(array, types.is_large_binary(kind), named)
    if types.is_string(kind) or types.is_large_string(kind):
        return _texts(array, arrow)
    return [_plain(value) for value in array.to_pylist()]


def _texts(array: Any, arrow: Any) -> list[Any]:
    """Texts, and what is wrong in place of one that is longer than a row may be: it is not copied."""
    sizes = arrow.compute.binary_length(array)
    if (arrow.compute.max(sizes).as_py() or 0) <= MAX_ROW:
        return list(array.to_pylist())
    return [_too_long(size) if size and size > MAX_ROW else text.as_py() for size, text in zip(sizes.to_pylist(), array, strict=True)]


def _too_long(size: int) -> DataError:
    return DataError(f"the row has a text of {size} bytes, and {MAX_ROW} are the bound for one row; shorten it")


def _valid(array: Any) -> list[bool]:
    found: list[bool] = array.is_valid().to_pylist()
    return found


def _pictures(array: Any, arrow: Any, named: Named | None) -> list[Any]:
    """``datasets`` writes a picture as its bytes and the name that it had; the bytes count, and the name where there are none."""
    columns = dict(zip([field.name for field in array.type], array.flatten(), strict=True))
    contents = _values(columns["bytes"], arrow, named)
    paths = columns["path"].to_pylist() if "path" in columns else [None] * len(array)
    return [path if content is None else content for content, path in zip(contents, paths, strict=True)]


def _bytes(array: Any, large: bool, named: Named | None) -> list[Any]:
    """Bytes, or the names of their places: a scalar of pyarrow would be a copy of them."""
    _, offsets, contents = array.buffers()
    places = np.frombuffer(offsets, "<i8" if large else "<i4")[array.offset : array.offset + len(array) + 1].tolist() if len(array) else []
    found: list[Any] = []
    for valid, begin, end in zip(_valid(array), places, places[1:], strict=False):
        part = contents.slice(begin, end - begin) if contents is not None else None
        found.append((named(part) if named and part else None) or (part.to_pybytes() if part else b"") if valid else None)
    return found


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (str, bytes, int, float, bool, list, dict)) else str(value)


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.ipc
    except ImportError as error:
        raise DataError(f"{path}: reading it needs pyarrow ({error}); pip install 'cfvlm-ds[data]', or save it as JSON lines") from error
    return pyarrow
