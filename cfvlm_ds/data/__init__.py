"""Data: manifests of counterfactual groups, images, their check before a run, and the order in which a run sees them.

A further format is one function from a row to a group (see native.py) and one line in FORMATS.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from pathlib import Path

from cfvlm_ds.data.cfvlm import cfvlm_group
from cfvlm_ds.data.check import CheckReport, Lengths, check_groups
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
    "check_manifest",
    "image_size",
    "open_image",
    "read_manifest",
]

FORMATS: dict[str, Format] = {
    "cfgroup": native_group,
    "pairs": pair_group,
    "cfvlm": cfvlm_group,
}


def read_manifest(path: str | Path, root: str | Path | None = None, format: str = "cfgroup") -> list[CounterfactualGroup]:
    """The groups of a manifest, in file order: JSON lines, or one JSON list in a file named .json.

    Image paths are relative to ``root`` (default: the manifest's folder), must stay inside it with links followed, and are returned joined
    to it; the images are not opened. Raises DataError on the first problem: one sentence naming file, row (1-based line, or item of a
    list) and remedy.
    """
    groups = []
    for _, item in _entries(path, root, format):
        if isinstance(item, DataError):
            raise item
        groups.append(item)
    return groups


def check_manifest(
    path: str | Path,
    root: str | Path | None = None,
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
    return check_groups(Path(path), entries, lengths=lengths, max_pixels=max_pixels, progress=progress)


def _entries(path: str | Path, root: str | Path | None, format: str) -> Iterator[Entry]:
    path = Path(path)
    if format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(FORMATS)}"
        raise DataError(f"{path}: unknown format {format!r}; {hint}")
    return iter_groups(path, path.parent if root is None else Path(root), FORMATS[format])
