"""Data check: reports a data set's contents and all its problems before a long run begins.

The check makes three passes over the data: the first checks the rows, the second opens each picture once, and the third compares the images
within each group, measures the texts and detects repeated contents. It keeps no groups in memory, but needs 24 bytes per group and 48 bytes
per picture.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from cfvlm_ds.core.data_config import AUTO
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup, Pictures, Prompt
from cfvlm_ds.core.progress import Progress, Say, no_op
from cfvlm_ds.core.ranks import cores_per_rank
from cfvlm_ds.core.secrets import print_line
from cfvlm_ds.core.sequences import side_by_side
from cfvlm_ds.core.text import hashed
from cfvlm_ds.data.decoding import MAX_BYTES, MAX_PIXELS, Size, open_image
from cfvlm_ds.data.manifest import Root, open_groups, repeated
from cfvlm_ds.data.overlap import Keys, joined_keys, keys_of
from cfvlm_ds.data.passes import Array, Done, Keyed, Scan, contains, distinct
from cfvlm_ds.data.picture_file import picture_bytes, picture_stat
from cfvlm_ds.data.picture_index import Picture, PictureTable, find, picture_key, picture_of
from cfvlm_ds.data.report import CheckReport
from cfvlm_ds.data.store import GroupStore, are_distinguished
from cfvlm_ds.data.stored import StoredRows

_AHEAD = 64  # number of pictures opened ahead of their use


def open_pictures(
    report: CheckReport, store: GroupStore, keys: Array, places: Array, max_pixels: int, progress: Say, scan: Scan
) -> tuple[PictureTable, dict[int, str]]:
    """Open each picture once. Return a table of the readable pictures, and a mapping from each broken picture's key to its problem.

    The problems are also added to ``report``, each with the location of the first group that contains the picture.
    """
    broken = dict[int, str]()

    def sound() -> Iterator[tuple[Path, Picture]]:
        counted = Progress(progress, "checking images", len(keys), "images")
        for opened in counted.over(opened_pictures(store, keys, places, max_pixels, scan)):
            if isinstance(opened.found, Picture):
                yield opened.path, opened.found
            else:
                broken[picture_key(opened.path)] = opened.found
                report.problems.append(f"{store.where(opened.group)}: {opened.found}")

    return PictureTable.of(sound()), broken


def first_uses(store: GroupStore, keys: Array, places: Array) -> Iterator[tuple[int, Path]]:
    """For each picture, yield the index of the first group that contains it, and the picture's path. ``places[k]`` is the index for the
    picture with the key ``keys[k]``. Only these groups are read.
    """
    left = np.ones(len(keys), bool)
    for index in np.unique(places).tolist():
        group = store.entry(index)
        for image in () if isinstance(group, DataError) else group.images:
            for picture in image:
                if (position := find(keys, picture_key(picture))) is not None and left[position] and places[position] == index:
                    left[position] = False
                    yield index, picture


class OpenedPicture(NamedTuple):
    """Result of opening a picture: the index of the first group that contains it, its path, its properties or an error message, and its
    bytes (empty unless requested).
    """

    group: int
    path: Path
    found: Picture | str
    content: bytes


def opened_pictures(
    store: GroupStore,
    keys: Array,
    places: Array,
    max_pixels: int,
    scan: Scan,
    known: PictureTable | None = None,
    *,
    contents: bool = False,
) -> Iterator[OpenedPicture]:
    """Yield an OpenedPicture for each picture key. A picture in the table ``known`` is opened only if its file has changed."""
    prepared = store.rows.pictures if isinstance(store.rows, StoredRows) else None

    def opened(use: tuple[int, Path]) -> tuple[Picture | str, bytes]:
        return opened_picture(use[1], known, prepared, max_pixels, contents)

    # Threads suffice, because PIL releases the interpreter lock while decoding.
    for (index, path), result in side_by_side(opened, first_uses(store, keys, places), cores_per_rank(), _AHEAD):
        scan.alive()
        yield OpenedPicture(index, path, *result)


def opened_picture(
    path: Path, known: PictureTable | None, prepared: PictureTable | None, max_pixels: int, contents: bool
) -> tuple[Picture | str, bytes]:
    """Open a picture. Return its properties or an error message, and its bytes (empty unless ``contents`` is True).

    A picture in the table ``known`` is opened only if its file has changed. A picture in a store must match its entry in the table
    ``prepared``.
    """
    try:
        known_before = None if known is None else known.find(path)
        if (
            known_before is not None
            and 0 < known_before.width * known_before.height <= max_pixels
            and picture_stat(path) == (known_before.size, known_before.ctime)
        ):
            return known_before, b""
        picture = picture_of(path, *open_image(path, max_pixels).size)
        known_before = None if prepared is None else prepared.find(path)
        if known_before is not None and known_before._replace(ctime=picture.ctime) != picture:
            return f"{path}: the picture has changed since it was prepared; restore it, or prepare the data again", b""
        return picture, picture_bytes(path, MAX_BYTES) if contents else b""
    except DataError as error:
        return str(error), b""
    except (OSError, ValueError) as error:
        return f"{path}: image cannot be read ({error}); restore it, or correct its path in the manifest", b""


def equal_images(group: CounterfactualGroup, pictures: PictureTable) -> Iterator[str]:
    """Yield an error message for each pair of byte-identical images that a group's truth table distinguishes."""
    for second in range(1, len(group.images)):
        for first in range(second):
            if are_distinguished(group, first, second) and _same_bytes(group.images[first], group.images[second], pictures):
                files = " and ".join(", ".join(map(str, group.images[place])) for place in (second, first))
                yield (
                    f"group {group.id!r}: counterfactual image {second} is byte-identical to image {first} ({files}), but match "
                    "distinguishes them; redo the edit, or remove it"
                )


