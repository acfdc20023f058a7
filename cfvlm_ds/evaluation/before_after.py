"""Comparison of two models' accuracies on the same groups, with confidence intervals for the paired differences."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.progress import Say
from cfvlm_ds.core.reading import read_json
from cfvlm_ds.core.text import in_cell
from cfvlm_ds.evaluation.metrics import COMPARED, MEAN, MEANINGS, Accuracy

_Key: TypeAlias = tuple[str, int]
"""A group's id and content hash."""
_Values: TypeAlias = Mapping[_Key, float]
_Groups: TypeAlias = Mapping[_Key, Mapping[str, Mapping[str, list[float]]]]
"""[comparisons won, total comparisons], keyed by group, metric and edit type."""

FEWEST_CHANGED = 6
"""Minimum number of changed groups (or benchmark clusters) for reporting a confidence interval. If n groups change, all in one direction,
the two-sided sign test gives p = 2 / 2^n, which is above 5 % for fewer than 6 groups.
"""
FEWEST_GROUPS = 20
"""Number of groups below which a difference without a significant interval gets the verdict "too few groups to tell". Training often
changes less than a third of the groups, and a third of 20 groups is about ``FEWEST_CHANGED``.
"""
_TOO_FEW = "too few groups to tell"
_VERDICTS = ("worse", "better", "not resolved", _TOO_FEW, "unchanged")
"""Verdicts in order of priority: an edit type gets the first one that any of its rows has."""
_COLUMNS = (
    "set", "edit type", "groups", "of", "metric", "before, %", "after, %", "difference, points", "95 % low", "95 % high",
    "groups +", "groups -", "blank image after, %", "blank image before, %", "NLL before", "NLL after",
)  # fmt: skip
"""Names of the fields of ``Change`` in before_after.json."""


@dataclass(frozen=True)
class Change:
    """A table row: a metric on an evaluation set, for one edit type or as the mean over edit types (``edit`` is ``MEAN``). Accuracies are
    in %.

    ``groups`` is the number of groups whose metric was measured both before and after. ``of`` also counts groups that were measured only
    once, and groups for which the metric is not defined. ``better`` is the number of groups that improved, and ``worse`` the number that
    got worse. ``low`` and ``high`` are the bounds of the 95 % interval of ``difference``. They are None if fewer than
    ``FEWEST_CHANGED`` groups changed, if all groups changed by the same amount, or if the edit type has only one group.

    ``blank_before`` and ``blank`` are the same metric of the same groups on a blank image; None for metrics that compare images.
    ``nll_before`` and ``nll_after`` are the NLL of the whole set in nats per token. They are None if different groups were measured before
    and after. If a set has several edit types, they are also None in the rows for individual edit types.
    """

    set: str
    edit: str
    groups: int
    of: int
    metric: str
    before: float
    after: float
    difference: float
    low: float | None
    high: float | None
    better: int
    worse: int
    blank: float | None = None
    blank_before: float | None = None
    nll_before: float | None = None
    nll_after: float | None = None

    @property
    def verdict(self) -> str:
        """``better`` or ``worse`` if the interval excludes 0, otherwise ``_TOO_FEW`` if the row has few groups, ``unchanged`` if no group
        changed, else ``not resolved``.
        """
        if self.low is not None and self.high is not None and not self.low <= 0 <= self.high:
            return "better" if self.low > 0 else "worse"
        if self.groups < FEWEST_GROUPS:
            return _TOO_FEW
        return "not resolved" if self.better + self.worse else "unchanged"


def to_table(changes: Sequence[Change]) -> dict[str, list[Any]]:
    """Return {"columns": names, "data": rows}, the format of before_after.json, which MLflow shows as a table."""
    return {"columns": [*_COLUMNS], "data": [list(vars(each).values()) for each in changes]}


def from_table(table: Mapping[str, Any]) -> list[Change]:
    """Return the rows of a table made by ``to_table``. Raises KeyError, TypeError or ValueError for any other table."""
    if table["columns"] not in ([*_COLUMNS], [each.name for each in fields(Change)]):  # the second was used until December 2026
        raise ValueError(f"columns {table['columns']}")
    return [Change(*row) for row in table["data"]]


