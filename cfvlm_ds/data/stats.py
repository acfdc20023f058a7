"""What a data set is made of: counts, lengths, what is unknown and what occurs more than once, as data and as text."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from cfvlm_ds.core.data_config import AUTO
from cfvlm_ds.core.distributed import cores_per_rank
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup, normalised
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.secrets import print_line
from cfvlm_ds.core.text import one_line
from cfvlm_ds.data.check import Lengths
from cfvlm_ds.data.decoding import MAX_PIXELS, Size, image_size
from cfvlm_ds.data.manifest import Root, open_groups
from cfvlm_ds.data.overlap import row_key
from cfvlm_ds.data.picture_file import picture_stat
from cfvlm_ds.data.picture_index import content_digest, picture_key
from cfvlm_ds.data.report import without_place

T = TypeVar("T")
R = TypeVar("R")

_NAMED, _NAME_CHARS = 12, 60  # of edit types, sources, shapes in a line, and characters of each
_SHOWN_PROBLEMS = 5
_CHUNK = 1024


@dataclass
class Statistics:
    """What the well-formed rows of a manifest hold. Lengths are in tokens where a model's were given, else in characters."""

    manifest: str
    unit: str = "characters"
    num_groups: int = 0
    cells: Counter[str] = field(default_factory=Counter)
    """"true", "false" and "unknown" cells of the truth tables."""
    shapes: Counter[str] = field(default_factory=Counter)
    edit_types: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    text_lengths: array[int] = field(default_factory=lambda: array("I"))
    """Of every text; in tokens, those of its row: prompt, pictures of its group's first image and text."""
    visual_tokens: array[int] = field(default_factory=lambda: array("I"))
    """Of every image, where the model is known."""
    sides: array[int] = field(default_factory=lambda: array("I"))
    """The longer side in pixels of every different picture file."""
    equal_pictures: int = 0
    """Files with the same bytes as another file."""
    num_problems: int = 0
    problems: list[str] = field(default_factory=list)
    """The first few, a sentence each."""
    sizes: dict[Path, Size | None] = field(default_factory=dict)
    """Width and height of every different picture file; None for one that cannot be read."""
    texts: array[int] = field(default_factory=lambda: array("Q"))
    """A hash of every text."""
    prompts: set[int] = field(default_factory=set)
    ids: array[int] = field(default_factory=lambda: array("Q"))
    """A hash of every group's id."""
    rows: array[int] = field(default_factory=lambda: array("Q"))
    """A hash of what every group says: its prompts, texts and pictures by their paths."""

    def add_problem(self, sentence: str) -> None:
        """Count what is wrong with a row, a picture or a text; the first few that are not alike are kept."""
        self.num_problems += 1
        if len(self.problems) < _SHOWN_PROBLEMS and without_place(sentence) not in map(without_place, self.problems):
            self.problems.append(sentence)

    def add_pictures(self, groups: Sequence[CounterfactualGroup], pool: ThreadPoolExecutor, max_pixels: int) -> None:
        """Read the headers of pictures that were not seen before."""
        new = dict.fromkeys(p for group in groups for image in group.images for p in image if p not in self.sizes)
        for picture, size in zip(new, pool.map(partial(_size, max_pixels=max_pixels), new), strict=True):
            self.sizes[picture] = None if isinstance(size, str) else size
            if isinstance(size, str):
                self.add_problem(size)
            else:
                self.sides.append(max(size))

    def add_group(self, group: CounterfactualGroup, lengths: Lengths | None) -> None:
        """Count what a group holds, whose pictures are known."""
        self.num_groups += 1
        self.ids.append(_key(group.id))
        self.rows.append(row_key(group, [[picture_key(picture) for picture in image] for image in group.images]))
        self.shapes[f"{len(group.images) if group.num_pictures else 0} x {len(group.candidates)}"] += 1
        self.sources[group.source or "(none)"] += 1
        self.edit_types.update(edit.type for edit in group.edits)
        for line in group.match:
            for truth, name in ((1, "true"), (0, "false"), (None, "unknown")):
                self.cells[name] += line.count(truth)
        self.texts.extend(_key(normalised(candidate.text)) for candidate in group.candidates)
        self.prompts.update(_key(repr(candidate.prompt)) for candidate in group.candidates)
        if lengths is None:
            self.text_lengths.extend(len(candidate.text) for candidate in group.candidates)
        else:
            self._measure(group, lengths)

    def _measure(self, group: CounterfactualGroup, lengths: Lengths) -> None:
        sizes = [tuple(size for picture in image if (size := self.sizes[picture]) is not None) for image in group.images]
        whole = [each for each, image in zip(sizes, group.images, strict=True) if len(each) == len(image)]
        try:
            for each in whole if group.num_pictures else ():
                self.visual_tokens.append(lengths.visual_tokens(each))
            for candidate in group.candidates if whole else ():
                self.text_lengths.append(lengths.row_length(candidate.prompt, candidate.text, whole[0]))
        except DataError as error:
            self.add_problem(f"group {group.id!r}: {error}")

    def compare_pictures(self, pool: ThreadPoolExecutor, progress: Callable[[str], object]) -> None:
        """Count the files that have the same bytes as another one. Only those that share their number of bytes are read."""
        pictures = list(self.sizes)
        bytes_of = np.fromiter(_in_chunks(pool, _num_bytes, pictures), np.int64, len(pictures))
        alike = [pictures[int(k)] for k in np.flatnonzero(_shared(bytes_of) & (bytes_of > 0))]
        counted = Progress(progress, "pictures with as many bytes as another", len(alike), "pictures")
        digests = Counter(counted.over(_in_chunks(pool, _digest, alike)))
        self.equal_pictures = sum(count for digest, count in digests.items() if count > 1 and digest)

    @property
    def different_texts(self) -> tuple[int, int]:
        """How many different texts there are, and how many texts are said elsewhere too, in this or another group."""
        _, counts = np.unique(np.asarray(self.texts), return_counts=True)
        return len(counts), int(counts[counts > 1].sum())

    @property
    def equal_ids(self) -> int:
        """How many rows have an earlier row's id."""
        return len(self.ids) - len(np.unique(np.asarray(self.ids)))

    @property
    def equal_rows(self) -> int:
        """How many rows say what another row says, whatever their ids."""
        _, counts = np.unique(np.asarray(self.rows), return_counts=True)
        return int(counts[counts > 1].sum())

    @property
    def histograms(self) -> list[tuple[str, str, Sequence[int]]]:
        """(title, unit, values) of what there is to draw."""
        what = "Rows: prompt, pictures and text" if self.unit == "tokens" else "Texts"
        found = [(what, self.unit, self.text_lengths), ("Images", "visual tokens", self.visual_tokens)]
        return [each for each in [*found, ("Pictures", "pixels of the longer side", self.sides)] if len(each[2])]

    @property
    def bars(self) -> list[tuple[str, str, Mapping[str, int]]]:
        """(title, what is counted, counts) of what there is to draw."""
        found = [("Edit types", "edits", self.edit_types), ("Sources", "groups", self.sources), ("Shapes", "groups", self.shapes)]
        return [each for each in [("Truth tables", "cells", self.cells), *found] if each[2]]

    def __str__(self) -> str:
        num_texts, cells = len(self.texts), sum(self.cells.values())
        different, repeated = self.different_texts
        problems = self.num_problems + self.equal_ids
        length = "row length" if self.unit == "tokens" else "text length"
        lines = [
            ("manifest", self.manifest),
            ("groups", str(self.num_groups)),
            ("images x texts", _counted(self.shapes)),
            ("pictures", f"{len(self.sizes)} different files{_spread(self.sides, 'pixels of the longer side', ', ')}"),
            ("texts", f"{different} different of {num_texts}, for {len(self.prompts)} different prompts"),
            (length, _spread(self.text_lengths, self.unit) or "none"),
            *[("visual tokens", f"{_spread(self.visual_tokens, 'an image')}")] * bool(self.visual_tokens),
            ("cells", f"{self.cells['true']} true, {self.cells['false']} false, {self.cells['unknown']} unknown of {cells}"),
            ("edit types", _counted(self.edit_types) or "none named"),
            ("sources", _counted(self.sources)),
            ("equal rows", f"{self.equal_rows} of {self.num_groups} have another's texts and pictures" if self.equal_rows else "none"),
            ("equal texts", f"{repeated} of {num_texts} are said more than once" if repeated else "none"),
            ("equal pictures", f"{self.equal_pictures} of {len(self.sizes)} files" if self.equal_pictures else "none"),
            ("equal ids", f"{self.equal_ids} rows" if self.equal_ids else "none"),
            ("problems", f"{problems} (`cfvlm-ds data check` names all)" if problems else "none"),
        ]
        return "\n".join([f"{name:<16} {value}" for name, value in lines] + [f"  {one_line(each, 300)}" for each in self.problems])


