"""Counterfactual groups at random, read from their rows when they are asked for: memory does not grow with the number of rows.

A format is one function from a row (a JSON object) to a CounterfactualGroup whose image paths are as written, or to several groups: then it
has ``parts`` too, which says how many without making them. Joining paths to a data root, and refusing the ones that lead out of all roots,
happens here once for all formats, so that a format cannot forget it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup, Pictures
from cfvlm_ds.core.sequences import Lazy
from cfvlm_ds.data.confinement import Confinement
from cfvlm_ds.data.rows import Rows

T = TypeVar("T")

Format = Callable[[Mapping[str, Any]], CounterfactualGroup | Sequence[CounterfactualGroup]]
"""Row -> group, or groups, with image paths as written in the row. Raises DataError without file and line."""


class GroupStore(Sequence[CounterfactualGroup]):
    """The groups of a manifest. One object serves all threads, and processes that are forked.

    Args:
        rows: the manifest's.
        roots: folders that pictures may be in, the one that paths are relative to first.
        convert: the format's function, or what takes the claims of several rows.
        firsts: number of groups before each row, and in all; None where every row is one.
        format: name of the format, with its options.
        limit: groups that it has at most, the first ones.
    """

    def __init__(
        self,
        rows: Rows,
        roots: Sequence[Path],
        convert: Callable[[Any], CounterfactualGroup | Sequence[CounterfactualGroup]],
        firsts: npt.NDArray[Any] | None = None,
        format: str = "",
        limit: int | None = None,
    ) -> None:
        self.rows, self.roots, self.firsts, self.format, self._limit = rows, roots, firsts, format, limit
        self._convert, self._confine = convert, Confinement(roots)
        self._last: tuple[int, Sequence[CounterfactualGroup] | DataError] = (-1, ())

    @property
    def path(self) -> Path:
        """The manifest."""
        return self.rows.path

    @property
    def together(self) -> npt.NDArray[Any] | None:
        """Number of groups before each row, and in all, where a row has several: of a store those of the data that were prepared."""
        found: npt.NDArray[Any] | None = getattr(self.rows, "together", None)
        return self.firsts if found is None else found

    def __len__(self) -> int:
        number = len(self.rows) if self.firsts is None else int(self.firsts[-1])
        return number if self._limit is None else min(number, self._limit)

    @overload
    def __getitem__(self, index: int) -> CounterfactualGroup: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[CounterfactualGroup]: ...

    def __getitem__(self, index: int | slice) -> CounterfactualGroup | Sequence[CounterfactualGroup]:
        """Raises DataError naming file, row and remedy for a row that is no group."""
        if isinstance(index, slice):
            return Lazy(self._group, range(len(self))[index])
        return self._group(range(len(self))[index])

    def where(self, index: int) -> str:
        """The place of a group's row."""
        return self.rows.where(self._row(index)[0])

    def entry(self, index: int) -> CounterfactualGroup | DataError:
        """A group, or what is wrong with its row (its place included)."""
        row, part = self._row(index)
        if (last := self._last)[0] != row:  # a row of many groups is not read for each of them
            self._last = last = (row, _unraised(self._groups, row))
        groups = last[1]
        return groups if isinstance(groups, DataError) else groups[part]

    def entries(self, places: Sequence[int] | None = None) -> Iterator[tuple[int, CounterfactualGroup | DataError]]:
        """Number and entry of all groups, or of some."""
        return ((index, self.entry(index)) for index in (range(len(self)) if places is None else places))

    def _group(self, index: int) -> CounterfactualGroup:
        if isinstance(found := self.entry(index), DataError):
            raise found
        return found

    def _row(self, index: int) -> tuple[int, int]:
        """The row of a group, and which of the row's groups it is."""
        if self.firsts is None:
            return index, 0
        row = int(self.firsts.searchsorted(index, "right")) - 1
        return row, index - int(self.firsts[row])

    def _groups(self, row: int) -> Sequence[CounterfactualGroup]:
        if isinstance(value := self.rows.value(row), DataError):
            raise value
        expected = 1 if self.firsts is None else int(self.firsts[row + 1] - self.firsts[row])
        try:
            groups = [confined(group, self._confine) for group in converted(value, self._convert)]
            if len(groups) != expected:
                raise DataError(f"the row has {len(groups)} groups and not {expected} as when it was counted; correct the format's parts()")
        except DataError as error:
            raise DataError(f"{self.rows.where(row)}: {error}") from error
        return groups


