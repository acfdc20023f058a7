"""The whole of a data set looked at once, before a long run meets its first broken image at night: all problems, and what it contains."""

from __future__ import annotations

import filecmp
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from cfvlm_ds.data.images import open_image
from cfvlm_ds.data.native import Entry, told_apart
from cfvlm_ds.groups import SHAM, CounterfactualGroup, DataError, Pictures

PROGRESS_SECONDS = 5.0
_SHOWN_PROBLEMS = 50
_CHUNK = 1024

T = TypeVar("T")
Size = tuple[int, int]
"""Width and height in pixels."""


class Lengths(Protocol):
    """What a model makes of a row; the collator is one."""

    max_length: int
    """The model's window in tokens."""

    def row_length(self, prompt: str, text: str, sizes: tuple[Size, ...]) -> int:
        """Tokens of prompt, pictures and text."""
        ...

    def visual_tokens(self, sizes: tuple[Size, ...]) -> int:
        """Tokens of the pictures of an image."""
        ...


@dataclass
class CheckReport:
    """What a manifest contains, over its well-formed rows, and everything that is wrong with it (one sentence each, file and row first)."""

    manifest: str
    num_groups: int = 0
    num_images: int = 0
    """Distinct files, broken ones included."""
    num_texts: int = 0
    num_cells: int = 0
    num_unknown_cells: int = 0
    """Cells of the truth tables that ``match`` does not list."""
    edit_types: Counter[str] = field(default_factory=Counter)
    num_counterfactuals: Counter[int] = field(default_factory=Counter)
    """K -> number of groups with K counterfactuals beside the factual pair (shams not counted)."""
    longest_text: int = 0
    longest_text_unit: str = "characters"
    """"tokens" (prompt, image and text) where a text length was given, else "characters" of the text alone."""
    longest_text_where: str = ""
    visual_tokens: list[int] = field(default_factory=list)
    """Of every distinct image (its pictures together), where the model is known."""
    metadata: Counter[str] = field(default_factory=Counter)
    """Further key of rows -> number of groups that keep it."""
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    @property
    def visual_range(self) -> str:
        """Least, median and most visual tokens of an image; empty where the model is not known or nothing is shown."""
        if not self.visual_tokens:
            return ""
        low, middle, high = min(self.visual_tokens), statistics.median_low(self.visual_tokens), max(self.visual_tokens)
        return f"min {low}, median {middle}, max {high} an image"

    def __str__(self) -> str:
        lines = [
            ("manifest", self.manifest),
            ("groups", str(self.num_groups)),
            ("images", f"{self.num_images} distinct files"),
            ("texts", str(self.num_texts)),
            ("unknown cells", f"{self.num_unknown_cells} of {self.num_cells}"),
            ("edit types", ", ".join(f"{name} {count}" for name, count in self.edit_types.most_common()) or "none named"),
            ("counterfactuals", ", ".join(f"K={k}: {count} groups" for k, count in sorted(self.num_counterfactuals.items())) or "none"),
            (
                "longest text",
                f"{self.longest_text} {self.longest_text_unit}" + f" ({self.longest_text_where})" * bool(self.longest_text_where),
            ),
        ]
        if self.visual_tokens:
            lines.append(("visual tokens", self.visual_range))
        if self.metadata:
            lines.append(("metadata", ", ".join(f"{key} {count}" for key, count in self.metadata.items()) + " (kept, not used)"))
        lines.append(("problems", str(len(self.problems)) if self.problems else "none"))
        table = [f"{name:<16} {value}" for name, value in lines]
        table += [f"  {problem}" for problem in self.problems[:_SHOWN_PROBLEMS]]
        if len(self.problems) > _SHOWN_PROBLEMS:
            table.append(f"  ... and {len(self.problems) - _SHOWN_PROBLEMS} more")
        return "\n".join(table)


def check_groups(
    manifest: Path,
    entries: Iterable[Entry],
    *,
    lengths: Lengths | None,
    max_pixels: int,
    progress: Callable[[str], object],
) -> CheckReport:
    """Check the entries of a manifest and open each image they name, once; see cfvlm_ds.data.check_manifest."""
    report = CheckReport(str(manifest))
    groups: list[tuple[str, CounterfactualGroup]] = []
    for where, item in entries:
        if isinstance(item, DataError):
            report.problems.append(str(item))
        else:
            groups.append((where, item))
            _count(report, item)
    sizes = _check_images(report, groups, max_pixels, progress)
    known = {
        pictures: tuple(sizes[picture] for picture in pictures)
        for _, group in groups
        for pictures in group.images
        if all(picture in sizes for picture in pictures)
    }
    if lengths is not None:
        report.visual_tokens = [lengths.visual_tokens(each) for each in known.values() if each]
    for where, group in _with_progress(groups, len(groups), "groups", progress):
        _check_texts(report, where, group, lengths, {known[pictures] for pictures in group.images if pictures in known})
    return report


