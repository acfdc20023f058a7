"""The whole of a data set looked at once, before a long run meets its first broken image at night: all problems, and what it contains."""

from __future__ import annotations

import json
import statistics
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from cfvlm_ds.config import cores_per_rank
from cfvlm_ds.data.images import open_image
from cfvlm_ds.data.native import Entry, told_apart
from cfvlm_ds.data.pictures import Picture, PictureNotes, PictureTable, picture_key, picture_of
from cfvlm_ds.groups import SHAM, CounterfactualGroup, DataError, Pictures

PROGRESS_SECONDS = 5.0
_SHOWN_PROBLEMS = 50
_SHOWN, _SHOWN_CHARS = 30, 60  # edit types and keys of metadata in a line, and characters of each
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
    visual_tokens: array[int] = field(default_factory=lambda: array("I"))
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

    @property
    def unused(self) -> str:
        """The keys of ``metadata`` with their counts, the most frequent ones by name."""
        return f"{_counted(self.metadata)} (kept, not used)"

    def __str__(self) -> str:
        lines = [
            ("manifest", self.manifest),
            ("groups", str(self.num_groups)),
            ("images", f"{self.num_images} distinct files"),
            ("texts", str(self.num_texts)),
            ("unknown cells", f"{self.num_unknown_cells} of {self.num_cells}"),
            ("edit types", _counted(self.edit_types) or "none named"),
            ("counterfactuals", ", ".join(f"K={k}: {count} groups" for k, count in sorted(self.num_counterfactuals.items())) or "none"),
            (
                "longest text",
                f"{self.longest_text} {self.longest_text_unit}" + f" ({self.longest_text_where})" * bool(self.longest_text_where),
            ),
        ]
        if self.visual_tokens:
            lines.append(("visual tokens", self.visual_range))
        if self.metadata:
            lines.append(("metadata", self.unused))
        lines.append(("problems", str(len(self.problems)) if self.problems else "none"))
        table = [f"{name:<16} {value}" for name, value in lines]
        table += [f"  {problem}" for problem in self.problems[:_SHOWN_PROBLEMS]]
        if len(self.problems) > _SHOWN_PROBLEMS:
            table.append(f"  ... and {len(self.problems) - _SHOWN_PROBLEMS} more")
        return "\n".join(table)


def _counted(counts: Counter[str]) -> str:
    """Names with their counts, on one line that ends."""
    shown = [f"{name if len(name) <= _SHOWN_CHARS else f'{name[:_SHOWN_CHARS]}...'} {count}" for name, count in counts.most_common(_SHOWN)]
    more = len(counts) - len(shown)
    return ", ".join([*(" ".join(each.split()) for each in shown), *[f"and {more} more"] * bool(more)])


@dataclass(frozen=True)
class Share:
    """Which part of a check is this process's, and where it keeps what it has seen.

    ``alive`` is called for every row and picture; may raise, to leave.
    """

    rank: int = 0
    size: int = 1
    notes: PictureNotes = field(default_factory=PictureNotes)
    alive: Callable[[], object] = lambda: None


def check_groups(
    manifest: Path,
    entries: Iterable[Entry],
    *,
    lengths: Lengths | None,
    max_pixels: int,
    progress: Callable[[str], object],
    share: Share | None = None,
) -> tuple[CheckReport, list[CounterfactualGroup]]:
    """Check the entries of a manifest and open each image they name, once; see cfvlm_ds.data.check_manifest. Returns the groups too.

    Of several processes with a ``share`` each, every one reads all rows and counts them; it opens its part of the images and measures its
    part of the groups, and reports what is wrong with those. The first one also reports what is wrong with rows, and the visual tokens.
    """
    share = share or Share()
    report = CheckReport(str(manifest))
    groups: list[CounterfactualGroup] = []
    places: list[str] = []
    for where, item in entries:
        share.alive()
        if not isinstance(item, DataError):
            groups.append(item)
            places.append(where)
            _count(report, item)
        elif share.rank == 0:
            report.problems.append(str(item))
    pictures = _check_images(report, groups, places, max_pixels, progress, share)
    if lengths is not None and share.rank == 0:
        _count_visual_tokens(report, groups, pictures, lengths, share.alive)
    mine = range(share.rank, len(groups), share.size)
    for index in _with_progress(mine, len(mine), "groups" + _of_share(share), progress):
        share.alive()
        _check_pairs(report, places[index], groups[index], pictures)
        _check_texts(report, places[index], groups[index], lengths, pictures)
    return report, groups


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


def _check_texts(report: CheckReport, where: str, group: CounterfactualGroup, lengths: Lengths | None, pictures: PictureTable) -> None:
    if lengths is None:
        for index, candidate in enumerate(group.candidates):
            _note_length(report, len(candidate.text), f"{where}, text {index}")
        return
    report.longest_text_unit = "tokens"
    sizes: set[tuple[Size, ...]] = set()
    for image in group.images:
        try:
            if (shown := _sizes(image, pictures)) is not None and shown not in sizes:
                lengths.visual_tokens(shown)  # a text is not blamed for what the model cannot take as a picture
                sizes.add(shown)
        except DataError as error:
            report.problems.append(f"{where}: group {group.id!r}: {_named(image)}: {error}")
    unseen = (_SOME_SIZE,) * group.num_pictures
    for index, candidate in enumerate(group.candidates):
        try:
            length = max((lengths.row_length(candidate.prompt, candidate.text, each) for each in sizes), default=0)
            if not sizes:  # of pictures that are named above
                lengths.row_length(candidate.prompt, candidate.text, unseen)
        except DataError as error:
            report.problems.append(f"{where}: group {group.id!r}: text {index}: {error}")
            continue
        _note_length(report, length, f"{where}, text {index}")
        if length > lengths.max_length:
            report.problems.append(
                f"{where}: group {group.id!r}: text {index} is {length} tokens long with its prompt and image, over the model's window of "
                f"{lengths.max_length}; shorten it, or allow more tokens if the model does"
            )


