"""Manifests: where the groups of a run are, how their paths count, and what they are called.

``open_groups`` opens one of any size; ``read_manifest`` has all groups of a small one in memory.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from cfvlm_ds.core.data_config import AUTO
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.data.passes import Scan
from cfvlm_ds.data.store import GroupStore
from cfvlm_ds.data.stored import is_store, open_store

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
    path = here(path, scan, progress)
    roots = data_roots(path, root)
    if path.is_dir() and is_store(path):
        return open_store(path, () if root is None else roots, limit)
    if os.path.exists(path):
        for each in roots:
            if not each.is_dir():
                remedy = "pass the folder that image paths are relative to as root"
                raise DataError(f"{path}: its data root {each} is not a folder; {remedy}")
    from cfvlm_ds.data.formats.open import open_data  # which training on a store does without

    return open_data(path, roots, format, limit, scan, progress, cache)


def here(path: str | Path, scan: Scan | None = None, progress: Callable[[str], object] = lambda line: None) -> Path:
    """Return where a data set is on this machine: one of the Hugging Face hub is fetched the first time. Raises DataError."""
    if ":/" not in str(path):
        return Path(path)
    from cfvlm_ds.data.containers.hub import fetched

    return fetched(path, (scan or Scan()).alive, progress)


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
        from cfvlm_ds.data.formats import format_named

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
