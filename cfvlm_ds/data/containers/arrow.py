"""Arrow containers: Parquet files, Arrow files and data sets saved by ``datasets``, read by pyarrow.

Pictures in an Arrow file are not copied. A row refers to them by the offset and length of their bytes (``data.arrow#4096+60123``). Pictures
in a Parquet file are compressed, or at least divided into pages, so they are copied when the rows are converted.
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

_ROWS = 64  # rows in a batch: 256 MB if each has a picture of 4 MB
_BYTES = 256 * MIB  # limit on a Parquet batch's uncompressed size as stated in the file; a few kB can decompress to a few GB

Named = Callable[[Any], str | None]
"""Function that returns a reference to a pyarrow buffer's bytes in the file, or None if they are not in the file."""


def parquet_rows(path: Path) -> Rows:
    """Yield the location and value of each row in a Parquet file."""
    arrow = _pyarrow(path)
    from pyarrow import parquet

    with open_regular(path) as handle, parquet.ParquetFile(handle) as file:
        number = 0
        for batch in file.iter_batches(batch_size=_batch_size(file.metadata)):
            for row in _batch_rows(batch, arrow, None):
                number += 1
                yield f"row {number}", row


def _batch_size(metadata: Any) -> int:
    """Return a number of rows per batch that keeps batches below _BYTES bytes if the rows of each row group are similar in size."""
    parts = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    largest = max((part.total_byte_size / part.num_rows for part in parts if part.num_rows), default=0)
    return max(1, min(_ROWS, int(_BYTES / max(largest, 1))))


def arrow_rows(path: Path) -> Rows:
    """Yield the location and value of each row in an Arrow file (IPC file format or IPC stream format)."""
    arrow = _pyarrow(path)
    open_regular(path).close()  # raises an error for a pipe
    with arrow.memory_map(str(path)) as mapped:
        begin, size = mapped.read_buffer(1).address, os.stat(path).st_size

        def named(value: Any) -> str | None:
            place = value.address - begin
            return f"{path.name}#{place}+{value.size}" if 0 <= place <= size - value.size else None

        number = 0
        for batch in _batches(mapped, arrow):
            batch.validate(full=True)  # offsets can point outside the file
            for start in range(0, len(batch), _ROWS):  # a file can have all its rows in one batch
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
        raise ValueError("two columns have the same name")
    for row in zip(*(_values(column, arrow, named) for column in batch.columns), strict=True):
        yield dict(zip(names, row, strict=True))


def _values(array: Any, arrow: Any, named: Named | None) -> list[Any]:
    """Convert a column to Python values. ``_bytes`` converts binary values. A struct with the fields bytes and path is a picture stored by
    the ``datasets`` library.
    """
    kind, types = array.type, arrow.types
    if isinstance(array, arrow.ExtensionArray):
        return _values(array.storage, arrow, named)
    if types.is_dictionary(kind):  # decoding could take the size of the longest value for every row
        places = array.indices.unique().drop_null()
        decoded = dict(zip(places.to_pylist(), _values(array.dictionary.take(places), arrow, named), strict=True))
        return [decoded.get(place) for place in array.indices.to_pylist()]
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
    """Convert a text column to strings. A text over the per-row size limit is not copied; it is replaced with a DataError."""
    sizes = arrow.compute.binary_length(array)
    if (arrow.compute.max(sizes).as_py() or 0) <= MAX_ROW:
        return list(array.to_pylist())
    problem = f"the row has a text of {{}} bytes, over the limit of {MAX_ROW} for one row; shorten it"
    texts = zip(sizes.to_pylist(), array, strict=True)
    return [DataError(problem.format(size)) if size and size > MAX_ROW else text.as_py() for size, text in texts]


def _valid(array: Any) -> list[bool]:
    valid: list[bool] = array.is_valid().to_pylist()
    return valid


def _pictures(array: Any, arrow: Any, named: Named | None) -> list[Any]:
    """Convert pictures stored by ``datasets``. Each has bytes and its original path; the path is used if there are no bytes."""
    columns = dict(zip([field.name for field in array.type], array.flatten(), strict=True))
    contents = _values(columns["bytes"], arrow, named)
    paths = columns["path"].to_pylist() if "path" in columns else [None] * len(array)
    return [path if content is None else content for content, path in zip(contents, paths, strict=True)]


def _bytes(array: Any, large: bool, named: Named | None) -> list[Any]:
    """Convert each binary value to a reference to its bytes in the file, or to bytes if it exists only in memory, for instance after
    decompression. The buffer is sliced directly, because creating a pyarrow scalar for each value would copy the data.
    """
    _, offsets, contents = array.buffers()
    places = np.frombuffer(offsets, "<i8" if large else "<i4")[array.offset : array.offset + len(array) + 1].tolist() if len(array) else []
    values: list[Any] = []
    for valid, begin, end in zip(_valid(array), places, places[1:], strict=False):
        part = contents.slice(begin, end - begin) if contents is not None else None
        values.append((named(part) if named and part else None) or (part.to_pybytes() if part else b"") if valid else None)
    return values


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (str, bytes, int, float, bool, list, dict)) else str(value)


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.ipc
    except ImportError as error:
        raise DataError(
            f"{path}: reading it needs pyarrow ({error}); run pip install 'cfvlm-ds[data]', or save it as JSON lines"
        ) from error
    return pyarrow
