"""Comparison of two result folders: differences with intervals from an exact test, and items whose outcome changed.

Metrics are recomputed from the stored scores of the items in both folders, so neither models nor benchmark files are needed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.progress import Progress, Say, no_op
from cfvlm_ds.core.text import few, in_cell
from cfvlm_ds.evaluation.before_after import FEWEST_CHANGED, is_tested
from cfvlm_ds.evaluation.benchmarks import Benchmark, Outcome
from cfvlm_ds.evaluation.benchmarks.base import Judged, Values, clusters_of, judged
from cfvlm_ds.evaluation.benchmarks.descriptions import counted
from cfvlm_ds.evaluation.benchmarks.metrics import all_right, image_right
from cfvlm_ds.evaluation.suite.bootstrap import Interval, draws_for, exchange_intervals, exchanges
from cfvlm_ds.evaluation.suite.results import Result, read_results
from cfvlm_ds.evaluation.suite.selection import benchmark_named
from cfvlm_ds.evaluation.suite.tables import between, number

RESOLVED = (
    "Resolved: at most 5 % of the exchanges of the two models' answers, in whole clusters (pictures, pairs), give a difference this large. "
    "In this case, and only then, the interval excludes 0. All metrics of a benchmark are tested together (max-T of Westfall and Young), "
    "and each benchmark separately. Clusters +, -: clusters in which the metric rose and fell. If these are fewer than "
    f"{FEWEST_CHANGED}, there is no interval."
)
_NAMED = 20


@dataclass(frozen=True)
class Difference:
    """A metric before and after, and the interval of the difference (None without draws, or if too few clusters changed).

    ``changed`` contains the number of clusters in which the metric rose and the number in which it fell. It is None for a metric that is
    not defined on a single cluster; such a metric is tested if the total number of ``clusters`` is large enough.
    """

    before: float
    after: float
    interval: Interval | None
    changed: tuple[int, int] | None
    clusters: int

    @property
    def tested(self) -> bool:
        """True if enough clusters changed for a test."""
        return is_tested(*(self.changed or (self.clusters, 0)))

    @property
    def resolved(self) -> bool:
        """True if the interval excludes 0, so the sign of the difference is known."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)

    def __str__(self) -> str:
        if self.interval is not None:
            return "yes" if self.resolved else "no"
        return "not tested" if self.tested else "too few changed" if self.changed else "too few clusters"


@dataclass(frozen=True)
class Compared:
    """Comparison of two models on one benchmark with the same probe: pairs of outcomes for the shared items, and differences in metrics."""

    before: Result
    benchmark: Benchmark
    pairs: Sequence[tuple[Outcome, Outcome]]
    differences: Mapping[str, Difference]
    notes: Sequence[str]

    @property
    def headlines(self) -> dict[str, tuple[float, Interval | None]]:
        """Difference and confidence interval of each headline metric that was computed."""
        found = {name: self.differences[name] for name in self.benchmark.headlines if name in self.differences}
        return {name: (each.after - each.before, each.interval) for name, each in found.items()}

    def changes(self) -> tuple[list[str], list[str]]:
        """Return the ids of items that became right, and the ids of items that became wrong."""
        right = [(after.item.id, is_right(self.benchmark, before), is_right(self.benchmark, after)) for before, after in self.pairs]
        return [item for item, was, now in right if now and not was], [item for item, was, now in right if was and not now]


def is_right(benchmark: Benchmark, outcome: Outcome) -> bool:
    """Return True if the true texts of an item all beat its false texts on every image. If the benchmark's headline metric compares images,
    each text must also score higher on the images for which it is true than on the others. A description is right if it mentions no false
    object.
    """
    table = Judged(outcome.item, outcome.seen)
    if benchmark.mentions:
        return not counted([table]).inventing
    of_images = benchmark.headline.split("_")[0] in ("group", "image")
    return all_right(table) == 1 and (not of_images or image_right(table) == 1)


def compare_results(before: Path, after: Path, draws: int | None = None, say: Say = no_op) -> list[Compared]:
    """Compare the results that both folders contain, in the order of ``before``.

    Raises ConfigError if the folders have no result or item in common, and DataError for files that are not results.
    """
    first, second = ({result.place: result for result in read_results(folder)} for folder in (before, after))
    shared = [place for place in first if place in second]
    if not shared:
        raise ConfigError(
            f"{before} ({', '.join(first)}) and {after} ({', '.join(second)}) have no benchmark in common under the same probe"
        )
    for folder, by_place, other in ((before, first, second), (after, second, first)):
        if unmatched := [place for place in by_place if place not in other]:
            say(f"not compared, because only {folder} has them: {', '.join(unmatched)}")
    return [_compared(first[place], second[place], draws, say) for place in shared]


