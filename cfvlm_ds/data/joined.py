"""Rows with labels, of which those about one picture and prompt are one: what the groups of a labelled format are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.data.formats.truth import Claim
from cfvlm_ds.data.rows import Rows
from cfvlm_ds.data.store import apply


class JoinedRows:
    """Claims of rows, together where they are about one picture and prompt, in the order of the first row of each: 8 bytes a row.

    Args:
        rows: the manifest's.
        claim: the format's function from a row to what it claims.
        over: goes through the rows, in chunks.
    """

    def __init__(self, rows: Rows, claim: Callable[[Mapping[str, Any]], Claim], over: Callable[..., Iterator[Any]]) -> None:
        self.path, self.roots = rows.path, rows.roots
        self._rows, self._claim = rows, claim
        keys = np.concatenate([*over(self._keys)])
        _, first, of = np.unique(keys, return_index=True, return_inverse=True)
        of = np.argsort(np.argsort(first))[of]  # numbered in the order of the file
        self._members = np.argsort(of, kind="stable").astype("<u4")
        self._ends = np.cumsum(np.bincount(of)).astype("<u4")

    def __len__(self) -> int:
        return len(self._ends)

    def where(self, row: int) -> str:
        """The place of the first row."""
        return self._rows.where(self._of(row)[0])

    def value(self, row: int) -> Any:
        """The claims as a tuple, or the DataError of the first row that is none."""
        claims = []
        for member in self._of(row):
            if isinstance(found := self._read(member), DataError):
                return found
            claims.append(found._replace(where=self._rows.where(member)))
        return tuple(claims)

    def _of(self, row: int) -> list[int]:
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
        """A number for each row, the same for those about one picture and prompt; a row that is none has its own."""
        keys = []
        for row in places:
            claim = self._read(row)
            keys.append(-1 - row if isinstance(claim, DataError) else claim.key)
            done()
        return np.array(keys, np.int64)
