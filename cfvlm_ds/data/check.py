"""Check a whole data set before a long run meets its first broken image at night: all problems, and what the data set contains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cfvlm_ds.core.distributed import cores_per_rank
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup, Pictures
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.secrets import print_line
from cfvlm_ds.data.decoding import MAX_PIXELS, open_image
from cfvlm_ds.data.manifest import Entry, Root, read_entries, told_apart
from cfvlm_ds.data.picture_file import picture_stat
from cfvlm_ds.data.picture_index import Picture, PictureNotes, PictureTable, picture_key, picture_of
from cfvlm_ds.data.report import CheckReport

_CHUNK = 1024

Size = tuple[int, int]
"""Width and height in pixels."""


class Lengths(Protocol):
    """How long a row is for a model; the collator implements it."""

    max_length: int
    """The model's window in tokens."""

    def row_length(self, prompt: str, text: str, sizes: tuple[Size, ...]) -> int:
        """Tokens of prompt, pictures and text."""
        ...

    def visual_tokens(self, sizes: tuple[Size, ...]) -> int:
        """Tokens of the pictures of an image."""
        ...


@dataclass(frozen=True)
class Share:
    """This process's part of a check, and where it notes what it has seen.

    ``alive`` is called for every row and picture; it may raise in order to leave.
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

    With several processes, each having a ``share``, every one reads and counts all rows, opens its part of the images, measures its part of
    the groups, and reports what is wrong with those. The first one also reports what is wrong with rows, and the visual tokens.
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
            report.add_group(item)
        elif share.rank == 0:
            report.problems.append(str(item))
    pictures = _check_images(report, groups, places, max_pixels, progress, share)
    if lengths is not None and share.rank == 0:
        _count_visual_tokens(report, groups, pictures, lengths, share.alive)
    mine = range(share.rank, len(groups), share.size)
    for index in Progress(progress, f"check of texts{_of_share(share)}", len(mine), "groups").over(mine):
        share.alive()
        _check_pairs(report, places[index], groups[index], pictures)
        _check_texts(report, places[index], groups[index], lengths, pictures)
    return report, groups


def _check_texts(report: CheckReport, where: str, group: CounterfactualGroup, lengths: Lengths | None, pictures: PictureTable) -> None:
    if lengths is None:
        for index, candidate in enumerate(group.candidates):
            report.note_length(len(candidate.text), "characters", f"{where}, text {index}")
        return
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
        report.note_length(length, "tokens", f"{where}, text {index}")
        if length > lengths.max_length:
            report.problems.append(
                f"{where}: group {group.id!r}: text {index} is {length} tokens long with its prompt and image, over the model's window of "
                f"{lengths.max_length}; shorten it, or allow more tokens if the model does"
            )


_SOME_SIZE = (56, 56)  # of pictures of which none is known: a text may have more against it than its length


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
    """What is known of the images that can be opened, once all processes have opened their part."""

    def uses() -> Iterator[tuple[int, Path]]:
        return ((index, picture) for index, group in enumerate(groups) for image in group.images for picture in image)

    def keys() -> Iterator[int]:
        for _, picture in uses():
            share.alive()
            yield picture_key(picture)

    firsts = _first_of_each(keys())
    report.add_images(len(firsts))
    mine = set(firsts[share.rank :: share.size].tolist())
    wanted = [use for place, use in enumerate(uses()) if place in mine]
    found = _open_all([picture for _, picture in wanted], max_pixels, share)
    counted = Progress(progress, f"check of images{_of_share(share)}", len(wanted), "images").over(found)
    for (index, _), problem in zip(wanted, counted, strict=True):
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
    """What to note of a picture, or its problem; None for one that was sound before and has not been written since."""
    try:
        before = known.find(path)
        if before is not None and before.width * before.height <= max_pixels and picture_stat(path) == (before.size, before.mtime):
            return None
        return picture_of(path, *open_image(path, max_pixels).size)
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"{path}: image cannot be read ({error.strerror}); restore it, or correct its path in the manifest"


def _of_share(share: Share) -> str:
    return f" (rank {share.rank}; {share.size} ranks share them)" if share.size > 1 else ""


def check_manifest(
    path: str | Path,
    root: Root = None,
    format: str = "cfgroup",
    *,
    lengths: Lengths | None = None,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[str], object] = print_line,
) -> CheckReport:
    """Everything that is wrong with a data set, and what it contains. Reads the manifest and decodes every image it names, once.

    ``lengths`` (a Collator, say) knows how many tokens a row takes; with it, rows beyond the model's window are problems and visual tokens
    are counted. ``max_pixels`` as in open_image. ``progress`` receives a line with rate and remaining time every 5 seconds of work.
    Problems are collected, not raised; DataError is raised for an unknown format.
    """
    entries = read_entries(path, root, format)
    return check_groups(Path(path), entries, lengths=lengths, max_pixels=max_pixels, progress=progress)[0]


def check_share(
    path: str | Path,
    root: Root,
    format: str,
    share: Share,
    *,
    lengths: Lengths | None,
    max_pixels: int,
    progress: Callable[[str], object] = print_line,
) -> tuple[CheckReport, list[CounterfactualGroup]]:
    """One process's part of ``check_manifest``, and the groups of all well-formed rows."""
    entries = read_entries(path, root, format)
    return check_groups(Path(path), entries, lengths=lengths, max_pixels=max_pixels, progress=progress, share=share)