def of_types(changes: Iterable[Change]) -> list[Change]:
    """Return the rows for individual edit types in sets with several types."""
    changes = list(changes)
    several = {each.set for each in changes if each.edit == MEAN}
    return [each for each in changes if each.set in several and each.edit != MEAN]


def compare_accuracies(name: str, before: Sequence[Accuracy], after: Sequence[Accuracy]) -> list[Change]:
    """Return an evaluation set's rows: one mean over edit types for each metric of ``COMPARED``, then one or two rows per edit type.

    The first mean shows the metric that is defined for the most groups. The first row of an edit type shows the metric that is defined for
    the most groups of this type. Ties go to the metric that comes first in ``COMPARED``. A second row is added if another metric fell
    more; it shows the one that fell most. ``factual`` is left out if it equals ``pair`` because every group has one image.

    A metric has rows only if at least one group has a value for it both before and after. Groups are matched by id and content
    (``content_hash``). If a set has only one edit type, its rows are named after that type, and there is no mean row.
    """
    if not before or not after:
        return []
    was, now = _by_group(before), _by_group(after)
    rows = {metric: found for metric in COMPARED if (found := _changes(name, metric, was, now))}
    if all(won.get("factual") == won.get("pair") for won in (*was.values(), *now.values())):
        rows.pop("factual", None)
    if not rows:
        return []
    nll_before, nll_after = (before[-1].nll, after[-1].nll) if was.keys() == now.keys() else (None, None)
    types = dict.fromkeys(sorted(edit for of_metric in rows.values() for edit in of_metric if edit is not None))
    total = {key: {edit for won in of_group.values() for edit in won} for key, of_group in {**was, **now}.items()}
    first = max(rows, key=lambda metric: rows[metric][None].groups)
    whole = MEAN if len(types) > 1 else next(iter(types))
    overall = [rows[metric][None] for metric in (first, *(each for each in rows if each != first))]
    changes = [replace(row, edit=whole, of=len(total), nll_before=nll_before, nll_after=nll_after) for row in overall]
    for edit in types if len(types) > 1 else ():
        of_edit = [found[edit] for found in rows.values() if edit in found]
        row, lowest = max(of_edit, key=lambda each: each.groups), min(of_edit, key=lambda each: each.difference)
        shown = [row, lowest] if round(lowest.difference, 1) < min(0, round(row.difference, 1)) else [row]
        changes += [replace(each, of=sum(edit in edits for edits in total.values())) for each in shown]
    return changes


def is_tested(better: int, worse: int) -> bool:
    """Return True if enough groups (for benchmarks, enough clusters) changed to compute an interval."""
    return better + worse >= FEWEST_CHANGED