def statistics(
    path: str | Path,
    root: Root = None,
    format: str = AUTO,
    *,
    lengths: Lengths | None = None,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[str], object] = print_line,
) -> Statistics:
    """What a manifest holds. Rows are read once and one by one; of pictures the headers are read, and whole files where several have the
    same number of bytes.

    A row, picture or text with something wrong is counted and left out of the rest. ``lengths`` (a Collator, say) measures in tokens.
    Memory: 24 bytes a group, 12 a text, and the paths of different pictures. Raises DataError for an unknown format, and for a manifest
    that cannot be read at all.
    """
    found = Statistics(str(path), "tokens" if lengths else "characters")
    store = open_groups(path, root, format, progress=progress)
    entries, counter = store.entries(), Progress(progress, "statistics", len(store), "groups")
    with ThreadPoolExecutor(cores_per_rank()) as pool:
        while chunk := [item for _, item in islice(entries, _CHUNK)]:
            for item in chunk:
                if isinstance(item, DataError):
                    found.add_problem(str(item))
            groups = [item for item in chunk if not isinstance(item, DataError)]
            found.add_pictures(groups, pool, max_pixels)
            for group in groups:
                found.add_group(group, lengths)
            counter.advance(len(chunk))
        found.compare_pictures(pool, progress)
    return found


