"""Data: manifests of counterfactual groups, images, their check before a run, and the order in which a run sees them.

A further format is one function from a row to a group (see native.py) and one line in FORMATS.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cfvlm_ds.data.cfvlm import cfvlm_group
from cfvlm_ds.data.check import CheckReport, Lengths, Share, check_groups
from cfvlm_ds.data.images import MAX_PIXELS, image_size, open_image
from cfvlm_ds.data.native import Entry, Format, iter_groups, native_group
from cfvlm_ds.data.pairs import pair_group
from cfvlm_ds.data.sampler import GroupSampler, PackedSampler
from cfvlm_ds.groups import CounterfactualGroup, DataError

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "CheckReport",
    "Format",
    "GroupSampler",
    "PackedSampler",
    "Root",
    "Share",
    "check_manifest",
    "check_share",
    "data_roots",
    "image_size",
    "named_apart",
    "open_image",
    "read_manifest",
]

FORMATS: dict[str, Format] = {
    "cfgroup": native_group,
    "pairs": pair_group,
    "cfvlm": cfvlm_group,
}


Root = str | Path | Sequence[str | Path] | None
"""Folders that hold the images of a manifest; None for the manifest's own."""


def read_manifest(path: str | Path, root: Root = None, format: str = "cfgroup") -> list[CounterfactualGroup]:
    """The groups of a manifest, in file order: JSON lines, or one JSON list in a file named .json.

    Image paths are absolute, or relative to ``root`` (default: the manifest's folder), of several to the first that has such a file, and
    are returned joined to it. The file a path leads to, links followed, must be inside one of them; images are not opened. Raises DataError
    on the first problem: one sentence naming file, row (1-based line, or item of a list) and remedy.
    """
    groups = []
    for _, item in _entries(path, root, format):
        if isinstance(item, DataError):
            raise item
        groups.append(item)
    return groups


def check_manifest(
    path: str | Path,
    root: Root = None,
    format: str = "cfgroup",
    *,
    lengths: Lengths | None = None,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[str], object] = print,
) -> CheckReport:
    """Everything that is wrong with a data set, and what it contains. Reads the manifest and decodes every image it names, once.

    ``lengths`` (a Collator, say) knows how many tokens a row takes; with it, rows beyond the model's window are problems and visual tokens
    are counted. ``max_pixels`` as in open_image. ``progress`` receives a line with rate and remaining time every 5 seconds of work.
    Problems are collected, not raised; DataError is raised for an unknown format.
    """
    entries = _entries(path, root, format)
    return check_groups(Path(path), entries, lengths=lengths, max_pixels=max_pixels, progress=progress)[0]


def check_share(
    path: str | Path,
    root: Root,
    format: str,
    share: Share,
    *,
    lengths: Lengths | None,
    max_pixels: int,
    progress: Callable[[str], object] = print,
) -> tuple[CheckReport, list[CounterfactualGroup]]:
    """One process's part of ``check_manifest``, and the groups of all well-formed rows."""
    entries = _entries(path, root, format)
    return check_groups(Path(path), entries, lengths=lengths, max_pixels=max_pixels, progress=progress, share=share)


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


def _entries(path: str | Path, root: Root, format: str) -> Iterator[Entry]:
    path = Path(path)
    if format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(FORMATS)}"
        raise DataError(f"{path}: unknown format {format!r}; {hint}")
    return iter_groups(path, data_roots(path, root), FORMATS[format])
