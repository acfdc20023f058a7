"""Joined rows: rows with labels, joined by picture and prompt, from which a labelled format makes its groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.data.formats.truth import Claim
from cfvlm_ds.data.rows import Rows
from cfvlm_ds.data.store import apply


class JoinedRows:
    """Claims of rows, joined by picture and prompt, in the order of the first row of each: 8 bytes a row.

    Args:
        rows: rows of the manifest.
        claim: the format's function from a row to its claim.
        over: iterates over the rows in chunks.
    """

    def __init__(self, rows: Rows, claim: Callable[[Mapping[str, Any]], Claim], over: Callable[..., Iterator[Any]]) -> None:
        self.path, self.roots = rows.path, rows.roots
        self._rows, self._claim = rows, claim
        keys = np.concatenate([*over(self._keys)])
        _, first, joined = np.unique(keys, return_index=True, return_inverse=True)
        joined = np.argsort(np.argsort(first))[joined]  # numbered in the order of the file
        self._members = np.argsort(joined, kind="stable").astype("<u4")
        self._ends = np.cumsum(np.bincount(joined)).astype("<u4")

    def __len__(self) -> int:
        return len(self._ends)

    def where(self, row: int) -> str:
        """Return the place of the first of the joined rows."""
        return self._rows.where(self._rows_of(row)[0])

    def value(self, row: int) -> Any:
        """Return the claims as a tuple, or the DataError of the first invalid row."""
        claims = []
        for member in self._rows_of(row):
            if isinstance(claim := self._read(member), DataError):
                return claim
            claims.append(claim._replace(where=self._rows.where(member)))
        return tuple(claims)

    def _rows_of(self, row: int) -> list[int]:
        return self._members[self._ends[row - 1] if row else 0 : self._ends[row]].tolist()

    def _read(self, row: int) -> Claim | DataError:
        if isinstance(value := self._rows.value(row), DataError):
            return value
        where = self._rows.where(row)
        try:
            return apply(self._claim, value)
        except DataError as error:
            return DataError(f"{where}: {error}")

    def _keys(self, places: Sequence[int], done: Callable[[], object]) -> Any:
        """Compute a number for each row, equal for rows about one picture and prompt; an invalid row has its own number."""
        keys = []
        for row in places:
            claim = self._read(row)
            keys.append(-1 - row if isinstance(claim, DataError) else claim.key)
            done()
        return np.array(keys, np.int64)