def _size(picture: Path, max_pixels: int) -> Size | str:
    try:
        return image_size(picture, max_pixels)
    except DataError as error:
        return str(error)


def _key(text: str) -> int:
    """64 bits that stand for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _in_chunks(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    for start in range(0, len(items), _CHUNK):
        yield from pool.map(function, items[start : start + _CHUNK])


def _shared(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Which values occur more than once."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return counts[inverse] > 1


def _num_bytes(picture: Path) -> int:
    try:
        return picture_stat(picture)[0]
    except (OSError, DataError):
        return 0


def _digest(picture: Path) -> bytes:
    try:
        return content_digest(picture)
    except (OSError, ValueError):
        return b""


def _spread(values: Sequence[int], unit: str, before: str = "") -> str:
    """Least, median, 95th percentile and most."""
    if not len(values):
        return ""
    low, middle, high, most = np.percentile(np.asarray(values), [0, 50, 95, 100], method="lower").tolist()
    return f"{before}min {low}, median {middle}, 95 % up to {high}, max {most} {unit}"


def _counted(counts: Counter[str]) -> str:
    shown = [f"{one_line(name, _NAME_CHARS)}: {count}" for name, count in counts.most_common(_NAMED)]
    return ", ".join([*shown, *[f"and {len(counts) - _NAMED} more"] * (len(counts) > _NAMED)])
