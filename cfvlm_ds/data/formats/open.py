"""Functions that open data sets in any format. A column that seems to hold labels or false texts is rejected unless an option names it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cfvlm_ds.core.data_config import AUTO
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.named import near
from cfvlm_ds.core.progress import Alive, Progress, Say, no_op
from cfvlm_ds.data.cfgroup import NATIVE
from cfvlm_ds.data.containers.kinds import container_of
from cfvlm_ds.data.containers.open import open_rows
from cfvlm_ds.data.fields import Row
from cfvlm_ds.data.formats import format_named
from cfvlm_ds.data.formats.captions import DEFAULTS
from cfvlm_ds.data.formats.chat import without_nulls
from cfvlm_ds.data.formats.preference import unpacked
from cfvlm_ds.data.formats.truth import JoinedRows, joined, leaves, marks, option_value
from cfvlm_ds.data.passes import Done, Scan
from cfvlm_ds.data.rows import Rows
from cfvlm_ds.data.store import Format, GroupStore, count_parts


def open_data(
    path: Path,
    roots: Sequence[Path],
    format: str,
    limit: int | None = None,
    scan: Scan | None = None,
    progress: Say = no_op,
    cache: Sequence[Path] | None = None,
) -> GroupStore:
    """Open a data set that is not a store. The arguments are as in cfvlm_ds.data.open_groups."""
    scan = scan or Scan()
    rows = open_rows(path, cache=cache, alive=scan.alive, progress=progress)
    if format == AUTO and (format := _taken(rows)) != NATIVE:
        progress(f"{path}: read as {container_of(path)}, format {format}")
    convert: Format = format_named(format, path)
    _refuse_absent_columns(rows, convert, scan.alive, progress)

    def over(work: Callable[[Sequence[int], Done], Any], doing: str) -> Iterator[Any]:
        return scan.over(range(len(rows)), work, Progress(progress, f"{path}: {doing}", len(rows), "rows"))

    firsts = count_parts(rows, convert, lambda work: over(work, "counting groups"))
    claim = getattr(convert, "claim", None) if getattr(convert, "label", True) else None
    if claim:
        rows = JoinedRows(rows, claim, lambda work: over(work, "reading labels"))
    own = [folder for folder in rows.roots if folder not in roots]
    store = GroupStore(rows, [*roots, *own], joined if claim else convert, firsts, format, limit)
    if hasattr(convert, "ignore"):
        _refuse_marks(store, convert, scan.alive)
    return store


def _taken(rows: Rows) -> str:
    """Return the format of the first row whose format is recognised, with the option ``label`` for KTO rows. Return the native format if no
    row can be read. Raises DataError if rows can be read but no format is recognised.
    """
    first = {row: value for row in range(min(len(rows), _LOOKED_AT)) if isinstance(value := rows.value(row), Mapping)}
    for value in first.values():
        if named := recognised(value):
            label = kto_label(first.values()) if named in ("llava", "messages") else None
            return f"{named}:label={label}" if label else named
    if first:
        row, value = next(iter(first.items()))
        shown = ", ".join(repr(key) for key in list(value)[:20]) or "none"
        header = "name the columns in the first line, separated by commas, or " * (rows.path.suffix.lower() == ".csv")
        raise DataError(
            f"{rows.where(row)}: no format matches the keys of this row ({shown}); {header}select one and map its columns, as in "
            "--format captions:image=COLUMN,caption=COLUMN (`cfvlm-ds data formats` lists all formats)"
        )
    return NATIVE


_LOOKED_AT = 100  # number of rows for detecting the format
_LOOKED_FOR_MARKS = 2048  # number of groups, spread over the file, whose metadata is searched for labels


def _refuse_absent_columns(rows: Rows, convert: Any, alive: Alive, progress: Say) -> None:
    """Raise DataError if an option of the format names a column that no row has."""
    given = {option: getattr(convert, option, "") for option in (*DEFAULTS, "label", "ignore")}
    absent = {(column, option) for option, columns in given.items() for column in columns.split("+") if column}
    known = dict[str, None]()
    counted = Progress(progress, f"{rows.path}: reading columns", len(rows), "rows")
    for row in counted.over(range(len(rows)) if absent else ()):
        alive()
        if isinstance(value := rows.value(row), Mapping):
            names = _columns(value)
            known = known or names
            absent = {
                (column, option) for column, option in absent if column not in names and given[option] not in names
            }  # the name of a column may contain a +
            if not absent:
                return
    for column, option in sorted(absent):
        hint = near(column, known, "the columns are ")
        raise DataError(f"{rows.path}: no row has the column {column!r}, which the option {option} names; {hint}")


def _columns(row: Row) -> dict[str, None]:
    """Return all names by which options can refer to a row's columns: top-level and nested names and, for a WebDataset sample, names
    within its ``json``.
    """
    names = dict.fromkeys(row)
    for name, _ in leaves(row):
        parts = name.split(".")
        names |= dict.fromkeys(".".join(parts[: k + 1]) for k in range(len(parts)))
    if "__key__" not in row:
        return names
    inner = {name.removeprefix("json.") for name in names}
    return dict.fromkeys(form for name in (*names, *sorted(inner)) for form in (name, name.lower(), f"sample.{name}"))


def _refuse_marks(store: GroupStore, convert: Any, alive: Alive) -> None:
    """Raise DataError if metadata columns that no option names might hold labels, false texts or picture names. The message lists all such
    columns.
    """

    def metadata() -> Iterator[tuple[int, Row, bool]]:
        for index in np.unique(np.linspace(0, len(store) - 1, _LOOKED_FOR_MARKS).astype(int)).tolist():
            alive()
            group = store.entry(index)
            if not isinstance(group, DataError) and isinstance(meta := json.loads(group.meta or "null"), Mapping):
                yield index, meta, not group.num_pictures

    label = getattr(convert, "label", None)  # None: the format has no such option
    columns = [column for column in marks(metadata(), convert.ignore) if column.name != label]
    if not columns:
        return
    first = columns[0]
    what, option, use = "may name pictures of rows without pictures", "image", "rename it to 'image'"
    if first.is_label:
        what, option, use = "may state whether the text is true", "label", "use another format"
    elif first.false_text:
        what, option, use = "may hold false texts or pictures", first.negative, "use another format, or a row for each false text"
    if hasattr(convert, option) and not label:
        join = " (join it with + to the columns that are already read)" * (option != "label")
        named: dict[str, list[str]] = {option: [first.name]}
        for column in columns[1:]:
            if option == first.negative and column.false_text and hasattr(convert, column.negative):
                named.setdefault(column.negative, []).append(column.name)
        use = ",".join(f"{name}={option_value('+'.join(of))}" for name, of in named.items())
        use = f"add {use} to --format {store.format.partition(':')[0]}:...{join}"
    ignore = option_value("+".join(filter(None, [convert.ignore, *(column.name for column in columns)])))
    listed = f"column{'s' * (len(columns) > 1)} {', '.join(map(str, columns))}"
    remedy = f"{use} if so, otherwise add ignore={ignore}"
    raise DataError(f"{store.where(first.row)}: {listed} {what}, but would be ignored; {remedy}")


_KEYS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("webdataset", ("__key__",)),
    ("cfgroup", ("images", "texts", "match")),
    ("pairs", ("image_0", "image_1", "caption_0", "caption_1")),
    ("cfvlm", ("orig_input", "orig_output", "cf_samples")),
    ("preference", ("chosen", "rejected")),
    ("preference", ("chosen_messages", "rejected_messages")),
    ("preference", ("response", "rejected_response")),
    ("preference", ("messages", "rejected_response")),
    ("preference", ("messages", "rejected_messages")),
    ("preference", ("messages", "rejected_images")),
    ("preference", ("chosen", "rejected_images")),
    ("llava", ("conversations",)),
    ("messages", ("messages",)),
    ("messages", ("prompt", "completion")),
    ("messages", ("query", "response")),
    ("messages", ("instruction", "output")),
)
"""Formats and the keys that identify them. A row may have the keys of several formats; the first match wins."""

_KTO = ("label", "kto_tag")
"""Columns that mark a KTO row's answer as good or bad: the first in TRL and ms-swift, the second in LLaMA-Factory."""


def kto_label(rows: Iterable[Row]) -> str | None:
    """Return the name of the label column in KTO rows, or None if there is none. All its values must be true, false, 1, 0 or null."""
    for key in _KTO:
        values = [row[key] for row in rows if row.get(key) is not None]
        if values and all(value in (0, 1) for value in values):
            return key
    return None


def recognised(row: Row) -> str:
    """Return the name of a row's format, or "" if it is not recognised."""
    row = unpacked(without_nulls(row))
    for named, keys in _KEYS:
        if all(key in row for key in keys):
            return named
    if all(any(column in row for column in DEFAULTS[option]) for option in ("image", "caption")):
        return "captions"
    return NATIVE if "texts" in row or "match" in row else ""  # the native format reports the missing keys