_SOME_SIZE = (56, 56)  # of pictures of which none is known: a text may have more against it than its length


def _note_length(report: CheckReport, length: int, where: str) -> None:
    if length > report.longest_text:
        report.longest_text, report.longest_text_where = length, where


def _count_visual_tokens(
    report: CheckReport, groups: list[CounterfactualGroup], pictures: PictureTable, lengths: Lengths, alive: Callable[[], object]
) -> None:
    images = [image for group in groups for image in group.images if image]
    for place in _first_of_each(hash(image) for image in images):
        alive()
        try:
            if (shown := _sizes(images[place], pictures)) is not None:
                report.visual_tokens.append(lengths.visual_tokens(shown))
        except DataError:
            continue  # named with its group


def _sizes(image: Pictures, pictures: PictureTable) -> tuple[Size, ...] | None:
    """Sizes of an image's pictures; None where one is not known."""
    found = [pictures.find(picture) for picture in image]
    known = [(picture.width, picture.height) for picture in found if picture is not None]
    return tuple(known) if len(known) == len(image) else None


def _first_of_each(keys: Iterable[int]) -> npt.NDArray[Any]:
    """Where each distinct key comes first, in that order."""
    return np.sort(np.unique(np.fromiter((key & _KEY for key in keys), np.uint64), return_index=True)[1])


_KEY = (1 << 64) - 1


def _check_images(
    report: CheckReport,
    groups: list[CounterfactualGroup],
    places: list[str],
    max_pixels: int,
    progress: Callable[[str], object],
    share: Share,
) -> PictureTable:
    """What is known of the images that can be opened, after all processes have opened their part."""

    def uses() -> Iterator[tuple[int, Path]]:
        return ((index, picture) for index, group in enumerate(groups) for image in group.images for picture in image)

    def keys() -> Iterator[int]:
        for _, picture in uses():
            share.alive()
            yield picture_key(picture)

    firsts = _first_of_each(keys())
    report.num_images = len(firsts)
    mine = set(firsts[share.rank :: share.size].tolist())
    wanted = [use for place, use in enumerate(uses()) if place in mine]
    found = _open_all([picture for _, picture in wanted], max_pixels, share)
    for (index, _), problem in zip(wanted, _with_progress(found, len(wanted), "images" + _of_share(share), progress), strict=True):
        if problem is not None:
            report.problems.append(f"{places[index]}: {problem}")
    return share.notes.all()


def _check_pairs(report: CheckReport, where: str, group: CounterfactualGroup, pictures: PictureTable) -> None:
    for second in range(1, len(group.images)):
        for first in range(second):
            if told_apart(group, first, second) and _same_bytes(group.images[first], group.images[second], pictures):
                report.problems.append(
                    f"{where}: group {group.id!r}: counterfactual image {second} equals image {first} byte for byte "
                    f"({_named(group.images[second])} and {_named(group.images[first])}) though match tells them apart; redo the edit, "
                    "or remove it"
                )


def _named(pictures: Pictures) -> str:
    return ", ".join(str(picture) for picture in pictures)


def _same_bytes(first: Pictures, second: Pictures, pictures: PictureTable) -> bool:
    def same(a: Path, b: Path) -> bool:
        one, other = pictures.find(a), pictures.find(b)
        return one is not None and other is not None and (one.size, one.digest) == (other.size, other.digest)

    return all(a == b or same(a, b) for a, b in zip(first, second, strict=True))


def _open_all(paths: Sequence[Path], max_pixels: int, share: Share) -> Iterator[str | None]:
    """What is wrong with each picture, or None; the sound ones are noted, a chunk at a time."""
    # Threads suffice: PIL decodes without holding the interpreter lock. Chunks bound the memory of pending work for millions of files.
    pool = ThreadPoolExecutor(cores_per_rank())
    try:
        for start in range(0, len(paths), _CHUNK):
            chunk, sound = paths[start : start + _CHUNK], []
            for path, found in zip(chunk, pool.map(partial(_open, known=share.notes.known, max_pixels=max_pixels), chunk), strict=True):
                share.alive()
                if isinstance(found, Picture):
                    sound.append((path, found))
                yield found if isinstance(found, str) else None
            share.notes.add(sound)
    finally:
        pool.shutdown(cancel_futures=True)


def _open(path: Path, known: PictureTable, max_pixels: int) -> Picture | str | None:
    """What is to be noted of a picture, or the problem; None for one that was found sound before and has not been written since."""
    try:
        if (before := known.find(path)) is not None and before.width * before.height <= max_pixels:
            stat = path.stat()
            if (stat.st_size, stat.st_mtime_ns) == (before.size, before.mtime):
                return None
        return picture_of(path, *open_image(path, max_pixels).size)
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"{path}: image cannot be read ({error.strerror}); restore it, or correct its path in the manifest"


def _of_share(share: Share) -> str:
    return f" (of rank {share.rank}; {share.size} ranks share them)" if share.size > 1 else ""


def _with_progress(items: Iterable[T], total: int, unit: str, progress: Callable[[str], object]) -> Iterator[T]:
    started = reported = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - reported >= PROGRESS_SECONDS:
            reported = now
            rate = done / (now - started)
            progress(f"checked {done} of {total} {unit}, {rate:.1f} {unit}/s, {timedelta(seconds=round((total - done) / rate))} left")
