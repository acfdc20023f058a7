"""Benchmarks: official files, items built from their rows, probes that score the items, and metrics of the scores.

An item has images, texts and a truth table. The texts are captions, options of a question, or the answers yes and no. A probe is a way to
query the model about an item. It computes a score for each pair of an image and a text (cfvlm_ds.evaluation.probes). A metric is a pure
function of those scores, so it can be recomputed from a result file without the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import Pictures, normalised
from cfvlm_ds.core.progress import Say, no_op
from cfvlm_ds.evaluation.benchmarks.source import File, Row, Source

Scores = tuple[tuple[float, ...], ...]
"""Scores, indexed [image][text]. A higher score means that the text fits the image better."""

YES_NO = ("Yes", "No")


@dataclass(frozen=True)
class Item:
    """A benchmark item: images, texts, and their truth table.

    Args:
        id: unique name within the benchmark.
        images: images that the texts are scored on; each is a tuple of pictures, empty for a text-only item.
        texts: captions, options or answers.
        match: truth table, indexed [image][text]: 1 for true, 0 for false.
        prompt: question with the benchmark's own instruction; empty for captions.
        listed: True if the prompt lists the options and the texts are their letters.
        tags: values that metrics use to group items, such as a category or a pair.
        cluster: name of the item's cluster. Items of a cluster share pictures or form a pair, so a bootstrap draws them together.
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
        """True if two texts are equal after normalisation."""
        return len({normalised(text) for text in self.texts}) < len(self.texts)


def quad(id: str, pictures: Sequence[Path], captions: Sequence[str], cluster: str = "", **tags: str) -> Item:
    """Return an item with two pictures and two texts. Each text is true of its own picture only."""
    images = tuple((picture,) for picture in pictures)
    return Item(id, images, tuple(captions), ((1, 0), (0, 1)), tags=tags, cluster=cluster or id)


def single(
    id: str,
    picture: Path,
    texts: Sequence[str],
    cluster: str,
    truth: tuple[int, ...] = (1, 0),
    prompt: str = "",
    listed: bool = False,
    /,
    **tags: str,
) -> Item:
    """Return an item with one picture. By default, it has two texts, of which the first is true."""
    return Item(id, ((picture,),), tuple(texts), (truth,), prompt, listed, tags, cluster)


@dataclass(frozen=True)
class Outcome:
    """Scores of an item under one probe (a way to query the model).

    If the model generates an answer, the chosen text scores 1 and all others 0. If it generates a description, each text's score is the
    number of times the description mentions it. All other probes score by log-likelihood.

    Args:
        seen: scores on the item's own images, indexed [image][text].
        blank: scores of the texts on a blank image, which measure the language prior.
        consistency: share of option orders in which the model chooses the option with the highest mean probability over all orders; None if
            the order of the options is fixed.
        said: generated text for each image; None if the probe does not generate text.
    """

    item: Item
    seen: Scores
    blank: tuple[float, ...]
    consistency: float | None = None
    said: tuple[str, ...] | None = None


@dataclass(frozen=True, eq=False)
class Judged:
    """An item with its scores in one of the tables that ``judged`` returns.

    ``blind`` is True in a control table, where all images have the same scores and a tie counts as a random guess. In other tables, a tie
    counts as wrong. ``draw`` distinguishes copies of an item in a bootstrap sample, so a pair that is drawn twice counts as two pairs.
    Records are compared by identity, which makes cache look-ups fast.
    """

    item: Item
    scores: Scores
    blind: bool = False
    draw: int = 0


Values = dict[str, float]
"""Metric -> value in %; NaN if the metric is not defined. ``macro`` is the value for the whole benchmark, and a name such as
``macro/add_att`` is the value for one part.
"""
Metrics = Callable[[Sequence[Judged]], Values]
Mentions = Callable[[str, Item], tuple[float, ...]]
"""Function that counts the mentions of each item text in a description."""


@dataclass(frozen=True)
class Benchmark:
    """A public benchmark, or one of your own: ``BENCHMARKS["mine"] = Benchmark(...)``.

    Args:
        title: display name.
        files: official files that contain the items.
        item: function that converts a row to one or more items, or to None for a row that the benchmark excludes. Its exceptions are
            reported as errors in the row.
        metrics: pure function of items and their scores.
        headline: main metric, which overviews show.
        beside: metric without which the headline would be misleading; every table shows both.
        probes: names of the supported probes, the default first.
        mentions: function that counts the mentions in a description; None if the benchmark has no descriptions.
        random: known chance levels in %, for metrics whose comparisons share scores, such as Winoground's group score; ``random_scores``
            computes all others.
        total: total number of rows in the official files; None if unknown.
        unofficial: deviations from the authors' protocol.
    """

    title: str
    files: tuple[File, ...]
    item: Callable[[Row], Item | Sequence[Item] | None]
    metrics: Metrics
    headline: str
    probes: tuple[str, ...]
    random: Mapping[str, float] = field(default_factory=dict)
    total: int | None = None
    unofficial: str = ""
    beside: str = ""
    mentions: Mentions | None = None

    @property
    def headlines(self) -> tuple[str, ...]:
        """Metrics that an overview shows."""
        return tuple(filter(None, (self.headline, self.beside)))


@dataclass(frozen=True)
class Loaded:
    """Items loaded from a benchmark's files: about ``limit`` of the ``in_files`` items, or all if ``limit`` is None.

    ``problems`` contains an error for each invalid row or item and each item with a missing picture. ``notes`` describe deviations from the
    published benchmark. ``own_files`` is True if a file's row count differs from the published count.
    """

    items: tuple[Item, ...]
    problems: tuple[DataError, ...]
    notes: tuple[str, ...] = ()
    in_files: int = 0
    limit: int | None = None
    own_files: bool = False


