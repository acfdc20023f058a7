"""Winoground's text, image and group score (arXiv 2204.03162) over counterfactual pairs, with chance, blind and sham rows.

For an anchor (I_0, T_0) and a counterfactual (I_k, T_k), with S the log-likelihood of a text on an image:

- text: on both images the own text beats the other, S_00 > S_0k and S_kk > S_k0;
- image: both texts prefer their own image, S_00 > S_k0 and S_kk > S_0k;
- group: both. A tie is wrong.

A coin scores 25 / 25 / 16.7 %. Text and group are exposed to the texts' prior likelihood; ``text_pmi`` and ``group_pmi`` subtract it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from cfvlm_ds.evaluation.scoring import GroupScores
from cfvlm_ds.groups import SHAM, CounterfactualGroup

CHANCE = {"text": 25.0, "image": 25.0, "group": 100 / 6, "pair": 50.0, "text_pmi": 25.0, "group_pmi": 100 / 6, "sham": 50.0}
"""Accuracy of scores drawn at random, in %."""

METRICS = tuple(CHANCE)


@dataclass(frozen=True)
class Accuracy:
    """One row of a result table. Accuracies are in %; ``pair`` is the share of single text comparisons won; ``num`` counts pairs.

    ``blind`` holds the same metrics with every image replaced by one blank image: what language statistics alone achieve. ``sham`` in
    ``metrics`` is the share of sham images that beat the counterfactual image on the factual text: a detector of edited pictures fails it.
    """

    name: str
    num: int
    metrics: dict[str, float]
    blind: dict[str, float]


def accuracies(groups: Sequence[CounterfactualGroup], scores: Sequence[GroupScores]) -> list[Accuracy]:
    """One row per edit type, in alphabetical order, and last a row ``all`` whose accuracies are means over edit types."""
    seen: dict[str, list[dict[str, float]]] = {}
    blind: dict[str, list[dict[str, float]]] = {}
    for group, score in zip(groups, scores, strict=True):
        shams = [edit.image for edit in group.edits if edit.type == SHAM and edit.image is not None]
        for edit in group.edits:
            if edit.image is not None and edit.text is not None:
                row = _pair(score.logp, score.blank, edit.image, edit.text)
                row |= {"sham": _mean([float(score.logp[s, 0] > score.logp[edit.image, 0]) for s in shams])} if shams else {}
                seen.setdefault(edit.type, []).append(row)
                empty = score.blank.expand_as(score.logp)
                blind.setdefault(edit.type, []).append(_pair(empty, score.blank, edit.image, edit.text))
    rows = [Accuracy(kind, len(seen[kind]), _percent(seen[kind]), _percent(blind[kind])) for kind in sorted(seen)]
    if rows:
        everything = Accuracy(
            "all",
            sum(row.num for row in rows),
            {m: _mean([row.metrics[m] for row in rows if m in row.metrics]) for m in METRICS if any(m in row.metrics for row in rows)},
            {m: _mean([row.blind[m] for row in rows]) for m in rows[0].blind},
        )
        rows.append(everything)
    return rows


def _pair(logp: Tensor, blank: Tensor, i: int, c: int) -> dict[str, float]:
    debiased = logp - blank
    return {
        "text": float(logp[0, 0] > logp[0, c] and logp[i, c] > logp[i, 0]),
        "image": float(logp[0, 0] > logp[i, 0] and logp[i, c] > logp[0, c]),
        "group": float(_group(logp, i, c)),
        "pair": (float(logp[0, 0] > logp[0, c]) + float(logp[i, c] > logp[i, 0])) / 2,
        "text_pmi": float(debiased[0, 0] > debiased[0, c] and debiased[i, c] > debiased[i, 0]),
        "group_pmi": float(_group(debiased, i, c)),
    }


def _group(s: Tensor, i: int, c: int) -> bool:
    return bool(s[0, 0] > s[0, c] and s[i, c] > s[i, 0] and s[0, 0] > s[i, 0] and s[i, c] > s[0, c])


def _percent(rows: list[dict[str, float]]) -> dict[str, float]:
    names = [name for name in METRICS if any(name in row for row in rows)]
    return {name: 100 * _mean([row[name] for row in rows if name in row]) for name in names}


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def table(splits: dict[str, list[Accuracy]]) -> str:
    """The accuracies as a Markdown table, a block per split, with chance and blind rows."""
    shown = ("text", "image", "group", "group_pmi", "pair", "sham")
    lines = [f"| split | edit | pairs | {' | '.join(shown)} |", f"|---|---|---:|{'---:|' * len(shown)}"]
    for split, rows in splits.items():
        for row in rows:
            lines.append(f"| {split} | {row.name} | {row.num} | {_cells(row.metrics, shown)} |")
        if rows:
            lines.append(f"| {split} | all, blank image | {rows[-1].num} | {_cells(rows[-1].blind, shown)} |")
    lines.append(f"| chance | | | {_cells(CHANCE, shown)} |")
    return "\n".join(lines)


def _cells(metrics: dict[str, float], shown: Sequence[str]) -> str:
    return " | ".join(f"{metrics[name]:.1f}" if name in metrics else "" for name in shown)