def _same_bytes(first: Pictures, second: Pictures, pictures: PictureTable) -> bool:
    def same(a: Path, b: Path) -> bool:
        one, other = pictures.find(a), pictures.find(b)
        return one is not None and other is not None and (one.size, one.digest) == (other.size, other.digest)

    return all(a == b or same(a, b) for a, b in zip(first, second, strict=True))


class Lengths(Protocol):
    """Protocol for measuring lengths in a model's tokens; the collator implements it."""

    max_length: int
    """Context window of the model in tokens."""

    def row_length(self, prompt: Prompt, text: str, sizes: tuple[Size, ...]) -> int:
        """Return the total number of tokens in the prompt, the pictures and the text."""
        ...

    def visual_tokens(self, sizes: tuple[Size, ...]) -> int:
        """Return the number of visual tokens for an image whose pictures have these ``sizes``."""
        ...


_MERGED = 1 << 20
"""Minimum number of picture keys to collect before duplicates are removed."""


def check_rows(store: GroupStore, *, progress: Say) -> CheckReport:
    """Check the rows of a data set without opening any pictures, and return a report of their contents and problems."""
    report = CheckReport(str(store.path))
    look_at_rows(report, store, progress, Scan())
    return report


# Rows --------------------------------------------------------------------------------------------------------------------------------


class SeenRows(NamedTuple):
    """Result of the row pass. ``pictures`` holds the key of each distinct picture and the index of the first group that uses it.
    ``repeats`` holds the indices of groups that repeat an earlier group's id.
    """

    pictures: Keyed
    repeats: list[int]


class _Rows(NamedTuple):
    """Result of the row pass for a chunk of groups. ``ids`` holds the id hash and the index of each group. ``pictures`` holds the key of
    each picture and the index of the first group that uses it.
    """

    report: CheckReport
    ids: Keyed
    pictures: Keyed