def _changes(name: str, metric: str, was: _Groups, now: _Groups) -> dict[str | None, Change]:
    """Return a metric's rows, keyed by edit type. The key of the mean over types is None. Return {} if no group was measured both before
    and after.

    An edit type's accuracy is the number of comparisons won divided by the total number, over all groups. The mean row averages these
    ratios. The interval is the difference plus or minus 1.96 standard errors, estimated by the delta method with groups as independent
    units. In the mean row, a group with several edit types counts as better if its gains, each divided by the edit type's total number of
    comparisons, have a positive sum.
    """
    pairs = defaultdict[str, dict[tuple[str, int], tuple[float, float, float]]](dict)  # edit -> group -> won before, won after, total
    blinds = [defaultdict[str, list[float]](list) for _ in range(2)]  # before, after: edit -> comparisons won on a blank image, per group
    for key in (key for key in now if metric in was.get(key, ())):
        for edit, (won, made) in now[key].get(metric, {}).items():
            pairs[edit][key] = was[key][metric][edit][0], won, made
            for blind, table in zip(blinds, (was, now), strict=True):
                blind[edit] += table[key].get(f"blind_{metric}", {}).get(edit, [])[:1]

    def change(edit: str, gains: _Values, errors: _Values, first: float, last: float, blanks: Sequence[float | None]) -> Change:
        better, worse = (sum(sign * gain > 0 for gain in gains.values()) for sign in (1, -1))
        width = 1.96 * math.sqrt(sum(value**2 for value in errors.values()))
        known, moved = is_tested(better, worse) and width > 0, last - first
        ends: tuple[float | None, float | None] = (max(-100.0, moved - width), min(100.0, moved + width)) if known else (None, None)
        return Change(name, edit, len(errors), len(errors), metric, first, last, moved, *ends, better, worse, blanks[1], blanks[0])

    changes, mean, mean_gains = dict[str | None, Change](), defaultdict[_Key, float](float), defaultdict[_Key, float](float)
    for edit, of_group in sorted(pairs.items()):
        first, last, made = (sum(column) for column in zip(*of_group.values(), strict=True))
        n = len(of_group)
        correction = math.sqrt(n / (n - 1)) if n > 1 else math.nan  # standard error estimated from n groups
        gains = {key: b - a for key, (a, b, _) in of_group.items()}
        errors = {key: 100 * (b - a - (last - first) / made * k) / made * correction for key, (a, b, k) in of_group.items()}
        for key, value in errors.items():
            mean[key] += value / len(pairs)
            mean_gains[key] += gains[key] / made
        blanks = [100 * sum(blind[edit]) / made if len(blind[edit]) == n else None for blind in blinds]
        changes[edit] = change(edit, gains, errors, 100 * first / made, 100 * last / made, blanks)
    if changes:
        first, last = (sum(getattr(each, side) for each in changes.values()) / len(changes) for side in ("before", "after"))
        both = [[row.blank_before for row in changes.values()], [row.blank for row in changes.values()]]
        known = [[value for value in values if value is not None] for values in both]
        blanks = [sum(values) / len(values) if len(values) == len(changes) else None for values in known]
        changes[None] = change(MEAN, mean_gains, mean, first, last, blanks)
    return changes


def _by_group(rows: Sequence[Accuracy]) -> _Groups:
    return {(group, content): won for group, content, won in rows[-1].by_group}


