"""Check a whole data set before a long run meets its first broken image at night: all problems, and what the data set contains.

It goes through the groups three times and keeps none of them: rows, then pictures, then texts. Memory: 8 bytes for each id, 16 for each
distinct picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup, Pictures, Prompt
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.secrets import print_line
from cfvlm_ds.data.decoding import MAX_PIXELS
from cfvlm_ds.data.formats import AUTO
from cfvlm_ds.data.manifest import Root, data_roots, known_format, open_groups, repeated
from cfvlm_ds.data.packed import PackedRows
from cfvlm_ds.data.passes import Done, Firsts, Scan, contains
from cfvlm_ds.data.picture_check import equal_images, find, open_pictures
from cfvlm_ds.data.picture_index import PictureTable, picture_key
from cfvlm_ds.data.report import CheckReport
from cfvlm_ds.data.store import GroupStore

Size = tuple[int, int]
"""Width and height in pixels."""

Array = npt.NDArray[Any]


class Lengths(Protocol):
    """How long a row is for a model; the collator implements it."""

    max_length: int
    """The model's window in tokens."""

    def row_length(self, prompt: Prompt, text: str, sizes: tuple[Size, ...]) -> int:
        """Tokens of prompt, pictures and text."""
        ...

    def visual_tokens(self, sizes: tuple[Size, ...]) -> int:
        """Tokens of the pictures of an image."""
        ...


def check_rows(store: GroupStore, *, progress: Callable[[str], object], scan: Scan | None = None) -> CheckReport:
    """Check the rows, and count what they contain: nothing is opened but the manifest."""
    scan, report = scan or Scan(), CheckReport(str(store.path))
    look_at_rows(report, store, progress, scan)
    return report


def check_groups(
    store: GroupStore,
    *,
    lengths: Lengths | None,
    max_pixels: int,
    progress: Callable[[str], object],
    scan: Scan | None = None,
) -> CheckReport:
    """Check the groups of a manifest and open each image they name, once; see cfvlm_ds.data.check_manifest."""
    scan, report = scan or Scan(), CheckReport(str(store.path))
    seen = look_at_rows(report, store, progress, scan)
    report.add_images(len(seen.pictures[0]))
    open_pictures(report, store, *seen.pictures, max_pixels, progress, scan)
    texts = _Texts(store, lengths, scan.notes.all(), *seen.images)
    for part in scan.over(range(len(store)), texts, Progress(progress, "check of texts", len(store), "groups")):
        report.add(part)
    return report


# Rows --------------------------------------------------------------------------------------------------------------------------------


class _Seen(NamedTuple):
    """Distinct pictures, and images of several pictures, by their keys, each with the first group that shows it."""

    pictures: tuple[Array, Array]
    images: tuple[Array, Array]


class _Rows(NamedTuple):
    """What a chunk of rows holds; ``ids`` is 0 for a row that is no group."""

    report: CheckReport
    ids: Array
    pictures: tuple[Array, Array]
    images: tuple[Array, Array]


def look_at_rows(report: CheckReport, store: GroupStore, progress: Callable[[str], object], scan: Scan) -> _Seen:
    """Count what the rows hold and what is wrong with them, and find their pictures."""
    ids, pictures, images = [np.empty(0, np.uint64)], Firsts(), Firsts()
    for part in scan.over(range(len(store)), partial(_rows, store), Progress(progress, "check of rows", len(store), "groups")):
        report.add(part.report)
        ids.append(part.ids)
        pictures.add(*part.pictures)
        images.add(*part.images)
    report.problems.extend(_repeated(store, np.concatenate(ids), scan))
    return _Seen(pictures.sorted(), images.sorted())


def _rows(store: GroupStore, places: Sequence[int], done: Done) -> _Rows:
    report, ids = CheckReport(str(store.path)), np.zeros(len(places), np.uint64)
    pictures: dict[int, int] = {}
    images: dict[int, int] = {}
    last: object = None
    for k, (index, group) in enumerate(store.entries(places)):
        if isinstance(group, DataError):
            if group is not last:  # of all groups of a row
                report.problems.append(str(group))
            last = group
        else:
            report.add_group(group)
            ids[k] = _id_key(group.id)
            for image in group.images:
                keys = [picture_key(picture) for picture in image]
                for key in keys:
                    pictures.setdefault(key, index)
                if image:
                    images.setdefault(_image_key(keys), index)
        done()
    return _Rows(report, ids, _arrays(pictures), _arrays(images))


def _arrays(firsts: dict[int, int]) -> tuple[Array, Array]:
    return np.fromiter(firsts.keys(), np.uint64, len(firsts)), np.fromiter(firsts.values(), np.int64, len(firsts))