def look_at_rows(report: CheckReport, store: GroupStore, progress: Say, scan: Scan) -> SeenRows:
    """Check all rows, add their counts and problems to ``report``, and return the distinct pictures and the groups with repeated ids."""
    ids, pictures, pending = [_arrays({})], [_arrays({})], 0
    for part in scan.over(range(len(store)), partial(_rows, store), Progress(progress, "checking rows", len(store), "groups")):
        report.add(part.report)
        ids.append(part.ids)
        pictures.append(part.pictures)
        if (pending := pending + len(part.pictures[0])) > max(_MERGED, len(pictures[0][0])):  # rows often share pictures
            pictures, pending = [distinct(pictures)], 0
    repeats = dict(_repeated(store, ids, scan))
    report.problems.extend(repeats.values())
    seen = SeenRows(distinct(pictures), list(repeats))
    report.add(CheckReport(report.manifest, num_images=len(seen.pictures[0])))
    return seen


def _rows(store: GroupStore, places: Sequence[int], done: Done) -> _Rows:
    report, ids, pictures = CheckReport(str(store.path)), dict[int, int](), dict[int, int]()
    last: object = None
    for index, group in store.entries(places):
        if isinstance(group, DataError):
            if group is not last:  # all groups of an invalid row share one error
                report.problems.append(str(group))
            last = group
        else:
            report.add_group(group)
            ids[index] = hashed(group.id)
            for picture in itertools.chain(*group.images):
                pictures.setdefault(picture_key(picture), index)
        done()
    return _Rows(report, _arrays(ids)[::-1], _arrays(pictures))


def _arrays(values: dict[int, int]) -> Keyed:
    return np.fromiter(values.keys(), np.uint64, len(values)), np.fromiter(values.values(), np.uint64, len(values))


def _repeated(store: GroupStore, ids: Sequence[Keyed], scan: Scan) -> Iterator[tuple[int, str]]:
    """Yield (index, error message) for each group that repeats an earlier group's id. Only groups with equal id hashes are read, to compare
    the ids themselves.
    """
    hashes = np.concatenate([part for part, _ in ids])
    hashes.sort()
    twice = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    first: dict[str, int] = {}
    for part, places in ids:
        for index in places[contains(twice, part)].tolist():
            scan.alive()
            group = store.entry(index)
            if not isinstance(group, DataError) and first.setdefault(group.id, index) != index:
                yield index, repeated(store, index, first[group.id], group.id)


# Texts -------------------------------------------------------------------------------------------------------------------------------


def check_texts(
    store: GroupStore, lengths: Lengths | None, pictures: PictureTable | None, progress: Say, scan: Scan
) -> tuple[CheckReport, Keys]:
    """Compare the images within each group, and measure the group's texts. Return a report and the keys of all rows and pictures.

    If ``lengths`` is given, texts are measured in tokens and images in visual tokens. Otherwise only texts are measured, in characters.
    ``pictures`` contains the readable pictures. Invalid rows and broken pictures are skipped, because earlier passes report them.
    """
    report, shown, keys = CheckReport(str(store.path)), [_arrays({})], list[Keys]()
    texts = _Texts(store, lengths, pictures or PictureTable.of(()))
    for part, images, own_keys in scan.over(range(len(store)), texts, Progress(progress, "checking texts", len(store), "groups")):
        report.add(part)
        shown.append(images)
        keys.append(own_keys)
    report.visual_tokens.update(distinct(shown)[1].tolist())
    return report, joined_keys(keys)


