"""Markdown tables of benchmark results, with the language prior and random scores as controls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cfvlm_ds.core.text import few, in_cell, one_line
from cfvlm_ds.evaluation.benchmarks.base import Values, clusters_of
from cfvlm_ds.evaluation.suite.bootstrap import FEWEST_DRAWN
from cfvlm_ds.evaluation.suite.results import Result

TABLES = {"blank": "blank image", "random": "random scores"}
"""Name of a control table -> column heading."""
_WITHOUT_IMAGES = ("accuracy", "pair", "text")
"""Metrics shown for a blank image if the headline metric compares images and is therefore undefined there."""
HEADING = "# Results"
INTERVALS = (
    "95 %: percentile interval of a bootstrap over clusters (pictures, pairs). No interval is given if there are fewer than "
    f"{FEWEST_DRAWN} clusters, for which it would be too narrow, if all draws give the same value, or if a draw gives no value."
)
_NAMED = 20


def overview(results: Sequence[Result]) -> str:
    """Return a table of each result's headline metrics, and a note on the intervals."""
    shown = [name for name in TABLES if any(name in result.metrics for result in results)]
    lines = [
        f"| benchmark | probe | items | clusters | metric | value | 95 % | {' | '.join(TABLES[name] for name in shown)} |",
        f"|---|---|---:|---:|---|---:|---|{'---:|' * len(shown)}",
    ]
    for result in results:
        counts = f"{len(result.outcomes)} | {len(clusters_of(outcome.item for outcome in result.outcomes))}"
        for metric in result.headlines:
            values = [number(result.metrics.get(name, {}).get(metric)) for name in shown]
            value, span = number(result.metrics["seen"].get(metric)), between(result.record["intervals"].get(metric))
            start = f"| {in_cell(result.shown)} | {in_cell(result.label)} | {counts} | {in_cell(metric)} |"
            lines.append(f"{start} {value} | {span} | {' | '.join(values)} |")
    return "\n".join([*lines, "", INTERVALS])


def summary(result: Result) -> str:
    """Return a line with the number of points by which the model exceeds random scores, with the items' images and with a blank image. For
    a benchmark with two headline metrics, return a line with the values of both instead.
    """
    seen, blank, random = (result.metrics.get(name, {}) for name in ("seen", "blank", "random"))
    if len(result.headlines) > 1:
        both = [" and ".join(f"{name} {number(table[name])}" for name in result.headlines) for table in (seen, blank)]
        return f"{result.place}: {both[0]}; with a blank image {both[1]}"
    shared = [name for name in (result.headlines[0], *_WITHOUT_IMAGES) if name in seen and name in blank and name in random]
    if not shared:
        return f"{result.place}: none of its metrics has a value for a blank image"
    metric = shared[0]
    seen_over, blank_over = seen[metric] - random[metric], blank[metric] - random[metric]
    if seen_over <= 0:
        return f"{result.place}: no points above random scores ({metric} {seen[metric]:.1f}, random scores {random[metric]:.1f})"
    if blank_over > seen_over:
        return f"{result.place}: {seen_over:.1f} points above random scores, but {blank_over:.1f} with a blank image ({metric})"
    return (
        f"{result.place}: {seen_over:.1f} points above random scores, {max(blank_over, 0.0):.1f} of them also with a blank image ({metric})"
    )


def omissions(result: Result) -> list[str]:
    """Return up to two lines: one about items that were left out, and one about items that count as wrong because their scores are not
    finite.
    """
    left_out, broken = result.record["left_out"], result.record["not_finite"]
    notes = []
    if left_out:
        notes.append(f"{result.place}: {len(left_out)} items left out, first: {one_line(left_out[0][1], 300)}")
    if broken:
        notes.append(f"{result.place}: scores of {len(broken)} items are not finite and count as wrong: {few(broken)}")
    return notes


def markdown(results: Sequence[Result]) -> str:
    """Return the text of results.md."""
    parts = [HEADING, overview(results), "\n".join(f"- {summary(result)}" for result in results)]
    return "\n\n".join([*parts, *(part for result in results for part in _section(result))])


def _section(result: Result) -> list[str]:
    record = result.record
    facts = [
        f"- model: {in_cell(record['model']['name'], 300)}",
        f"- probe: `{in_cell(result.label)}`; prompt: `{one_line(record['prompt'], 400).replace('`', chr(39))}`",
        f"- items: {len(result.outcomes)} of {record['items']['in files']}",
        *(f"- {in_cell(note, 300)}" for note in record["notes"]),
        *[f"- unofficial: {in_cell(record['unofficial'], 300)}"] * bool(record["unofficial"]),
    ]
    shown, spans = [name for name in TABLES if name in result.metrics], record["intervals"]
    lines = [f"| metric | value | 95 % | {' | '.join(TABLES[name] for name in shown)} |", f"|---|---:|---|{'---:|' * len(shown)}"]
    for metric, value in result.metrics["seen"].items():
        controls = " | ".join(number(result.metrics[name].get(metric)) for name in shown)
        lines.append(f"| {in_cell(metric)} | {number(value)} | {between(spans.get(metric))} | {controls} |")
    heading = f"## {in_cell(record['title'])} ({in_cell(result.label)})"
    parts = [heading, "\n".join(facts), "\n".join(lines)]
    if left_out := record["left_out"]:
        reasons = [f"- {in_cell(reason, 300)}" for _, reason in left_out[:_NAMED]]
        more = [f"- and {len(left_out) - _NAMED} more, in results.json"] * (len(left_out) > _NAMED)
        parts.append("\n".join([f"{len(left_out)} items left out:", "", *reasons, *more]))
    return parts


def logged(name: str, tables: Mapping[str, Values]) -> dict[str, float]:
    """Return the metrics keyed by logged name: eval/NAME/METRIC and, on a blank image, eval/NAME/blind_METRIC. Undefined metrics are left
    out.
    """
    prefixes = {"seen": "", "blank": "blind_"}
    return {
        f"eval/{name}/{prefix}{metric}": value
        for table, prefix in prefixes.items()
        for metric, value in tables.get(table, {}).items()
        if not math.isnan(value)
    }


def number(value: float | None, sign: str = "") -> str:
    """Format a value for a table cell, always with a sign if ``sign`` is "+". None gives an empty cell."""
    return "" if value is None else "\N{EN DASH} (undefined)" if math.isnan(value) else f"{value:{sign}.1f}"


def between(span: Sequence[float] | None) -> str:
    """Format an interval for a table cell. None gives an empty cell."""
    return "" if span is None else f"{span[0]:.1f} to {span[1]:.1f}"