def _count(report: CheckReport, group: CounterfactualGroup) -> None:
    report.num_groups += 1
    report.num_texts += len(group.candidates)
    report.num_cells += len(group.images) * len(group.candidates)
    report.num_unknown_cells += sum(line.count(None) for line in group.match)
    meta = json.loads(group.meta or "null")
    report.metadata.update(map(repr, meta) if isinstance(meta, dict) else ["meta"] if meta else ())
    report.edit_types.update(edit.type for edit in group.edits)
    shams = {edit.image for edit in group.edits if edit.type == SHAM and edit.image is not None}
    report.num_counterfactuals[max(len(group.images) - len(shams), len(group.candidates)) - 1] += 1


def _check_texts(
    report: CheckReport, where: str, group: CounterfactualGroup, lengths: Lengths | None, sizes: set[tuple[Size, ...]]
) -> None:
    if lengths is not None:
        report.longest_text_unit = "tokens"
    for index, candidate in enumerate(group.candidates):
        if lengths is None:
            length = len(candidate.text)
        else:
            length = max((lengths.row_length(candidate.prompt, candidate.text, each) for each in sizes), default=0)
        if length > report.longest_text:
            report.longest_text, report.longest_text_where = length, f"{where}, text {index}"
        if lengths is not None and length > lengths.max_length:
            report.problems.append(
                f"{where}: group {group.id!r}: text {index} is {length} tokens long with its prompt and image, over the model's window of "
                f"{lengths.max_length}; shorten it, or allow more tokens if the model does"
            )


def _check_images(
    report: CheckReport, groups: list[tuple[str, CounterfactualGroup]], max_pixels: int, progress: Callable[[str], object]
) -> dict[Path, Size]:
    """Sizes of the images that can be opened."""
    first_use: dict[Path, str] = {}
    for where, group in groups:
        for pictures in group.images:
            for path in pictures:
                first_use.setdefault(path, where)
    report.num_images = len(first_use)
    file_sizes: dict[Path, int] = {}
    sizes: dict[Path, Size] = {}
    paths = list(first_use)
    for path, result in zip(paths, _with_progress(_open_all(paths, max_pixels), len(paths), "images", progress), strict=True):
        if isinstance(result, str):
            report.problems.append(f"{first_use[path]}: {result}")
        else:
            file_sizes[path], sizes[path] = result
    for where, group in groups:
        for second in range(1, len(group.images)):
            for first in range(second):
                if told_apart(group, first, second) and _same_bytes(group.images[first], group.images[second], file_sizes):
                    report.problems.append(
                        f"{where}: group {group.id!r}: counterfactual image {second} equals image {first} byte for byte "
                        f"({_named(group.images[second])} and {_named(group.images[first])}) though match tells them apart; redo the edit, "
                        "or remove it"
                    )
    return sizes


def _named(pictures: Pictures) -> str:
    return ", ".join(str(picture) for picture in pictures)


def _same_bytes(first: Pictures, second: Pictures, sizes: dict[Path, int]) -> bool:
    # Files of different size are most pairs and cost nothing; only the rest are read again.
    return all(
        a == b or (a in sizes and sizes[a] == sizes.get(b) and filecmp.cmp(a, b, shallow=False)) for a, b in zip(first, second, strict=True)
    )


def _open_all(paths: list[Path], max_pixels: int) -> Iterator[tuple[int, Size] | str]:
    # Threads suffice: PIL decodes without holding the interpreter lock. Chunks bound the memory of pending work for millions of files.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(paths), _CHUNK):
            yield from pool.map(partial(_open, max_pixels=max_pixels), paths[start : start + _CHUNK])


def _open(path: Path, max_pixels: int) -> tuple[int, Size] | str:
    """Size of the file in bytes and of the image in pixels, or the problem."""
    try:
        size = open_image(path, max_pixels).size
    except DataError as error:
        return str(error)
    return path.stat().st_size, size


def _with_progress(items: Iterable[T], total: int, unit: str, progress: Callable[[str], object]) -> Iterator[T]:
    started = reported = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - reported >= PROGRESS_SECONDS:
            reported = now
            rate = done / (now - started)
            progress(f"checked {done} of {total} {unit}, {rate:.1f} {unit}/s, {timedelta(seconds=round((total - done) / rate))} left")
