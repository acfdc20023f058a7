"""Manifests: functions that open a manifest's groups, resolve its paths, and give several manifests distinct names.

``open_groups`` opens a manifest of any size; ``read_manifest`` loads all groups of a small manifest into memory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cfvlm_ds.core.data_config import AUTO
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.progress import Say, no_op
from cfvlm_ds.data.passes import Scan
from cfvlm_ds.data.store import GroupStore
from cfvlm_ds.data.stored import is_store, open_store

Root = str | Path | Sequence[str | Path] | None
"""Folders of a manifest's images; None for the manifest's own folder."""


def open_groups(
    path: str | Path,
    root: Root = None,
    format: str = AUTO,
    *,
    limit: int | None = None,
    scan: Scan | None = None,
    progress: Say = no_op,
    cache: Sequence[Path] | None = None,
) -> GroupStore:
    """Open the groups of a manifest in file order. Each group is read when it is accessed.

    ``path`` is a JSON lines file or a container of rows (cfvlm_ds/data/containers/). A container is converted to JSON lines in a folder of
    ``cache`` on first use. ``path`` can also be a store, whose format is fixed, or an address such as
    hf://datasets/ORG/NAME/data/train-*.parquet, whose files are fetched from the Hugging Face hub on first use. ``format`` is the name of a
    format, with or without options. ``auto`` selects the format of the first row whose format is recognised; this format is reported to
    ``progress`` unless it is the native one.

    Image paths are absolute or relative to ``root`` (default: the manifest's folder). If there are several roots, the first one that
    contains the file is used. The groups contain the joined paths. Each file must be inside one of the roots after links are resolved.
    Images are not opened. Only the first ``limit`` groups are used. If a format needs passes over all rows, ``scan`` runs them.

    Raises DataError for a manifest that cannot be read, has no rows, or lacks a column that ``format`` names. Accessing an invalid row
    raises a DataError whose message is one sentence and names the file, the row (1-based line, or item of a list) and the remedy. Repeated
    ids are detected by the data check, not by this function.
    """
    known_format(path, format)
    path = local_path(path, scan, progress)
    roots = data_roots(path, root)
    if path.is_dir() and is_store(path):
        return open_store(path, () if root is None else roots, limit)
    if os.path.exists(path):
        for data_root in roots:
            if not data_root.is_dir():
                remedy = "pass the folder that image paths are relative to as --root or data.root"
                raise DataError(f"{path}: its data root {data_root} is not a folder; {remedy}")
    from cfvlm_ds.data.formats.open import open_data  # training on a store does not need it

    return open_data(path, roots, format, limit, scan, progress, cache)


def local_path(path: str | Path, scan: Scan | None = None, progress: Say = no_op) -> Path:
    """Return the local path of a data set. A data set on the Hugging Face hub is fetched on first use. Raises DataError if that fails."""
    if ":/" not in str(path):
        return Path(path)
    from cfvlm_ds.data.containers.hub import fetched

    return fetched(path, (scan or Scan()).alive, progress)


def read_manifest(path: str | Path, root: Root = None, format: str = AUTO) -> list[CounterfactualGroup]:
    """Load all groups of a manifest into memory. Raises DataError for the first problem, such as a repeated id."""
    groups, seen = [], dict[str, int]()
    for index, group in (store := open_groups(path, root, format)).entries():
        if isinstance(group, DataError):
            raise group
        if (first := seen.setdefault(group.id, index)) != index:
            raise DataError(repeated(store, index, first, group.id))
        groups.append(group)
    return groups


def repeated(store: GroupStore, index: int, first: int, group_id: str) -> str:
    """Return the error message for a group (``index``) that repeats the id of an earlier group (``first``)."""
    where, before = store.where(index), store.where(first)
    return f"{where}: group id {group_id!r} is already used by {before}; make ids unique, or remove the row if it repeats that one"


def known_format(path: str | Path, format: str) -> None:
    """Raise DataError for an unknown format or format option."""
    if format != AUTO:
        from cfvlm_ds.data.formats import format_named

        format_named(format, path)


def data_roots(path: str | Path, root: Root) -> list[Path]:
    """Return the folders of a manifest's images, by default the manifest's own folder. Raises DataError for an empty list."""
    if root is None:
        return [Path(path).parent]
    roots = [Path(root)] if isinstance(root, str | Path) else [Path(folder) for folder in root]
    if not roots:
        raise DataError(f"{path}: its data root is an empty list; name the folder of its images, or leave the option out")
    return roots


def named_apart(paths: Sequence[str]) -> dict[str, str]:
    """Return a mapping from distinct names to the paths. A name is the path's stem, preceded by as many parent folders as are needed to
    distinguish it from the other paths.

    Raises DataError for a path that occurs twice.
    """
    all_parts = [Path(os.path.normpath(Path(path).absolute())).parts for path in paths]
    for path, parts in zip(paths, all_parts, strict=True):
        if all_parts.count(parts) > 1:
            raise DataError(f"{path} is given twice; name each manifest once")
    stems = [(*parts[:-1], Path(parts[-1]).stem) for parts in all_parts]
    if len(set(stems)) == len(stems):
        all_parts = stems
    return {"/".join(parts[-_depth(parts, all_parts) :]): path for path, parts in zip(paths, all_parts, strict=True)}


def _depth(parts: tuple[str, ...], among: list[tuple[str, ...]]) -> int:
    return next(n for n in range(1, len(parts) + 1) if sum(other[-n:] == parts[-n:] for other in among) == 1)
