"""Metrics of texts about scenes: how much of what a model writes is false, and how much of a scene it mentions.

``hallucinated`` is the share of false statements, ``chair_i`` the share of mentioned things that are absent and ``chair_s`` the share of
texts that mention an absent thing (CHAIR, arXiv 1809.02156). ``covered`` is the share of the scenes' things that are mentioned, without
which the other metrics say little, because an empty text has no false statement. ``unparsed`` is the share of sentences that the grammar
does not produce.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cfvlm_ds.demo.habits.grammar import Verdict
from cfvlm_ds.evaluation.benchmarks.base import Values
from cfvlm_ds.evaluation.suite.bootstrap import FEWEST_DRAWN, Bootstrap, Interval, draws_for, intervals


@dataclass(frozen=True)
class Written:
    """The verdict on a text, the picture that it is about, and whether the picture "agrees" with all habits or "contradicts" one."""

    verdict: Verdict
    picture: str
    habit: str


def writing(texts: Sequence[Written]) -> Values:
    """Return the metrics in %, for all texts and, as METRIC/HABIT, by habit. A share of nothing is omitted."""
    values = _shares([text.verdict for text in texts])
    for habit in dict.fromkeys(text.habit for text in texts):
        part = _shares([text.verdict for text in texts if text.habit == habit])
        values |= {f"{name}/{habit}": value for name, value in part.items()}
    return values


def writing_intervals(texts: Sequence[Written], draws: int | None = None) -> dict[str, Interval]:
    """Return the 95 % intervals of the metrics from a bootstrap over pictures, or {} for too few pictures."""
    bootstrap = Bootstrap([text.picture for text in texts])
    if bootstrap.clusters < FEWEST_DRAWN:
        return {}
    number = draws_for(len(texts)) if draws is None else draws
    return intervals([writing([texts[i] for i, _ in bootstrap.draw(k)]) for k in range(number)])


def _shares(verdicts: Sequence[Verdict]) -> Values:
    counts = {
        "hallucinated": [(sum(not true for true in each.statements.values()), len(each.statements)) for each in verdicts],
        "chair_i": [(len(each.mentioned - each.present), len(each.mentioned)) for each in verdicts],
        "chair_s": [(int(not each.mentioned <= each.present), 1) for each in verdicts],
        "covered": [(len(each.mentioned & each.present), len(each.present)) for each in verdicts],
        "unparsed": [(len(each.unparsed), each.sentences) for each in verdicts],
    }
    totals = {name: (sum(part for part, _ in pairs), sum(whole for _, whole in pairs)) for name, pairs in counts.items()}
    return {name: 100 * part / whole for name, (part, whole) in totals.items() if whole}