def changes_table(
    changes: Sequence[Change],
    names: tuple[str, str] = ("before", "after"),
    plain: Callable[[str], str] = in_cell,
    files: Mapping[str, str] | None = None,
    vocabulary: int | None = None,
) -> str:
    """Return Markdown: a table of the evaluation sets, a table of the changes, and an explanation of the columns. Rows for individual edit
    types (those that ``of_types`` returns) are omitted. ``plain`` escapes names from the data for table cells. ``files`` maps each set to
    its manifest; None if the manifests are unknown. ``vocabulary`` is the size of the model's vocabulary, which determines the NLL of
    uniform guessing.
    """
    first, last = map(in_cell, names)
    types = of_types(changes)
    shown = [each for each in changes if each not in types]
    heads = ["set", *(["file"] if files else []), "groups", "edit types", "fell", f"NLL {first}", f"NLL {last}"]
    sets = [f"| {' | '.join(heads)} |", f"|{'---|' * (2 if files else 1)}---:|---|---|---:|---:|"]
    for name, of_set in groupby(shown, lambda each: each.set):
        each, *others = of_set
        of_type = dict[str, str]()
        for row in (row for row in types if row.set == name):
            of_type[row.edit] = min(of_type.get(row.edit, "unchanged"), row.verdict, key=_VERDICTS.index)
        verdicts = Counter(of_type.values())
        counts = [f"{verdicts[kind]} {'with ' * (kind == _TOO_FEW)}{kind}" for kind in _VERDICTS if verdicts[kind]]
        fell = [f"{row.metric} {row.before:.1f} -> {row.after:.1f}" for row in (each, *others) if round(row.difference, 1) < 0]
        nll = ["" if value is None else f"{value:.2f}" for value in (each.nll_before, each.nll_after)]
        cells = [name, *([plain(files[name])] if files else []), _counted(each)]
        cells += [", ".join(counts) or each.verdict, ", ".join(fell) or "none", *nll]
        sets.append(f"| {' | '.join(cells)} |")
    notes = [f"{metric}: {MEANINGS[metric]}" for metric in dict.fromkeys(each.metric for each in changes)]
    if any(each.metric == "group" for each in changes):
        missing = ", ".join(metric for metric in MEANINGS if metric not in COMPARED)
        notes.append(f"{missing}: not compared; `cfvlm-ds evaluate` gives them for one model")
    if any(each.edit == MEAN for each in changes):
        notes.append(
            f"{MEAN}: unweighted, over the types that have the metric (group and image_pair need edited pictures), so a type with few "
            "groups counts as much as one with many"
        )
    notes.append(
        "edit types: worse or better if an interval excludes 0 (worse if one metric fell and one rose), otherwise too few to tell if there "
        f"are fewer than {FEWEST_GROUPS} groups, otherwise unchanged if no group changed, or not resolved"
    )
    notes.append(
        "fell: metrics of the second table that are lower than before; a single edit type has a row for the metric with the most groups "
        "and, if another fell more, for the one that fell most"
    )
    if any(each.blank is not None for each in changes):
        notes.append(
            f"blank image: the same metric of the same groups ({first} -> {last}) if a blank image replaces the pictures; far above 50 %, "
            "the texts alone reveal which is true; far below 50 %, the model prefers the false texts if it sees nothing; with few groups, "
            "it may differ from 50 % by chance. pair is always 50 % here if every text is true of one picture and false of another: see "
            "factual. If this rises as much as the result, the model has learned from the texts, not from the pictures. If a result is "
            "lower than this, the pictures mislead the model more often than they help, or the groups are few"
        )
    if any(each.nll_after is not None for each in changes):
        notes.append(
            "NLL: negative log-likelihood of the true texts in nats per token, including the end-of-turn token; if it rises, true texts "
            "have become less likely"
        )
        if vocabulary:
            guess = f"{math.log(vocabulary):.2f} (ln of the vocabulary's {vocabulary:,} tokens)"
            notes.append(f"NLL of uniform guessing: {guess}; above it, the texts are less likely than random tokens")
    notes.append(
        "difference [95 % interval]: paired by group. Groups +, -: groups that got better and worse; in a mean, a group with several edit "
        "types counts once, by the sum of its changes, each divided by the type's comparisons. There is no interval if fewer than "
        f"{FEWEST_CHANGED} groups changed, if all changed alike, or if an edit type has one group"
    )
    if any(each.groups < each.of for each in changes):
        notes.append("groups, as N of M: only N allow this metric and were measured both times")
    return "\n".join([*sets, "", rows_table(shown, names, plain), "", *(f"- {note}" for note in notes)])


def _counted(change: Change) -> str:
    return f"{change.groups} of {change.of}" if change.groups < change.of else f"{change.groups}"


