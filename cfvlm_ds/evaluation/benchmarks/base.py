"""What a benchmark is: official files, rows that become items, probes that ask a model about them, and metrics of what it answered.

An item is images x texts with a truth table, whatever its benchmark calls it: captions of a picture, the options of a question, the answers
yes and no. A probe reads one score per cell (cfvlm_ds.evaluation.probes), and a metric is a pure function of those scores, so it can be
computed again from a file of results, without the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import Pictures, normalised
from cfvlm_ds.evaluation.benchmarks.source import File, Row, Source

Scores = tuple[tuple[float, ...], ...]
"""[image][text]: the higher, the better the text fits the image."""

YES_NO = ("Yes", "No")


@dataclass(frozen=True)
class Item:
    """One question that is judged: which texts are true of which images.

    Args:
        id: unique within its benchmark.
        images: what the texts are judged on; an image is a tuple of pictures, empty for text alone.
        texts: captions, options or answers.
        match: 1 where a text is true of an image, 0 where it is false.
        prompt: the question, with the benchmark's own instruction; empty for captions.
        listed: the prompt already lists the options, and the texts are their letters.
        tags: what the metrics group items by, such as a category, or the pair that an item belongs to.
        cluster: items of one cluster are drawn together by a bootstrap, because they share pictures or a pair.
    """

    id: str
    images: tuple[Pictures, ...]
    texts: tuple[str, ...]
    match: tuple[tuple[int, ...], ...]
    prompt: str = ""
    listed: bool = False
    tags: Mapping[str, str] = field(default_factory=dict)
    cluster: str = ""

    def __post_init__(self) -> None:
        if not self.images or not self.texts:
            raise DataError(f"item {self.id!r} needs at least one image entry and one text")
        if [len(line) for line in self.match] != [len(self.texts)] * len(self.images):
            raise DataError(f"item {self.id!r}: match must be {len(self.images)} images x {len(self.texts)} texts")
        if empty := [number for number, text in enumerate(self.texts) if not text.strip()]:
            raise DataError(f"item {self.id!r}: text {empty[0]} is empty; get the file again")

    @property
    def repeats(self) -> bool:
        """Whether two of its texts are the same to a model."""
        return len({normalised(text) for text in self.texts}) < len(self.texts)


def quad(id: str, pictures: Sequence[Path], captions: Sequence[str], cluster: str = "", **tags: str) -> Item:
    """Make an item of two pictures and two texts, each text true of its own picture."""
    images = tuple((picture,) for picture in pictures)
    return Item(id, images, tuple(captions), ((1, 0), (0, 1)), tags=tags, cluster=cluster or id)


@dataclass(frozen=True)
class Outcome:
    """What a probe has read of an item.

    Args:
        seen: a score per image and text.
        blank: a score per text on one blank picture: what language alone gives.
        shuffled: the same on another item's picture; None where there is none, or none was asked for.
        consistency: share of the orders of options in which the option is chosen that is chosen over all orders; None without orders.
        prior: a score per option without picture and question; None where it was not asked for.
        said: what the model wrote about each image; None where it was not asked to write.
    """

    item: Item
    seen: Scores
    blank: tuple[float, ...]
    shuffled: tuple[float, ...] | None = None
    consistency: float | None = None
    prior: tuple[float, ...] | None = None
    said: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Judged:
    """An item and one table of scores for it. ``blind`` tables say the same of every image; a tie is a guess there, and wrong otherwise.

    ``draw`` tells the copies of an item apart that a bootstrap draws: a pair that is drawn twice is two pairs.
    """

    item: Item
    scores: Scores
    blind: bool = False
    draw: int = 0


Values = dict[str, float]
"""Name of a metric -> its value in %. ``macro`` is of the whole benchmark, ``macro/add_att`` of a part of it."""
Metrics = Callable[[Sequence[Judged]], Values]


@dataclass(frozen=True)
class Benchmark:
    """A public benchmark, or one of your own: ``BENCHMARKS["mine"] = Benchmark(...)``.

    Args:
        title: what its authors call it.
        files: its official files; rows of those without columns are not read.
        item: makes an item of a row, or several; None for a row that does not count. Whatever it raises is said of the row.
        metrics: pure function of judged items.
        headline: the metric that a table shows.
        probes: names of the probes that fit, the default first.
        chance: values of random scores, for what is not the sum of independent comparisons; the others follow from ties.
        total: rows of all official files together.
        unofficial: what of this is not the authors' own protocol.
    """

    title: str
    files: tuple[File, ...]
    item: Callable[[Row], Item | Sequence[Item] | None]
    metrics: Metrics
    headline: str
    probes: tuple[str, ...]
    chance: Mapping[str, float] = field(default_factory=dict)
    total: int | None = None
    unofficial: str = ""


@dataclass(frozen=True)
class Loaded:
    """The items of a benchmark, at most about ``limit`` of the ``in_files``; the rows that could not be read and the items without their
    picture, and what is worth saying, such as another revision of a file."""

    items: tuple[Item, ...]
    problems: tuple[DataError, ...]
    notes: tuple[str, ...] = ()
    in_files: int = 0
    limit: int | None = None


def load(benchmark: Benchmark, root: Path, say: Callable[[str], object] = lambda line: None, limit: int | None = None) -> Loaded:
    """The items of a benchmark whose files are in ``root``: all, or about ``limit`` spread over them. Pictures of these are looked for and
    not opened; ``say`` is told of long work."""
    source, items, problems = Source(root, say), dict[str, Item](), list[DataError]()
    if not root.is_dir():
        return Loaded((), (DataError(f"{root}: no such folder; put the files of {benchmark.title} there"),))
    for found in _items(benchmark, source):
        if isinstance(found, DataError):
            problems.append(found)
        elif found.id in items:
            problems.append(DataError(f"{root}: item {found.id!r} occurs twice; get the files again"))
        else:
            items[found.id] = found
    notes = []
    for file in benchmark.files:
        counted = source.counts.get(file.name)
        if counted is not None and file.rows is not None and counted != file.rows:
            notes.append(f"{root / source.read[file.name]} has {counted} rows, and the official file {file.rows}: another revision")
    if benchmark.total is not None and (count := sum(source.counts.values())) not in (0, benchmark.total):
        notes.append(f"the files in {root} have {count} rows together, and the official ones {benchmark.total}: another revision")
    if twice := [item.id for item in items.values() if item.repeats]:
        notes.append(
            f"{root}: {len(twice)} items have a text twice, the first {twice[0]!r}; where it is true and false, the tie counts as wrong"
        )
    if not items and not problems:
        problems.append(DataError(f"{root}: no item in the files of {benchmark.title}; get them again"))
    in_files, kept = len(items) + len(problems), list[Item]()
    for item in spread(tuple(items.values()), limit):
        absent = [source.absent[picture] for image in item.images for picture in image if picture in source.absent]
        problems += absent[:1]
        kept += [] if absent else [item]
    return Loaded(tuple(kept), tuple(problems), tuple(notes), in_files, limit)


def _items(benchmark: Benchmark, source: Source) -> Iterator[Item | DataError]:
    for file in benchmark.files:
        for row in source.rows(file) if file.columns else ():
            if isinstance(row, DataError):
                yield row
                continue
            try:
                made = benchmark.item(row)
            except DataError as error:
                yield error if str(error).startswith(row.where) else DataError(f"{row.where}: {error}")
                continue
            except Exception as error:  # whatever the row's values make of what takes them apart
                yield row.error(f"a value in the row has the wrong type or form ({error})")
                continue
            source.counts[file.name] -= made is None
            yield from [made] if isinstance(made, Item) else made or ()


def spread(items: Sequence[Item], limit: int | None) -> list[Item]:
    """About ``limit`` items, spread evenly over all of them in whole clusters, so that no part of a benchmark and no pair is cut."""
    if limit is None or limit >= len(items):
        return list(items)
    clusters: dict[str, list[int]] = {}
    for number, item in enumerate(items):
        clusters.setdefault(item.cluster or item.id, []).append(number)
    members = list(clusters.values())
    count = math.ceil(limit * len(members) / len(items))
    taken = {number for k in range(count) for number in members[k * len(members) // count]}
    return [item for number, item in enumerate(items) if number in taken]


def judged(outcomes: Sequence[Outcome]) -> dict[str, list[Judged]]:
    """The tables that metrics are computed of: ``seen``, and what language alone gives, ``blank``, ``shuffled`` and ``prior``.

    A table has only the items for which it was read.
    """
    tables = {"seen": [Judged(each.item, each.seen) for each in outcomes]}
    for name in ("blank", "shuffled", "prior"):
        rows = [(each.item, getattr(each, name)) for each in outcomes]
        tables[name] = [Judged(item, (row,) * len(item.images), blind=True) for item, row in rows if row is not None]
    return {name: table for name, table in tables.items() if table}


def chance(benchmark: Benchmark, items: Sequence[Item]) -> Values:
    """What random scores give on these items: every comparison a tie, except where the benchmark states a value."""
    tied = [Judged(item, ((0.0,) * len(item.texts),) * len(item.images), blind=True) for item in items]
    named = benchmark.metrics([replace(each, blind=False) for each in tied])
    stated = {name: benchmark.chance[whole] for name in named if (whole := name.split("/")[0]) in benchmark.chance}
    return benchmark.metrics(tied) | stated


def results(benchmark: Benchmark, outcomes: Sequence[Outcome]) -> dict[str, Values]:
    """Table (see ``judged``) -> values, with ``chance``, and the mean consistency of orders as ``consistency`` of ``seen``."""
    found = {name: benchmark.metrics(table) for name, table in judged(outcomes).items()}
    consistent = [each.consistency for each in outcomes if each.consistency is not None]
    if consistent and "seen" in found:
        found["seen"]["consistency"] = 100 * sum(consistent) / len(consistent)
    found["chance"] = chance(benchmark, [each.item for each in outcomes])
    return found