def _compared(before: Result, after: Result, draws: int | None, say: Say) -> Compared:
    benchmark = benchmark_named(before.name)
    pairs, notes = _pairs(before, after)
    if not pairs:
        raise ConfigError(f"{before.place}: the two results have no item in common; evaluate both models on the same files")
    tables = [judged([pair[side] for pair in pairs])["seen"] for side in (0, 1)]
    was, now = (benchmark.metrics(table) for table in tables)
    if before.name != after.name:
        raise ConfigError(f"{before.place} belongs to {before.name} in one folder and to {after.name} in the other; compare results of one")
    members, draws = clusters_of(pair[0].item for pair in pairs), draws_for(len(pairs)) if draws is None else draws
    changed = _changed(benchmark, tables, members)
    differences = {name: Difference(was[name], now[name], None, changed.get(name), len(members)) for name in was if name in now}
    tested, drawn = [name for name, each in differences.items() if each.tested], list[Values]()
    made = exchanges(members, draws) if draws and tested else ()
    for exchanged in Progress(say, f"{before.place}: intervals", draws, "exchanges").over(made):
        one, other = (benchmark.metrics([tables[k ^ (n in exchanged)][n] for n in range(len(pairs))]) for k in (0, 1))
        drawn.append({name: other[name] - one[name] for name in one if name in other})
    valued = [name for name in tested if drawn and not any(math.isnan(difference.get(name, math.nan)) for difference in drawn)]
    spans = exchange_intervals(drawn, valued)
    differences = {name: replace(each, interval=spans.get(name)) for name, each in differences.items()}
    return Compared(before, benchmark, pairs, differences, notes)


def _changed(benchmark: Benchmark, tables: Sequence[Sequence[Judged]], members: Sequence[Sequence[int]]) -> dict[str, tuple[int, int]]:
    """Return, for each metric, the number of clusters in which it rose and the number in which it fell."""
    rose, fell = Counter[str](), Counter[str]()
    for cluster in members:
        was, now = (benchmark.metrics([table[n] for n in cluster]) for table in tables)
        for name in was.keys() & now.keys():
            old, new = (0.0 if math.isnan(values[name]) else values[name] for values in (was, now))  # e.g. precision without yes answers
            rose[name] += new > old
            fell[name] += new < old
    return {name: (rose[name], fell[name]) for name in rose}


def _pairs(before: Result, after: Result) -> tuple[list[tuple[Outcome, Outcome]], list[str]]:
    """Return pairs of outcomes for the items that both results have, and notes on differences between the results."""
    first, second = ({outcome.item.id: outcome for outcome in result.outcomes} for result in (before, after))
    same = [name for name in first if name in second and _content(first[name]) == _content(second[name])]
    notes, shared = [], set(same)
    if changed := [name for name in first | second if name not in shared]:
        notes.append(
            f"{len(changed)} items are not compared, because only one result has them, or their texts, parts or clusters differ: "
            f"{few(changed)}"
        )
    elif before.record["data"].get("pictures") != after.record["data"].get("pictures"):
        notes.append("the pictures of the two results differ, so differences may also come from the data")
    if before.record["probe"] != after.record["probe"]:
        notes.append("the two results have different options of the probe")
    if before.record.get("prompt") != after.record.get("prompt"):
        notes.append("the two models got different prompts, because their chat templates differ")
    return [(first[name], second[name]) for name in same], notes


def _content(outcome: Outcome) -> tuple[object, ...]:
    item = outcome.item
    return item.texts, item.match, item.prompt, item.tags, item.cluster


def comparison_table(results: Sequence[Compared], before: str, after: str) -> str:
    """Return a table of the headline metrics and of all other metrics whose interval excludes 0, followed by the items whose outcome
    changed and by notes.
    """
    one, other = (in_cell(name) for name in (before, after))
    lines = [
        f"| benchmark | probe | metric | {one} | {other} | difference | 95 % | resolved | clusters +, - |",
        "|---|---|---|---:|---:|---:|---|---|---:|",
    ]
    flipped = []
    for pair in results:
        better, worse = pair.changes()
        for word, ids in (("better", better), ("worse", worse)):
            flipped += [f"{pair.before.place}: {len(ids)} items got {word}: {few(ids, _NAMED)}"] * bool(ids)
        names = [*pair.headlines]
        names += [name for name, difference in pair.differences.items() if name not in names and difference.resolved]
        for name in names:
            start = f"| {in_cell(pair.before.shown)} | {in_cell(pair.before.label)} |"
            metric = pair.differences[name]
            counts = "" if metric.changed is None else f"+{metric.changed[0]} -{metric.changed[1]}"
            values = f"{in_cell(name)} | {number(metric.before)} | {number(metric.after)} | {number(metric.after - metric.before, '+')}"
            lines.append(f"{start} {values} | {between(metric.interval)} | {metric} | {counts} |")
    return "\n".join([*lines, "", *flipped, RESOLVED, *(f"{pair.before.place}: {note}" for pair in results for note in pair.notes)])