def rows_table(changes: Sequence[Change], names: tuple[str, str] = ("before", "after"), plain: Callable[[str], str] = in_cell) -> str:
    """Return the rows as a Markdown table."""
    first, last = map(in_cell, names)
    lines = [
        f"| set | edit type | groups | metric | {first}, % | {last}, % | blank image, % | difference, points | groups +, - |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for each in changes:
        difference = f"{each.difference:+.1f}" + ("" if each.low is None else f" [{each.low:+.1f}, {each.high:+.1f}]")
        blanks = [f"{value:.1f}" for value in (each.blank_before, each.blank) if value is not None]
        difference = each.verdict if each.verdict == "unchanged" else difference + f", {_TOO_FEW}" * (each.verdict == _TOO_FEW)
        lines.append(
            f"| {each.set} | {plain(each.edit)} | {_counted(each)} | {each.metric} | {each.before:.1f} | {each.after:.1f} "
            f"| {' -> '.join(blanks)} | {difference} | +{each.better} -{each.worse} |"
        )
    return "\n".join(lines)


def is_results(path: Path) -> bool:
    """Return True for a run folder or an accuracies file, and False for a folder of benchmark results. Raises ConfigError otherwise."""
    if path.is_file() or (path / "config.yaml").is_file():
        return True
    if not any(path.glob("*/*/results.json")):
        what = "a run folder, a file of `cfvlm-ds evaluate --out`, or a folder of `cfvlm-ds evaluate --benchmarks`"
        raise ConfigError(f"{path} contains no results; give {what} (a run's results.md already compares it with its own base model)")
    return False


def read_accuracies(path: Path) -> dict[str, list[Accuracy]]:
    """Read accuracies, keyed by evaluation set, from a run folder or a file written by ``cfvlm-ds evaluate --out``. Raises DataError if
    they are missing or invalid.
    """
    file = path if path.is_file() else path / "results.json"
    if not file.is_file():
        raise DataError(
            f"{path} has no results.json: the run has not finished; let it finish, or evaluate it with `cfvlm-ds evaluate {path} ...`"
        )
    try:
        return {name: [Accuracy(**row) for row in rows] for name, rows in read_json(file).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: not a file of accuracies ({error}); write it with `cfvlm-ds evaluate --out`") from error


def compare_results(before: Path, after: Sequence[Path], say: Say) -> dict[str, list[Change]]:
    """Compare each result in ``after`` with ``before``. If there are several, also compare their mean with it. Return the changes, keyed by
    result.

    Raises DataError for a file without accuracies, and ConfigError if a result has no group in common with ``before``.
    """
    first, others = read_accuracies(before), {str(path): read_accuracies(path) for path in after}
    for label, results in others.items():
        if len(first) == len(results) == 1:  # a single set is compared even if its names differ
            others[label] = {next(iter(first)): next(iter(results.values()))}
    compared = {}
    if len(others) > 1:
        shared = [name for name in first if all(results.get(name) for results in others.values())]
        others[f"mean of {len(others)}"] = {name: mean_accuracies([results[name] for results in others.values()]) for name in shared}
    for label, results in others.items():
        for path, one, other in ((before, first, results), (label, results, first)):
            if unmatched := [name for name in one if name not in other]:
                say(f"not compared, because only {path} has them: {', '.join(unmatched)}")
        by_set = {name: compare_accuracies(name, rows, results[name]) for name, rows in first.items() if name in results}
        if without := [name for name, changes in by_set.items() if not changes]:
            say(f"not compared, because {before} and {label} have no group with the same content: {', '.join(without)}")
        changes = [change for of_set in by_set.values() for change in of_set]
        if not changes:
            raise ConfigError(
                f"{before} ({', '.join(first)}) and {label} ({', '.join(results)}) have no group in common (same id, texts, truth "
                "table, edits and picture names); compare results on the same sets, evaluated by this version"
            )
        compared[label] = changes
    return compared


def comparison_tables(before: Path, compared: Mapping[str, Sequence[Change]]) -> str:
    """Return Markdown tables of the changes that ``compare_results`` returned."""
    tables = list[str]()
    for label, changes in compared.items():
        tables.append(changes_table(changes, (str(before), label)))
        tables += ["By edit type:", rows_table(types, (str(before), label))] if (types := of_types(changes)) else []
    note = ["The interval of a mean accounts for the choice of groups, not for that of seeds."] * (len(compared) > 1)
    return "\n\n".join([*tables, *note])


def mean_accuracies(runs: Sequence[Sequence[Accuracy]]) -> list[Accuracy]:
    """Average several runs' accuracies for ``compare_accuracies``, using only the groups that all runs evaluated."""
    tables = [_by_group(rows) for rows in runs]
    shared = [key for key in tables[0] if all(key in table for table in tables)]

    def mean(key: _Key, metric: str, edit: str) -> list[float]:
        return [sum(table[key][metric][edit][0] for table in tables) / len(tables), tables[0][key][metric][edit][1]]

    nll = [rows[-1].nll for rows in runs]
    mean_row = replace(
        runs[0][-1],
        nll=None if None in nll else sum(nll) / len(nll),  # type: ignore[arg-type]
        by_group=[
            [
                *key,
                {
                    metric: {edit: mean(key, metric, edit) for edit in edits}
                    for metric, edits in tables[0][key].items()
                    if all(metric in table[key] for table in tables)
                },
            ]
            for key in shared
        ],
    )
    return [mean_row]
