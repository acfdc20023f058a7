"""Manifests: where the groups of a run are, how their paths count, and what they are called.

``open_groups`` opens one of any size; ``read_manifest`` has all groups of a small one in memory.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cfvlm_ds.core.conversation import spelled
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.text import quoted
from cfvlm_ds.data.containers.hub import fetched
from cfvlm_ds.data.containers.kinds import container_of
from cfvlm_ds.data.formats import AUTO, format_named
from cfvlm_ds.data.formats.captions import DEFAULTS, Captions
from cfvlm_ds.data.formats.cfgroup import native_group
from cfvlm_ds.data.formats.recognise import kto_label, recognised
from cfvlm_ds.data.formats.truth import Column, leaves, marks, option_value
from cfvlm_ds.data.joined import JoinedRows
from cfvlm_ds.data.lines import State
from cfvlm_ds.data.passes import Scan
from cfvlm_ds.data.rows import Rows, open_rows
from cfvlm_ds.data.store import GroupStore, count_parts
from cfvlm_ds.data.stored import StoredRows, is_store

NATIVE = "cfgroup"

Root = str | Path | Sequence[str | Path] | None
"""Folders that hold the images of a manifest; None for the manifest's own."""


def open_groups(
    path: str | Path,
    root: Root = None,
    format: str = AUTO,
    *,
    limit: int | None = None,
    scan: Scan | None = None,
    progress: Callable[[str], object] = lambda line: None,
    cache: Sequence[Path] | None = None,
) -> GroupStore:
    """The groups of a manifest, in file order, each read when it is asked for: JSON lines, or another container of rows, of which JSON
    lines are made in a folder of ``cache`` the first time (cfvlm_ds/data/containers/). ``format`` is a name, with options or not, or auto:
    the format of the first row that has a known one, of which ``progress`` is told where it is not the native one.

    Image paths are absolute, or relative to ``root`` (default: the manifest's folder), of several to the first that has such a file, and
    are returned joined to it. The file a path leads to, links followed, must be inside one of them; images are not opened. A folder may be
    a store, which has a format of its own.
    An address such as hf://datasets/ORG/NAME/data/train-*.parquet is fetched from the Hugging Face hub the first time.
    ``limit`` leaves out what comes after so many groups. ``scan`` is told that this process is alive, and bounds nothing else.

    Raises DataError for a manifest that cannot be read at all, has no row, or lacks a column that ``format`` names. A row that is no group
    raises one when it is asked for: one sentence naming file, row (1-based line, or item of a list) and remedy. Two groups of one id are
    found by the data check.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise DataError(
            f"data are a {type(path).__name__}, not a path; what is streamed has no row number n, and a run could not go on where it was: "
            "write it to files (save_to_disk, to_parquet, to_json) and name those"
        )
    known_format(path, format)
    scan = scan or Scan()
    path = fetched(path, scan.alive, progress)
    roots = data_roots(path, root)
    if path.is_dir() and is_store(path):
        stored = StoredRows(path, () if root is None else roots)
        again = (_again, (path, stored.roots, format, stored.state, limit))
        return GroupStore(stored, stored.roots, native_group, None, again, NATIVE, limit)
    if os.path.exists(path):
        for each in roots:
            if not each.is_dir():
                remedy = "pass the folder that image paths are relative to as root"
                raise DataError(f"{path}: its data root {each} is not a folder; {remedy}")
    rows = open_rows(path, cache=cache, alive=scan.alive, progress=progress)
    if format == AUTO and (format := _taken(rows)) != NATIVE:
        progress(f"{path}: taken as {container_of(path)}, format {format}")
    convert = format_named(format, path)
    _refuse_absent_columns(rows, convert, scan.alive, progress)

    def over(work: Callable[[Sequence[int], Callable[[], object]], Any], doing: str) -> Iterator[Any]:
        return scan.over(range(len(rows)), work, Progress(progress, f"{path}: {doing}", len(rows), "rows"))

    firsts = count_parts(rows, convert, lambda work: over(work, "groups of each row"))
    if claim := getattr(convert, "claim", None):
        rows = JoinedRows(rows, claim, lambda work: over(work, "labels"))
    own = [each for each in rows.roots if each not in roots]
    store = GroupStore(rows, [*roots, *own], convert, firsts, (_again, (path, roots, format, rows.state, limit)), format, limit)
    if hasattr(convert, "ignore"):
        _refuse_marks(store, convert, scan.alive)
    if claim:
        _say_understood(store, convert, progress)
    return store


def _taken(rows: Rows) -> str:
    """The format of the first row that has a known one, among the first; the native one where none of those can be read. Raises DataError
    where they are of no format."""
    unknown: DataError | None = None
    first = [rows.value(row) for row in range(min(len(rows), _LOOKED_AT))]
    for row, value in enumerate(first):
        if isinstance(value, Mapping):
            try:
                named = recognised(value, rows.where(row))
                label = kto_label(first) if named in ("llava", "messages") else None
                return f"{named}:label={label}" if label else named
            except DataError as error:
                unknown = unknown or error
    if unknown is not None:
        raise unknown
    return NATIVE


_LOOKED_AT = 100  # rows whose format is looked for
_LOOKED_FOR_MARKS, _STRETCH = 2048, 64  # groups whose metadata are looked at for labels; of more, as many stretches over the whole file


def _refuse_absent_columns(rows: Rows, convert: Any, alive: Callable[[], object], progress: Callable[[str], object]) -> None:
    """Raise DataError for a column that an option of the format names and that no row has, or that ``ignore`` names too."""
    absent = {(option, column) for option in (*DEFAULTS, "label", "ignore") for column in getattr(convert, option, "").split("+") if column}
    if both := sorted((column, option) for option, column in absent if option != "ignore" and ("ignore", column) in absent):
        raise DataError(f"{rows.path}: {both[0][1]} and ignore both name the column {both[0][0]!r}; leave it out of one of them")
    counted = Progress(progress, f"{rows.path}: columns", len(rows), "rows")
    for row in counted.over(range(len(rows)) if absent else ()):
        alive()
        if isinstance(value := rows.value(row), Mapping):
            names = _columns(value)
            whole = {option for option, _ in absent if getattr(convert, option) in names}  # a name with a + in it
            if not (absent := {each for each in absent if each[0] not in whole and each[1] not in names}):
                return
    for option, column in sorted(absent):
        first = next((value for row in range(min(len(rows), _LOOKED_AT)) if isinstance(value := rows.value(row), Mapping)), {})
        near = difflib.get_close_matches(column, there := list(_columns(first)), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(map(repr, there[:20])) or 'none'}"
        raise DataError(f"{rows.path}: no row has the column {column!r}, which {option} names; {hint}")


def _columns(row: Mapping[str, Any]) -> dict[str, None]:
    """The names by which options may name a row's columns: its own, those within them, and of a tar's sample those of its json."""
    found = dict.fromkeys(row)
    for name, _ in leaves(row):
        parts = name.split(".")
        found |= dict.fromkeys(".".join(parts[: k + 1]) for k in range(len(parts)))
    if "__key__" not in row:
        return found
    inner = {name.removeprefix("json.") for name in found}
    return dict.fromkeys(each for name in (*found, *sorted(inner)) for each in (name, name.lower(), f"sample.{name}"))


def _refuse_marks(store: GroupStore, convert: Any, alive: Callable[[], object]) -> None:
    """Raise DataError for columns of metadata, of which none is named, that look like labels or hold false texts: all of them at once."""
    number, most = -(-len(store) // _STRETCH), _LOOKED_FOR_MARKS // _STRETCH
    starts = np.unique(np.linspace(0, max(0, len(store) - _STRETCH), min(number, most)).astype(int)).tolist()
    stretches = [range(start, min(start + _STRETCH, len(store))) for start in starts]

    def metadata() -> Iterator[tuple[int, Mapping[str, Any], bool]]:
        for stretch in stretches:
            alive()
            for index, group in zip(stretch, store.batch(stretch), strict=True):
                if not isinstance(group, DataError) and isinstance(meta := json.loads(group.meta or "null"), Mapping):
                    yield index, meta, not group.num_pictures

    label = getattr(convert, "label", None)  # None: the format has no such option
    every = {column.partition(".")[0] for option in DEFAULTS for column in getattr(convert, option, "").split("+") if "." in column}
    found = [each for each in marks(metadata(), convert.ignore, every) if each.name != label]
    if not found:
        return
    named, _, options = store.format.partition(":")

    def spec(*given: str, ignored: Sequence[Column] = ()) -> str:
        again = "|".join(["ignore", *(each.partition("=")[0] for each in given)])
        kept = re.sub(rf'(^|,)\s*({again})\s*=\s*("[^"]*"|[^,]*)', "", options).strip(",")
        ignore = option_value("+".join(filter(None, [convert.ignore, *(each.name for each in ignored)])))
        return f"{named}:{','.join(filter(None, [kept, *given, ignore and f'ignore={ignore}']))}"

    first, others = found[0], found[1:]
    what, use = "may have what is false of the row's picture", []
    if not label and isinstance(convert, Captions):
        by_option: dict[str, list[str]] = {}
        for each in found:
            by_option.setdefault(each.negative, convert.columns_of(store.rows.value(each.row), each.negative)).append(each.name)
        use = [spec(*(f"{option}={option_value('+'.join(names))}" for option, names in by_option.items())) + " if so"]
    elif hasattr(convert, "caption"):
        use = [f"{first.negative} as its name if so"] * (not label)
    else:
        use = ["'rejected' as its name, and the format preference, if so" if label == "" else "a row for each false text if so"]
    if not (first.is_label or first.is_false_texts):
        what, use = "may name pictures of rows that show none", ["image as its name if so"]
    if first.is_label:
        what, use = "may say whether the text is true", []
        if label == "":
            use = [f"{spec(first.option, ignored=others)} if {'the first' if others else 'it'} does"]
            if isinstance(convert, Captions) and (mapped := convert.as_answer(store.rows.value(first.row), first.name)):
                use += [f"{mapped} if it answers what the text asks"]
    use += [f"{spec(ignored=found)} if not"]
    columns = f"column{'s' * bool(others)} {', '.join(map(str, found))}"
    raise DataError(f"{store.where(first.row)}: {columns} {what}, and would not be read; say {', '.join(use)}")


def _say_understood(store: GroupStore, convert: Any, progress: Callable[[str], object]) -> None:
    """Say how a label is read, by the first group that has a false text."""
    for index in range(min(len(store), _LOOKED_AT)):
        (group,) = store.batch([index])
        if not isinstance(group, DataError) and 0 in group.match[0]:
            texts = [group.candidates[group.match[0].index(truth)].text for truth in (1, 0)]
            shown = ", ".join(map(str, group.images[0])) or "its prompt"
            said = f"{quoted(texts[0], 80)} is true of {shown}, and {quoted(texts[1], 80)} is false"
            progress(f"{store.path}: by {convert.label!r}, {said}, as answers to {quoted(spelled(group.candidates[0].prompt), 80)}")
            return


def _again(path: Path, roots: Sequence[Path], format: str, state: State, limit: int | None) -> GroupStore:
    """The same groups in another process."""
    store = open_groups(path, roots, format, limit=limit)
    if store.rows.state != state:
        raise DataError(f"{path}: the data set was written while it is used; start again")
    return store


def read_manifest(path: str | Path, root: Root = None, format: str = AUTO) -> list[CounterfactualGroup]:
    """All groups of a manifest in memory, as ``open_groups`` gives them. Raises DataError on the first problem, two groups of one id
    included."""
    groups, seen = [], dict[str, int]()
    for index, group in (store := open_groups(path, root, format)).entries():
        if isinstance(group, DataError):
            raise group
        if (first := seen.setdefault(group.id, index)) != index:
            raise DataError(repeated(store, index, first, group.id))
        groups.append(group)
    return groups


def repeated(store: GroupStore, index: int, first: int, group_id: str) -> str:
    """That a row repeats an earlier one, or that its group has only the id of that one's."""
    where, before = store.where(index), store.where(first)
    if dataclasses.replace(store[index], meta="") == dataclasses.replace(store[first], meta=""):
        return f"{where}: the row repeats {before}; remove it"
    return f"{where}: group id {group_id!r} is already used by {before}; make ids unique"