@dataclass(frozen=True)
class _Texts:
    """Callable that runs the text pass over a chunk of groups. It returns a report, the hash and visual token count of each distinct image,
    and the keys of the rows and pictures.
    """

    store: GroupStore
    lengths: Lengths | None
    pictures: PictureTable

    def __call__(self, places: Sequence[int], done: Done) -> tuple[CheckReport, Keyed, Keys]:
        report, images, groups = CheckReport(str(self.store.path)), dict[int, int](), list[CounterfactualGroup]()
        for index, group in self.store.entries(places):
            if not isinstance(group, DataError):
                groups.append(group)
                report.problems.extend(f"{self.store.where(index)}: {problem}" for problem in equal_images(group, self.pictures))
                if self.lengths is None:
                    note_characters(report, group, partial(self.store.where, index))
                else:
                    self._measure(report, index, group, self.lengths, images)
            done()
        return report, _arrays(images), keys_of(groups, self.pictures)

    def _measure(self, report: CheckReport, index: int, group: CounterfactualGroup, lengths: Lengths, images: dict[int, int]) -> None:
        sizes: set[tuple[Size, ...]] = set()
        for image in group.images:
            try:
                if (shown := _sizes(image, self.pictures)) is not None:
                    tokens = lengths.visual_tokens(shown)  # raises DataError for a picture that the model cannot process
                    sizes.add(shown)
                    if image:
                        keys = np.array([picture_key(picture) for picture in image], np.uint64)
                        images.setdefault(hashed(keys.tobytes()), tokens)
            except DataError as error:
                report.problems.append(f"{self.store.where(index)}: group {group.id!r}: {', '.join(map(str, image))}: {error}")
        for number, candidate in enumerate(group.candidates):
            try:
                length = max((lengths.row_length(candidate.prompt, candidate.text, shown) for shown in sizes), default=0)
            except DataError as error:
                report.problems.append(f"{self.store.where(index)}: group {group.id!r}: text {number}: {error}")
                continue
            report.note_length(length, "tokens of prompt, pictures and text", partial(self.store.where, index), number)
            if length > lengths.max_length:
                report.problems.append(
                    f"{self.store.where(index)}: group {group.id!r}: text {number} is {length} tokens long with its prompt and image, over "
                    f"the model's window of {lengths.max_length}; shorten it, or raise the window if the model supports it"
                )


def note_characters(report: CheckReport, group: CounterfactualGroup, where: Callable[[], str]) -> None:
    """Record the lengths of a group's texts in characters."""
    for number, candidate in enumerate(group.candidates):
        report.note_length(len(candidate.text), "characters", where, number)


def _sizes(image: Pictures, pictures: PictureTable) -> tuple[Size, ...] | None:
    entries = [pictures.find(picture) for picture in image]
    known = [(picture.width, picture.height) for picture in entries if picture is not None and picture.width]
    return tuple(known) if len(known) == len(image) else None


def sound_groups(
    path: str | Path,
    root: Root = None,
    format: str = AUTO,
    limit: int | None = None,
    progress: Say = no_op,
) -> GroupStore:
    """Open a manifest with ``open_groups``, check its rows, and return its groups. Raises DataError for the first problem, such as a
    repeated id.
    """
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
    progress: Say = print_line,
) -> CheckReport:
    """Check a data set completely and return a report of its contents and problems. Problems are reported, not raised. Every picture is
    decoded once.

    If ``lengths`` is given (for instance a Collator), visual tokens are counted, and rows that exceed the model's context window are
    reported as problems. ``max_pixels`` is as in open_image. ``progress`` receives a line with the rate and the remaining time every 5
    seconds. If the data set is a store, its rows, pictures and tables are compared with their checksums.
    """
    try:
        store = open_groups(path, root, format, progress=progress)
    except DataError as error:
        return CheckReport(str(path), problems=[str(error)])
    scan, report = Scan(), CheckReport(str(store.path))
    seen = look_at_rows(report, store, progress, scan)
    pictures, _ = open_pictures(report, store, *seen.pictures, max_pixels, progress, scan)
    texts, keys = check_texts(store, lengths, pictures, progress, scan)
    report.add(texts)
    repeated: dict[str, Any] = {
        "num_repeated_rows": report.num_groups - len(keys.rows),
        "num_repeated_pictures": report.num_images - len(keys.pictures),
    }
    report.add(CheckReport(report.manifest, sides=Counter(pictures.sides()), **repeated))
    return report