def _id_key(group_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(group_id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") or 1


def _image_key(keys: Sequence[int]) -> int:
    """A hash of an image by those of its pictures."""
    if len(keys) == 1:
        return keys[0]
    return int.from_bytes(hashlib.blake2b(np.array(keys, np.uint64).tobytes(), digest_size=8).digest(), "little")


def _repeated(store: GroupStore, ids: Array, scan: Scan) -> Iterator[str]:
    """The groups whose id an earlier group has: keys that come twice are compared as texts."""
    ordered = np.sort(ids)
    suspects = np.setdiff1d(ordered[1:][ordered[1:] == ordered[:-1]], np.zeros(1, np.uint64))
    first: dict[str, int] = {}
    for index in np.flatnonzero(contains(suspects, ids)).tolist():
        scan.alive()
        group = store.entry(index)
        if not isinstance(group, DataError) and first.setdefault(group.id, index) != index:
            yield repeated(store, index, first[group.id], group.id)


# Texts -------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Texts:
    """The last look at a chunk of groups, which knows the pictures; ``images`` are counted where they come first, at ``places``."""

    store: GroupStore
    lengths: Lengths | None
    pictures: PictureTable
    images: Array
    places: Array

    def __call__(self, places: Sequence[int], done: Done) -> CheckReport:
        report = CheckReport(str(self.store.path))
        counted: set[int] = set()
        for index, group in self.store.entries(places):
            if not isinstance(group, DataError):
                report.problems.extend(f"{self.store.where(index)}: {problem}" for problem in equal_images(group, self.pictures))
                self._check_texts(report, index, group)
                if self.lengths is not None:
                    self._count_visual_tokens(report, index, group, self.lengths, counted)
            done()
        return report

    def _check_texts(self, report: CheckReport, index: int, group: CounterfactualGroup) -> None:
        if (lengths := self.lengths) is None:
            for number, candidate in enumerate(group.candidates):
                report.note_length(len(candidate.text), "characters", self._where_text(index, number))
            return
        sizes: set[tuple[Size, ...]] = set()
        for image in group.images:
            try:
                if (shown := _sizes(image, self.pictures)) is not None and shown not in sizes:
                    lengths.visual_tokens(shown)  # a text is not blamed for what the model cannot take as a picture
                    sizes.add(shown)
            except DataError as error:
                report.problems.append(f"{self.store.where(index)}: group {group.id!r}: {', '.join(map(str, image))}: {error}")
        unseen = (_SOME_SIZE,) * group.num_pictures
        for number, candidate in enumerate(group.candidates):
            try:
                length = max((lengths.row_length(candidate.prompt, candidate.text, each) for each in sizes), default=0)
                if not sizes:  # of pictures that are named above
                    lengths.row_length(candidate.prompt, candidate.text, unseen)
            except DataError as error:
                report.problems.append(f"{self.store.where(index)}: group {group.id!r}: text {number}: {error}")
                continue
            report.note_length(length, "tokens", self._where_text(index, number))
            if length > lengths.max_length:
                report.problems.append(
                    f"{self.store.where(index)}: group {group.id!r}: text {number} is {length} tokens long with its prompt and image, over "
                    f"the model's window of {lengths.max_length}; shorten it, or allow more tokens if the model does"
                )

    def _where_text(self, index: int, number: int) -> Callable[[], str]:
        return lambda: f"{self.store.where(index)}, text {number}"

    def _count_visual_tokens(
        self, report: CheckReport, index: int, group: CounterfactualGroup, lengths: Lengths, counted: set[int]
    ) -> None:
        for image in group.images:
            place = find(self.images, _image_key([picture_key(picture) for picture in image])) if image else None
            if place is None or self.places[place] != index or place in counted:
                continue
            counted.add(place)
            try:
                if (shown := _sizes(image, self.pictures)) is not None:
                    report.visual_tokens[lengths.visual_tokens(shown)] += 1
            except DataError:
                continue  # named with its group


_SOME_SIZE = (56, 56)  # of pictures of which none is known: a text may have more against it than its length


def _sizes(image: Pictures, pictures: PictureTable) -> tuple[Size, ...] | None:
    """Sizes of an image's pictures; None where one is not known."""
    found = [pictures.find(picture) for picture in image]
    known = [(picture.width, picture.height) for picture in found if picture is not None]
    return tuple(known) if len(known) == len(image) else None


def sound_groups(
    path: str | Path,
    root: Root = None,
    format: str = AUTO,
    limit: int | None = None,
    progress: Callable[[str], object] = lambda line: None,
) -> GroupStore:
    """``open_groups`` of a manifest whose rows are looked at first. Raises DataError on the first problem, ids that come twice included."""
    store = open_groups(path, root, format, limit=limit, progress=progress)
    if problems := check_rows(store, progress=progress).problems:
        raise DataError(problems[0])
    return store


def check_manifest(
    path: str | Path,
    root: Root = None,
    format: str = AUTO,
    *,
    lengths: Lengths | None = None,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[str], object] = print_line,
) -> CheckReport:
    """Everything that is wrong with a data set, and what it contains. Reads the manifest and decodes every image it names, once.

    ``lengths`` (a Collator, say) knows how many tokens a row takes; with it, rows beyond the model's window are problems and visual tokens
    are counted. ``max_pixels`` as in open_image. ``progress`` receives a line with rate and remaining time every 5 seconds of work.
    Of a packed store every file is held against its sha256 too. Problems are collected, not raised; DataError is raised for an unknown
    format.
    """
    known_format(path, format)
    data_roots(path, root)
    try:
        store = open_groups(path, root, format, progress=progress)
    except DataError as error:
        return CheckReport(str(path), problems=[str(error)])
    report = check_groups(store, lengths=lengths, max_pixels=max_pixels, progress=progress)
    if isinstance(store.rows, PackedRows):
        report.problems.extend(store.rows.altered(progress, lambda: None))
    return report