def known_format(path: str | Path, format: str) -> None:
    """Raise DataError for an unknown format, or an unknown option of one."""
    if format != AUTO:
        format_named(format, path)


def data_roots(path: str | Path, root: Root) -> list[Path]:
    """The folders that images of the manifest at ``path`` may be in, the one that paths are relative to first. Raises DataError on none."""
    if root is None:
        return [Path(path).parent]
    roots = [Path(root)] if isinstance(root, str | Path) else [Path(each) for each in root]
    if not roots:
        raise DataError(f"{path}: its data root is an empty list; name the folder of its images, or leave the option out")
    return roots


def named_apart(paths: Sequence[str]) -> dict[str, str]:
    """Name -> path: a file's stem, with as many of its folders before it as tell it from the others.

    Raises DataError for a path that is given twice.
    """
    wholes = [Path(os.path.normpath(Path(path).absolute())).parts for path in paths]
    for path, whole in zip(paths, wholes, strict=True):
        if wholes.count(whole) > 1:
            raise DataError(f"{path} is given twice; name each manifest once")
    stems = [(*whole[:-1], Path(whole[-1]).stem) for whole in wholes]
    if len(set(stems)) == len(stems):
        wholes = stems
    return {"/".join(whole[-_depth(whole, wholes) :]): path for path, whole in zip(paths, wholes, strict=True)}


def _depth(whole: tuple[str, ...], among: list[tuple[str, ...]]) -> int:
    return next(n for n in range(1, len(whole) + 1) if sum(other[-n:] == whole[-n:] for other in among) == 1)
