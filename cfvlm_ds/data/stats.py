"""Data set statistics: counts, lengths, unknown cells and duplicates, as an object and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cfvlm_ds.core.data_config import AUTO
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import normalised
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.secrets import print_line
from cfvlm_ds.core.text import hashed
from cfvlm_ds.data.check import Lengths, check_texts, look_at_rows
from cfvlm_ds.data.decoding import MAX_PIXELS
from cfvlm_ds.data.manifest import Root, open_groups
from cfvlm_ds.data.overlap import keys_of
from cfvlm_ds.data.passes import Done, Scan
from cfvlm_ds.data.picture_check import open_pictures
from cfvlm_ds.data.picture_index import PictureTable
from cfvlm_ds.data.report import CheckReport, counted, quantiles
from cfvlm_ds.data.store import GroupStore
from cfvlm_ds.data.stored import StoredRows


@dataclass(frozen=True)
class Statistics:
    """Statistics of a manifest's valid rows. ``sides`` counts pictures by the length of their longer side in pixels. The fields ``num_...``
    count distinct rows, pictures, texts and prompts. ``equal_ids`` counts rows that repeat an earlier row's id.
    """

    report: CheckReport
    sides: Counter[int]
    num_rows: int
    num_pictures: int
    num_texts: int
    num_prompts: int
    equal_ids: int

    def __str__(self) -> str:
        report = self.report
        true = report.num_cells - report.num_false_cells - report.num_unknown_cells

        def repeated(distinct: int, of: int, what: str) -> str:
            return f"{of - distinct} of {of} {what} repeat another" if of > distinct else "none"

        lines = {
            "manifest": report.manifest,
            "groups": str(report.num_groups),
            "images x texts": counted(report.shapes),
            "pictures": f"{report.num_images} distinct files, {_spread(self.sides, 'pixels on the longer side')}",
            "texts": f"{self.num_texts} distinct of {report.num_texts}, for {self.num_prompts} distinct prompts",
            "lengths": _spread(report.text_lengths, report.longest_text_unit),
            "visual tokens": _spread(report.visual_tokens, "per image"),
            "cells": f"{true} true, {report.num_false_cells} false, {report.num_unknown_cells} unknown of {report.num_cells}",
            "edit types": counted(report.edit_types) or "none",
            "sources": counted(report.sources),
            "equal rows": repeated(self.num_rows, report.num_groups, "rows"),
            "equal texts": repeated(self.num_texts, report.num_texts, "texts"),
            "equal pictures": repeated(self.num_pictures, report.num_images, "files"),
            "equal ids": repeated(report.num_groups - self.equal_ids, report.num_groups, "rows"),
            "problems": f"{len(report.problems)} (`cfvlm-ds data check` lists all)" if report.problems else "none",
        }
        return "\n".join(f"{name:<16} {value}" for name, value in lines.items())


def statistics(
    path: str | Path,
    root: Root = None,
    format: str = AUTO,
    *,
    lengths: Lengths | None = None,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[str], object] = print_line,
) -> Statistics:
    """Collect the statistics of a manifest.

    The pictures of a prepared store are looked up in its table; other pictures are opened. Problems are counted, not raised. The other
    statistics leave out invalid rows, the sizes of broken pictures, and the lengths of texts that cannot be measured. Lengths are in tokens
    if ``lengths`` is given (for instance a Collator), otherwise in characters. Raises DataError for an unknown format or an unreadable
    manifest.
    """
    store, scan = open_groups(path, root, format, progress=progress), Scan()
    report = CheckReport(str(path))
    seen = look_at_rows(report, store, progress, scan)
    pictures = store.rows.pictures if isinstance(store.rows, StoredRows) else None
    if pictures is None:
        pictures, _ = open_pictures(report, store, *seen.pictures, max_pixels, progress, scan)
    report.add(check_texts(store, lengths, pictures, progress, scan))
    work = partial(_contents, store, pictures)
    parts = scan.over(range(len(store)), work, Progress(progress, "contents", len(store), "groups"))
    rows, contents, texts, prompts = (len(np.unique(np.concatenate(hashes))) for hashes in zip(*parts, strict=True))
    return Statistics(report, Counter(pictures.sides()), rows, contents, texts, prompts, len(seen.repeats))


def _contents(store: GroupStore, pictures: PictureTable, places: Sequence[int], done: Done) -> list[npt.NDArray[Any]]:
    """Hash the rows, pictures, texts and prompts of the groups at the indices ``places``."""
    groups, hashes = [], (set[int](), set[int]())
    for _, group in store.entries(places):
        if not isinstance(group, DataError):
            groups.append(group)
            hashes[0].update(hashed(normalised(candidate.text)) for candidate in group.candidates)
            hashes[1].update(hashed(repr(candidate.prompt)) for candidate in group.candidates)
        done()
    return [*keys_of(groups, pictures), *(np.fromiter(each, np.uint64, len(each)) for each in hashes)]


def _spread(counts: Counter[int], unit: str) -> str:
    if not counts:
        return "none"
    low, middle, high, most = quantiles(counts, 0, 50, 95, 100)
    return f"min {low}, median {middle}, 95 % up to {high}, max {most} {unit}"
