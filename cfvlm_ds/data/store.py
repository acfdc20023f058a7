"""Group store: random access to counterfactual groups. A row is read when one of its groups is accessed, so rows are not kept in memory.

A format is a function from a row (a JSON object) to one or several CounterfactualGroups, with unchanged image paths. A format with several
groups per row also has a function ``parts``, which counts the groups of a row without building them. The store, not the format, joins image
paths to a data root and confines them to the roots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup, Groups, Pictures
from cfvlm_ds.core.sequences import Lazy
from cfvlm_ds.data.confinement import Confinement
from cfvlm_ds.data.fields import Row
from cfvlm_ds.data.passes import Array, Done
from cfvlm_ds.data.rows import Rows

T = TypeVar("T")

Format = Callable[[Row], CounterfactualGroup | Groups]
"""Function from a row to one or several groups, with unchanged image paths. Its DataErrors do not name the file and line."""


class GroupStore(Lazy[CounterfactualGroup]):
    """Groups of a manifest. Accessing a group in an invalid row raises a DataError that names the file, the row and the remedy. An instance
    can be shared by threads and forked processes.

    Args:
        rows: rows of the manifest.
        roots: folders of the pictures; a relative path is joined to the first folder that has the file.
        convert: function from a row to its groups: the format, or ``joined`` in formats/truth.py for rows with labels.
        firsts: index of each row's first group, followed by the total number of groups; None if every row is one group.
        format: name of the format, with its options.
        limit: use only the first ``limit`` groups; None for all.
    """

    def __init__(
        self,
        rows: Rows,
        roots: Sequence[Path],
        convert: Callable[[Any], CounterfactualGroup | Groups],
        firsts: Array | None = None,
        format: str = "",
        limit: int | None = None,
    ) -> None:
        self.rows, self.roots, self.firsts, self.format, self._limit = rows, roots, firsts, format, limit
        self._convert, self._confine = convert, Confinement(roots)
        self._last: tuple[int, Groups | DataError] = (-1, ())
        number = len(rows) if firsts is None else int(firsts[-1])
        super().__init__(self._group, number if limit is None else min(number, limit))

    @property
    def path(self) -> Path:
        """Path of the manifest."""
        return self.rows.path

    @property
    def together(self) -> Array | None:
        """Index of each row's first group, followed by the total number of groups; None if every row is one group. For a
        prepared store, the rows are those of the data set from which it was prepared.
        """
        stored: Array | None = getattr(self.rows, "together", None)
        return self.firsts if stored is None else stored

    def where(self, index: int) -> str:
        """Return the location of a group's row, such as ``groups.jsonl:7``."""
        return self.rows.where(self._row(index)[0])

    def entry(self, index: int) -> CounterfactualGroup | DataError:
        """Return a group or, if its row is invalid, a DataError that names the row's location."""
        row, part = self._row(index)
        if (last := self._last)[0] != row:  # a row with many groups is read once
            self._last = last = (row, _unraised(self._groups, row))
        groups = last[1]
        return groups if isinstance(groups, DataError) else groups[part]

    def entries(self, places: Sequence[int] | None = None) -> Iterator[tuple[int, CounterfactualGroup | DataError]]:
        """Yield (index, entry) for all groups, or for the groups at the indices ``places``."""
        return ((index, self.entry(index)) for index in (range(len(self)) if places is None else places))

    def _group(self, index: int) -> CounterfactualGroup:
        if isinstance(entry := self.entry(index), DataError):
            raise entry
        return entry

    def _row(self, index: int) -> tuple[int, int]:
        """Return the index of a group's row, and the group's index within the row."""
        if self.firsts is None:
            return index, 0
        row = int(self.firsts.searchsorted(index, "right")) - 1
        return row, index - int(self.firsts[row])

    def _groups(self, row: int) -> Groups:
        if isinstance(value := self.rows.value(row), DataError):
            raise value
        expected = 1 if self.firsts is None else int(self.firsts[row + 1] - self.firsts[row])
        try:
            groups = [confined(group, self._confine) for group in converted(value, self._convert)]
            if len(groups) != expected:
                raise DataError(f"the row has {len(groups)} groups, but {expected} were counted; correct the format's parts()")
        except DataError as error:
            raise DataError(f"{self.rows.where(row)}: {error}") from error
        return groups


