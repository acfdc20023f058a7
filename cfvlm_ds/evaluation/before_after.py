"""Before and after: accuracies of one set of groups under two models, with intervals of the differences paired by group."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.text import in_cell
from cfvlm_ds.evaluation.metrics import CHANCE, accuracies, points_by_edit
from cfvlm_ds.evaluation.report import headline_metric
from cfvlm_ds.evaluation.scoring import GroupScores

FEWEST_GROUPS = 30
"""Groups below which a difference has no interval: the normal approximation would be too narrow."""
_MEANINGS = {
    "group": "group: each of two pictures prefers its own text, and each text its own picture",
    "pair": "pair: a picture prefers a true text to a false one",
    "image_pair": "image_pair: a text prefers a picture that shows it to one that does not",
}


@dataclass(frozen=True)
class Change:
    """A row of the table: an edit type of a set, or the mean over edit types (``edit`` is "all"). Accuracies are in %.

    ``language`` is the accuracy of ``pair`` with a blank image after the training, None without such comparisons. ``half_width`` is half of
    the 95 % interval of ``after - before``, None below ``FEWEST_GROUPS`` groups. ``of`` counts the groups of the set, of which ``groups``
    were scored before and after.
    """

    set: str
    edit: str
    groups: int
    of: int
    metric: str
    chance: float
    language: float | None
    before: float
    after: float
    half_width: float | None


def compare_scores(
    name: str, of: int, groups: Sequence[CounterfactualGroup], before: Sequence[GroupScores], after: Sequence[GroupScores]
) -> Iterator[Change]:
    """Yield a row for each edit type, and last one for their mean.

    An accuracy is the ratio of two sums over groups, comparisons won and made, and the mean row averages such ratios. The interval is
    1.96 standard errors of the difference, by the delta method, with groups as independent units.
    """
    was, now = accuracies(groups, before), accuracies(groups, after)
    if (metric := headline_metric(now)) is None:
        return
    gained = defaultdict[str, dict[int, tuple[float, int]]](dict)  # edit -> place of the group -> comparisons won more, comparisons
    for place, (group, old, new) in enumerate(zip(groups, before, after, strict=True)):
        earlier = points_by_edit(group, old, metric)
        for edit, (won, made) in points_by_edit(group, new, metric).items():
            gained[edit][place] = won - earlier[edit][0], made
    parts = {edit: _influences(of_group) for edit, of_group in gained.items()}
    mean = defaultdict[int, float](float)
    for influences in parts.values():
        for place, value in influences.items():
            mean[place] += value / len(parts)
    for old_row, row in zip(was, now, strict=True):
        if metric in row.metrics:
            yield Change(
                set=name,
                edit=row.name,
                groups=row.groups[metric],
                of=of,
                metric=metric,
                chance=CHANCE[metric],
                language=row.blind.get("pair"),
                before=old_row.metrics[metric],
                after=row.metrics[metric],
                half_width=_half_width((mean if row.mean else parts[row.name]).values()),
            )


def _influences(gained: dict[int, tuple[float, int]]) -> dict[int, float]:
    """Return what each group adds to the error of an edit type's difference, in points."""
    made = sum(count for _, count in gained.values())
    difference = sum(won for won, _ in gained.values()) / made
    return {place: 100 * (won - difference * count) / made for place, (won, count) in gained.items()}


def _half_width(influences: Iterable[float]) -> float | None:
    values = list(influences)
    n = len(values)
    return 1.96 * math.sqrt(n / (n - 1) * sum(value**2 for value in values)) if n >= FEWEST_GROUPS else None


def changes_table(changes: Sequence[Change]) -> str:
    """Return the rows as Markdown, with a line for each definition that they need."""
    lines = [
        "| set | edit | groups | metric | chance | language alone | before | after | difference, 95 % |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for each in changes:
        language = "" if each.language is None else f"{each.language:.1f}"
        width = "" if each.half_width is None else f" ± {each.half_width:.1f}"
        lines.append(
            f"| {each.set} | {in_cell(each.edit)} | {each.groups} | {each.metric} | {each.chance:.1f} | {language} "
            f"| {each.before:.1f} | {each.after:.1f} | {each.after - each.before:+.1f}{width} |"
        )
    notes = [_MEANINGS[metric] for metric in dict.fromkeys(each.metric for each in changes)]
    if any(each.language is not None for each in changes):
        notes.append("language alone: accuracy of `pair` after the training with a blank image, in which only the texts tell; 50 is chance")
    notes.append(f"difference: paired by group, ± 1.96 standard errors; none below {FEWEST_GROUPS} groups")
    for name, of in {each.set: each.of for each in changes}.items():
        if (scored := max(each.groups for each in changes if each.set == name)) < of:
            notes.append(f"{name}: {scored} of {of} groups have a comparison and were scored before the first step")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)])
