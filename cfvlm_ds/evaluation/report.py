"""Markdown tables of accuracies: metrics with their controls, and the number of comparisons behind each metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from cfvlm_ds.core.text import in_cell, one_line
from cfvlm_ds.evaluation.metrics import MEAN, MEANINGS, RANDOM, Accuracy, headline_metric, total_loss

_REASON_CHARS = 200
_MOST_TYPES = 12  # maximum number of edit types in a progress line


def table(splits: Mapping[str, Sequence[Accuracy]], plain: Callable[[str], str] | None = None) -> str:
    """Return a Markdown table of the accuracies, split by split, with control rows for a blank image and for random scores. Metrics that
    are missing from all splits are left out, and so is ``text_pmi``, because ``group_pmi`` includes it.

    A second table counts the groups and comparisons behind each metric, and names a few groups without comparisons for it. A list explains
    the metrics, and names each loss term, or number of its parts, that is not in the loss, with the reason. ``plain`` escapes names from
    the data for a table cell.
    """
    reason = plain or partial(in_cell, most=_REASON_CHARS)
    plain = plain or in_cell
    shown = [metric for metric in MEANINGS if any(metric in row.metrics for rows in splits.values() for row in rows)]
    cells = partial(_cells, shown=shown)
    lines = [f"| {' | '.join(['set', 'edit type', 'groups', *(f'{metric}, %' for metric in shown)])} |"]
    lines.append(f"|---|---|---:|{'---:|' * len(shown)}")
    for split, rows in splits.items():
        for row in rows:
            lines.append(f"| {split} | {plain(MEAN if row.mean else row.name)} | {row.num} | {cells(row.metrics)} |")
        for row in rows[-1:]:
            lines.append(f"| {split} | {MEAN}, blank image | {row.num} | {cells(row.blind)} |")
    lines.append(f"| random scores | | | {cells(RANDOM)} |")
    lines += ["", "| set | metric | groups used | comparisons | unused groups |", "|---|---|---:|---:|---|"]
    notes = [f"- {metric}: {meaning}" for metric, meaning in MEANINGS.items()]
    for split, row in {split: rows[-1] for split, rows in splits.items() if rows}.items():
        metrics_by_counts: dict[tuple[int, int, tuple[str, ...]], list[str]] = {}  # metrics with equal counts share a line
        for metric in (each for each in MEANINGS if each in row.groups):
            key = row.groups[metric], row.comparisons[metric], tuple(row.unused.get(metric, ()))
            metrics_by_counts.setdefault(key, []).append(metric)
        for (groups, comparisons, unused), metrics in metrics_by_counts.items():
            left = row.num - groups
            missing = f"{left}: {', '.join(map(plain, unused))}{', ...' * (left > len(unused))}" * bool(left) if groups else "all"
            lines.append(f"| {split} | {', '.join(metrics)} | {groups} | {comparisons} | {missing} |")
        for name, term in row.losses.items():
            if why := term["lacking"]:
                notes.append(f"- eval/{split}/loss_{name} is not computed: {reason(why)}")
            elif (without := term.get("without")) and total_loss(row.losses) is not None:  # older results.json files lack the entry
                part = f"{without} of the {term['parts']} parts of {name}" if without < term["parts"] else name
                notes.append(f"- eval/{split}/loss does not include {part}: the set has no comparisons for it")
    return "\n".join([*lines, *([""] * bool(notes)), *notes])


def overlap_warning(name: str, shared: str, trained: str) -> str:
    """Return the warning for an evaluation set that has rows or pictures in common with the training set ``trained``."""
    return f"warning: data.evaluation.{name}: {shared} also occur in the training set {trained}, so its results include trained data"


def headline(rows: Sequence[Accuracy]) -> str:
    """Return a progress line with a split's headline metric for each edit type, the mean over edit types, and the NLL."""
    metric, nll = headline_metric(rows), rows[-1].nll if rows else None
    nll_text = "" if nll is None else f"; NLL {nll:.4f} nats per token"
    if metric is None:
        return f"no comparison: no group has a true and a false cell for one image or one text{nll_text}"
    values = [f"{MEAN if row.mean else one_line(row.name, 60)} {row.metrics[metric]:.1f}" for row in rows if metric in row.metrics]
    more = len(values) - _MOST_TYPES
    shown = ", ".join(values if more <= 1 else [*values[: _MOST_TYPES - 1], f"{more} more types", values[-1]])
    used, num = rows[-1].groups[metric], rows[-1].num
    counted = f"{used} of {num} groups" if used < num else f"{num} groups"
    return f"{metric} accuracy {shown} % ({counted}){nll_text}"


def _cells(metrics: Mapping[str, float], shown: Sequence[str]) -> str:
    return " | ".join(f"{metrics[name]:.1f}" if name in metrics else "" for name in shown)
