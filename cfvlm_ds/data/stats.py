"""Statistics of a data set: counts, lengths, unknown cells and repetitions, as data and as text."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cfvlm_ds.core.data_config import AUTO
from cfvlm_ds.core.distributed import cores_per_rank
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup, normalised
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.secrets import print_line
from cfvlm_ds.core.text import hashed, one_line
from cfvlm_ds.data.check import Lengths
from cfvlm_ds.data.decoding import MAX_PIXELS, Size, image_size
from cfvlm_ds.data.manifest import Root, open_groups
from cfvlm_ds.data.overlap import row_key
from cfvlm_ds.data.picture_file import picture_stat
from cfvlm_ds.data.picture_index import content_digest, picture_key
from cfvlm_ds.data.report import CheckReport, counted, quantiles, without_place

_SHOWN_PROBLEMS = 5
_CHUNK = 1024


class _Seen(NamedTuple):
    """Width, height and file size in bytes of a picture, or its problem."""

    size: Size = (0, 0)
    num_bytes: int = 0
    problem: str = ""


@dataclass
class Statistics:
    """Contents of the valid rows of a manifest.

    ``report`` counts groups, cells and edit types. Text lengths are those of rows in tokens (prompt, pictures of the group's first image,
    text) if a model was given, else of texts in characters. ``texts``, ``ids`` and ``rows`` are hashes of every text, every id, and the
    contents of every group.
    """

    report: CheckReport
    in_tokens: bool
    shapes: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    text_lengths: Counter[int] = field(default_factory=Counter)
    visual_tokens: Counter[int] = field(default_factory=Counter)
    pictures: dict[Path, _Seen] = field(default_factory=dict)
    digests: Counter[bytes] = field(default_factory=Counter)
    """Digests of the pictures that have as many bytes as another one."""
    texts: array[int] = field(default_factory=lambda: array("Q"))
    prompts: set[int] = field(default_factory=set)
    ids: array[int] = field(default_factory=lambda: array("Q"))
    rows: array[int] = field(default_factory=lambda: array("Q"))

    def add_group(self, group: CounterfactualGroup, lengths: Lengths | None) -> None:
        """Count the contents of a group whose pictures are known."""
        self.report.add_group(group)
        self.ids.append(hashed(group.id))
        self.rows.append(row_key(group, [[picture_key(picture) for picture in image] for image in group.images]))
        self.shapes[f"{len(group.images) if group.num_pictures else 0} x {len(group.candidates)}"] += 1
        self.sources[group.source or "(none)"] += 1
        self.texts.extend(hashed(normalised(candidate.text)) for candidate in group.candidates)
        self.prompts.update(hashed(repr(candidate.prompt)) for candidate in group.candidates)
        if lengths is None:
            self.text_lengths.update(len(candidate.text) for candidate in group.candidates)
            return
        seen = [[self.pictures[picture] for picture in image] for image in group.images]
        sizes = [tuple(picture.size for picture in image) for image in seen if not any(picture.problem for picture in image)]
        try:
            self.visual_tokens.update(lengths.visual_tokens(image) for image in sizes if image)
            for candidate in group.candidates if sizes else ():
                self.text_lengths[lengths.row_length(candidate.prompt, candidate.text, sizes[0])] += 1
        except DataError as error:
            self.report.problems.append(f"group {group.id!r}: {error}")

    def __str__(self) -> str:
        report, num_texts = self.report, len(self.texts)
        (num_ids, _), (different, repeated), (_, equal_rows) = map(_occurrences, (self.ids, self.texts, self.rows))
        equal_ids, true = len(self.ids) - num_ids, report.num_cells - report.num_false_cells - report.num_unknown_cells
        problems, equal = len(report.problems) + equal_ids, sum(count for digest, count in self.digests.items() if count > 1 and digest)
        sides = Counter(max(picture.size) for picture in self.pictures.values() if not picture.problem)
        first = {without_place(problem): problem for problem in reversed(report.problems)}
        lines = [
            ("manifest", report.manifest),
            ("groups", str(report.num_groups)),
            ("images x texts", counted(self.shapes)),
            ("pictures", f"{len(self.pictures)} different files{_spread(sides, 'pixels of the longer side', ', ')}"),
            ("texts", f"{different} different of {num_texts}, for {len(self.prompts)} different prompts"),
            ("row length" if self.in_tokens else "text length", _spread(self.text_lengths, "tokens" if self.in_tokens else "characters")),
            *[("visual tokens", _spread(self.visual_tokens, "an image"))] * bool(self.visual_tokens),
            ("cells", f"{true} true, {report.num_false_cells} false, {report.num_unknown_cells} unknown of {report.num_cells}"),
            ("edit types", counted(report.edit_types) or "none named"),
            ("sources", counted(self.sources)),
            ("equal rows", f"{equal_rows} of {report.num_groups} have another's texts and pictures" if equal_rows else "none"),
            ("equal texts", f"{repeated} of {num_texts} are said more than once" if repeated else "none"),
            ("equal pictures", f"{equal} of {len(self.pictures)} files" if equal else "none"),
            ("equal ids", f"{equal_ids} rows" if equal_ids else "none"),
            ("problems", f"{problems} (`cfvlm-ds data check` names all)" if problems else "none"),
        ]
        shown = islice(reversed(first.values()), _SHOWN_PROBLEMS)
        return "\n".join([f"{name:<16} {value}" for name, value in lines] + [f"  {one_line(problem, 300)}" for problem in shown])


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

    Rows are read once, one by one. Of pictures, the headers are read, and the complete files if several have the same number of bytes. A
    row, picture or text with a problem is counted and left out of the rest. ``lengths`` (for instance a Collator) measures in tokens.
    Memory: 24 bytes a group, 8 a text, the paths of distinct pictures, and the problems. Raises DataError for an unknown format, and for a
    manifest that cannot be read at all.
    """
    result = Statistics(CheckReport(str(path)), lengths is not None)
    store = open_groups(path, root, format, progress=progress)
    entries, counter = store.entries(), Progress(progress, "statistics", len(store), "groups")
    with ThreadPoolExecutor(cores_per_rank()) as pool:
        while chunk := [item for _, item in islice(entries, _CHUNK)]:
            result.report.problems.extend(str(item) for item in chunk if isinstance(item, DataError))
            groups = [item for item in chunk if not isinstance(item, DataError)]
            new = dict.fromkeys(p for group in groups for image in group.images for p in image if p not in result.pictures)
            result.pictures.update(zip(new, pool.map(partial(_look, max_pixels=max_pixels), new), strict=True))
            result.report.problems.extend(problem for picture in new if (problem := result.pictures[picture].problem))
            for group in groups:
                result.add_group(group, lengths)
            counter.advance(len(chunk))
        files = Counter(seen.num_bytes for seen in result.pictures.values())
        alike = [picture for picture, seen in result.pictures.items() if seen.num_bytes and files[seen.num_bytes] > 1]
        counter = Progress(progress, "pictures with as many bytes as another", len(alike), "pictures")
        for start in range(0, len(alike), _CHUNK):
            result.digests.update(counter.over(pool.map(_digest, alike[start : start + _CHUNK])))
    return result


def _look(picture: Path, max_pixels: int) -> _Seen:
    try:
        return _Seen(image_size(picture, max_pixels), picture_stat(picture)[0])
    except (OSError, DataError) as error:
        return _Seen(problem=str(error))


def _digest(picture: Path) -> bytes:
    try:
        return content_digest(picture)
    except (OSError, ValueError):
        return b""


def _occurrences(values: Sequence[int]) -> tuple[int, int]:
    """Return the number of distinct values, and the number of entries whose value occurs more than once."""
    _, counts = np.unique(np.asarray(values), return_counts=True)
    return len(counts), int(counts[counts > 1].sum())


def _spread(counts: Counter[int], unit: str, before: str = "") -> str:
    """Format the minimum, median, 95th percentile and maximum."""
    if not counts:
        return "" if before else "none"
    low, middle, high, most = quantiles(counts, 0, 50, 95, 100)
    return f"{before}min {low}, median {middle}, 95 % up to {high}, max {most} {unit}"