class Unraised(Sequence[CounterfactualGroup | DataError]):
    """Groups for a data worker, with what is wrong in place of one whose row cannot be read: raised there, it would lose its message."""

    def __init__(self, groups: Sequence[CounterfactualGroup]) -> None:
        self._groups = groups

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: Any) -> Any:
        return _unraised(self._groups.__getitem__, index)


def _unraised(function: Callable[..., T], *given: Any) -> T | DataError:
    try:
        return function(*given)
    except DataError as error:
        return error


def count_parts(rows: Rows, convert: Format, over: Callable[..., Iterator[Any]]) -> npt.NDArray[Any] | None:
    """Number of groups before each row, and in all; None for a format of one group a row. ``over`` goes through the rows."""
    parts = getattr(convert, "parts", None)
    if parts is None:
        return None

    def work(places: Sequence[int], done: Callable[[], object]) -> npt.NDArray[Any]:
        found = np.zeros(len(places), np.int64)
        for k, row in enumerate(places):
            found[k] = _parts_of(rows.value(row), parts)
            done()
        return found

    firsts = np.cumsum(np.concatenate([np.zeros(1, np.int64), *over(work)]))
    if firsts[-1] >= 1 << 32:
        raise DataError(f"{rows.path}: its rows have {firsts[-1]} groups, and {1 << 32} is the bound; split the file")
    return firsts.astype("<u4")


def _parts_of(row: Any, parts: Callable[[Any], int]) -> int:
    """Groups of a row; one, which will say what is wrong, where that is not known."""
    try:
        return max(1, int(parts(row))) if isinstance(row, dict) else 1
    except (ValueError, TypeError, AttributeError, OverflowError, LookupError):
        return 1


def converted(row: Any, convert: Callable[[Any], Any]) -> Sequence[CounterfactualGroup]:
    """The groups of a row, with pictures as it names them. Raises DataError without the row's place."""
    found = convert(row) if isinstance(row, tuple) else apply(convert, row)  # a tuple has the claims of several rows
    return [found] if isinstance(found, CounterfactualGroup) else found


def apply(function: Callable[[Mapping[str, Any]], T], row: Any) -> T:
    """Apply a format's function to a row. Whatever it raises on a row that it did not expect is a DataError without the row's place."""
    if not isinstance(row, dict):
        raise DataError(f"the row is a {type(row).__name__}, not an object; write it as {{...}}")
    try:
        return function(row)
    except DataError:
        raise
    except Exception as error:  # such as a number in place of a list
        problem = f"a value in the row is not what the format expects ({type(error).__name__}: {error})"
        raise DataError(f"{problem}; compare it with the format's description") from error


def confined(group: CounterfactualGroup, confine: Confinement) -> CounterfactualGroup:
    """The group with the files that its pictures are in. Raises DataError."""
    group = group.with_images(tuple(tuple(map(confine, pictures)) for pictures in group.images))
    if len(group.images) == len({pictures[-1].name if pictures else "" for pictures in group.images}):
        return group  # by their last names alone
    equal: dict[Pictures, list[int]] = {}
    for second, pictures in enumerate(group.images):
        for first in equal.setdefault(pictures, []):
            if told_apart(group, first, second):
                raise DataError(
                    f"group {group.id!r}: counterfactual image {second} equals image {first} (the same file {group.images[first][0]}) "
                    "though match tells them apart; name the edited image, or remove it"
                )
        equal[pictures].append(second)
    return group


def told_apart(group: CounterfactualGroup, first: int, second: int) -> bool:
    """Whether some text is known to be true of one of these two images of the group and false of the other."""
    return any({a, b} == {0, 1} for a, b in zip(group.match[first], group.match[second], strict=True))