class Unraised(Lazy[CounterfactualGroup | DataError]):
    """Groups for a DataLoader worker. The error of an invalid row is returned, not raised, because a DataLoader would bury the message of a
    worker's exception in a traceback.
    """

    def __init__(self, groups: Groups) -> None:
        super().__init__(partial(_unraised, groups.__getitem__), len(groups))


def _unraised(function: Callable[..., T], *given: Any) -> T | DataError:
    try:
        return function(*given)
    except DataError as error:
        return error


def count_parts(rows: Rows, convert: Format, over: Callable[..., Iterator[Any]]) -> Array | None:
    """Return the index of each row's first group, followed by the total number of groups; None for a format with one group per row.

    ``over`` is a callable that maps a function over chunks of the rows.
    """
    parts = getattr(convert, "parts", None)
    if parts is None:
        return None

    def work(places: Sequence[int], done: Done) -> Array:
        counts = np.zeros(len(places), np.int64)
        for k, row in enumerate(places):
            counts[k] = _parts_of(rows.value(row), parts)
            done()
        return counts

    return np.cumsum(np.concatenate([np.zeros(1, np.int64), *over(work)])).astype("<u4")


def _parts_of(row: Any, parts: Callable[[Any], int]) -> int:
    """Count a row's groups. An invalid row counts as one group; accessing this group raises the row's error."""
    try:
        return max(1, int(parts(row))) if isinstance(row, dict) else 1
    except (ValueError, TypeError, AttributeError, OverflowError, LookupError):
        return 1


def converted(row: Any, convert: Callable[[Any], Any]) -> Groups:
    """Convert a row to a sequence of groups with unchanged picture paths. Raises DataErrors that do not name the row's location."""
    groups = convert(row) if isinstance(row, tuple) else apply(convert, row)  # a tuple holds the labelled texts of several rows
    return [groups] if isinstance(groups, CounterfactualGroup) else groups


def apply(function: Callable[[Row], T], row: Any) -> T:
    """Apply a format's function to a row. Any exception is converted to a DataError, which does not name the row's location."""
    if not isinstance(row, dict):
        raise DataError(f"the row is a {type(row).__name__}, not an object; write it as {{...}}")
    try:
        return function(row)
    except DataError:
        raise
    except Exception as error:  # for instance, a number where a list is expected
        problem = f"a value in the row is not what the format expects ({type(error).__name__}: {error})"
        raise DataError(f"{problem}; compare it with the format's description") from error


def confined(group: CounterfactualGroup, confine: Confinement) -> CounterfactualGroup:
    """Return the group after joining its picture paths to the data roots.

    Raises DataError for a path outside the roots, and for two images that are the same file although the truth table distinguishes them.
    """
    group = group.with_images(tuple(tuple(map(confine, pictures)) for pictures in group.images))
    if len(group.images) == len({pictures[-1].name if pictures else "" for pictures in group.images}):
        return group  # all files have distinct names, so no two images are equal
    equal: dict[Pictures, list[int]] = {}
    for second, pictures in enumerate(group.images):
        for first in equal.setdefault(pictures, []):
            if are_distinguished(group, first, second):
                raise DataError(
                    f"group {group.id!r}: counterfactual image {second} is the same file as image {first} ({group.images[first][0]}), "
                    "but match distinguishes them; name the edited image, or remove it"
                )
        equal[pictures].append(second)
    return group


def are_distinguished(group: CounterfactualGroup, first: int, second: int) -> bool:
    """Return whether any text is known to be true of one of the two images and false of the other."""
    return any({a, b} == {0, 1} for a, b in zip(group.match[first], group.match[second], strict=True))