def load(benchmark: Benchmark, root: Path, say: Say = no_op, limit: int | None = None) -> Loaded:
    """Load the items of a benchmark from its files in ``root``: all items, or about ``limit`` items spread evenly over the files.

    Pictures must exist but are not opened. Problems are returned, not raised. ``say`` is called with progress messages.
    """
    source, items, problems = Source(root, say), dict[str, Item](), list[DataError]()
    if not root.is_dir():
        return Loaded((), (DataError(f"{root}: no such folder; put the files of {benchmark.title} there"),))
    for item in _items(benchmark, source):
        if isinstance(item, DataError):
            problems.append(item)
        elif item.id in items:
            problems.append(DataError(f"{root}: item {item.id!r} occurs twice; get the files again"))
        else:
            items[item.id] = item
    rows = [(root / source.read[file.name], source.counts[file.name], file.rows) for file in benchmark.files if file.name in source.counts]
    rows += [(root, sum(source.counts.values()), benchmark.total)] * any(source.counts.values())
    others = [f"{path} has {count} rows, the published {number}" for path, count, number in rows if number not in (None, count)]
    notes = [f"own files in the form of {benchmark.title}: {'; '.join(others)}"] * bool(others)
    if twins := [item.id for item in items.values() if item.repeats]:
        notes.append(
            f"{root}: {len(twins)} items contain the same text twice, first {twins[0]!r}; if one copy is true and the other false, the tie "
            "counts as wrong"
        )
    if not items and not problems:
        problems.append(DataError(f"{root}: the files of {benchmark.title} contain no item; get them again"))
    in_files, available = len(items) + len(problems), list[Item]()
    for item in spread(tuple(items.values()), limit):
        absent = [source.absent[picture] for image in item.images for picture in image if picture in source.absent]
        problems += absent[:1]
        available += [] if absent else [item]
    return Loaded(tuple(available), tuple(problems), tuple(notes), in_files, limit, bool(others))


def _items(benchmark: Benchmark, source: Source) -> Iterator[Item | DataError]:
    for file in benchmark.files:
        for row in source.rows(file):
            if isinstance(row, DataError):
                yield row
                continue
            try:
                items = benchmark.item(row)
            except DataError as error:
                yield error if str(error).startswith(row.where) else DataError(f"{row.where}: {error}")
                continue
            except Exception as error:  # ``item`` can fail on any value
                yield row.error(f"a value in the row has the wrong type or form ({error})")
                continue
            source.counts[file.name] -= items is None
            yield from [items] if isinstance(items, Item) else items or ()


def spread(items: Sequence[Item], limit: int | None) -> list[Item]:
    """Return about ``limit`` items, or all if ``limit`` is None. Whole clusters (items that share pictures or form a pair) are sampled at
    even intervals, so that every section of the benchmark is represented and no pair is split.
    """
    if limit is None or limit >= len(items):
        return list(items)
    members = clusters_of(items)
    count = math.ceil(limit * len(members) / len(items))
    taken = {number for k in range(count) for number in members[k * len(members) // count]}
    return [item for number, item in enumerate(items) if number in taken]


def clusters_of(items: Iterable[Item]) -> list[list[int]]:
    """Return the item indices of each cluster, ordered by first item. An item without a cluster name forms its own cluster."""
    members: dict[str, list[int]] = {}
    for number, item in enumerate(items):
        members.setdefault(item.cluster or item.id, []).append(number)
    return list(members.values())


def judged(outcomes: Sequence[Outcome]) -> dict[str, list[Judged]]:
    """Return the tables that metrics are computed from: ``seen`` (scores on the items' own images) and ``blank`` (scores on a blank image).
    Return {} if there are no outcomes.
    """
    if not outcomes:
        return {}
    blank = [Judged(each.item, (each.blank,) * len(each.item.images), blind=True) for each in outcomes]
    return {"seen": [Judged(each.item, each.seen) for each in outcomes], "blank": blank}


def random_scores(benchmark: Benchmark, items: Sequence[Item]) -> Values:
    """Return the chance level of each metric on these items. Levels that the benchmark does not define are computed by giving all texts the
    same score and counting each tie as a random guess.
    """
    names = benchmark.metrics(tied(items))
    stated = {name: benchmark.random[base] for name in names if (base := name.split("/")[0]) in benchmark.random}
    return benchmark.metrics(tied(items, blind=True)) | stated


def tied(items: Sequence[Item], blind: bool = False) -> list[Judged]:
    """Return a table in which every score is 0."""
    return [Judged(item, ((0.0,) * len(item.texts),) * len(item.images), blind) for item in items]


def results(benchmark: Benchmark, outcomes: Sequence[Outcome]) -> dict[str, Values]:
    """Return the metrics of each table (see ``judged``). Unless the model writes descriptions, add a table ``random`` with the chance level
    of each metric. If options are reordered, ``seen`` also contains the mean ``consistency`` in %.
    """
    values = {name: benchmark.metrics(table) for name, table in judged(outcomes).items()}
    consistent = [outcome.consistency for outcome in outcomes if outcome.consistency is not None]
    if consistent and "seen" in values:
        values["seen"]["consistency"] = 100 * sum(consistent) / len(consistent)
    if not benchmark.mentions:
        values["random"] = random_scores(benchmark, [outcome.item for outcome in outcomes])
    return values
