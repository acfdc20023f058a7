"""Accuracies over the comparisons of groups: Winoground's text, image and group score (arXiv 2204.03162), and single comparisons.

S is the log-likelihood of a text on an image. Two images i, j and two texts c, d of one prompt, each text true of its own image only (see
Comparison), are right in

- text: each image prefers its own text, S_ic > S_id and S_jd > S_jc;
- image: each text prefers its own image, S_ic > S_jc and S_jd > S_id;
- group: both.

``pair`` is the share of single text comparisons won (one image, a true text against a false one of the same prompt), ``factual`` of those
on the factual image, ``image_pair`` of single image comparisons (one text, an image it is true of against one it is false of). ``sham`` is
the share of sham images that beat a counterfactual image on the factual text: a detector of edited pictures fails it. A tie is wrong.

Text comparisons are exposed to the texts' prior likelihood; ``text_pmi`` and ``group_pmi`` subtract it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.sequences import Lazy
from cfvlm_ds.evaluation.comparisons import Kind, comparisons
from cfvlm_ds.evaluation.loss import NAMED
from cfvlm_ds.evaluation.scoring import GroupScores

CHANCE = {
    "text": 25.0,
    "image": 25.0,
    "group": 100 / 6,
    "pair": 50.0,
    "image_pair": 50.0,
    "factual": 50.0,
    "text_pmi": 25.0,
    "group_pmi": 100 / 6,
    "sham": 50.0,
}
"""Accuracy of scores drawn at random, in %."""

METRICS = tuple(CHANCE)
SHUFFLED = ("shuffled_pair", "shuffled_factual")
"""Names for the counts of the shuffled control, which may differ from those of the metrics: a group may have no other picture to show."""
Matrix = list[list[float]]


@dataclass(frozen=True)
class Accuracy:
    """One row of a result table: an edit type, or the mean over edit types (``mean``, named ``all``). Accuracies are in %.

    ``num`` counts the groups of the row; ``comparisons`` and ``groups`` how many of each a metric is made of. In the mean row
    both have all metrics, with the count 0 for one without any comparison in the split, which is then absent from ``metrics``; its
    ``unused`` names a few of the groups that a metric cannot use.

    ``blind`` holds ``pair`` and ``factual`` with one blank image in place of the pictures, ``shuffled`` the same with another group's
    picture: what language alone achieves. A tie counts one half there.

    ``losses`` of the mean row, by term of the objective, are those of the training's loss on this split (cfvlm_ds.evaluation.loss), and
    ``nll`` is the negative log-likelihood of its true texts on their images, in nats per token, end-of-turn included.
    """

    name: str
    num: int
    metrics: dict[str, float]
    blind: dict[str, float] = field(default_factory=dict)
    shuffled: dict[str, float] = field(default_factory=dict)
    comparisons: dict[str, int] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    unused: dict[str, list[str]] = field(default_factory=dict)
    mean: bool = False
    losses: dict[str, dict[str, Any]] = field(default_factory=dict)
    nll: float | None = None


def accuracies(groups: Sequence[CounterfactualGroup], scores: Sequence[GroupScores]) -> list[Accuracy]:
    """One row per edit type, in alphabetical order, and last a row ``all`` whose accuracies are means over edit types."""
    if len(groups) != len(scores):
        raise ValueError(f"{len(groups)} groups and {len(scores)} scores")
    slices: dict[str, _Slice] = {}
    whole = _Slice()
    covered = METRICS + SHUFFLED * any(score.shuffled is not None for score in scores)
    unused: dict[str, list[str]] = {metric: [] for metric in covered}
    for group, score in zip(groups, scores, strict=True):
        named, measured = set[str](), set[str]()
        for labels, outcome in _outcomes(group, score):
            for label in labels:
                slices.setdefault(label, _Slice()).add(outcome)
            whole.add(outcome)
            named.update(labels)
            measured.update(outcome.metrics)
        for each in (whole, *(slices[label] for label in named)):
            each.next_group()
        for metric in set(covered) - measured:
            if len(unused[metric]) < NAMED:
                unused[metric].append(group.id)
    rows = [slices[label].row(label) for label in sorted(slices)]
    if groups:
        everything = Accuracy(
            "all",
            len(groups),
            _means([row.metrics for row in rows]),
            _means([row.blind for row in rows]),
            _means([row.shuffled for row in rows]),
            comparisons={metric: whole.comparisons.get(metric, 0) for metric in covered},
            groups={metric: whole.groups.get(metric, 0) for metric in covered},
            unused={metric: names for metric, names in unused.items() if names},
            mean=True,
        )
        rows.append(everything)
    return rows


@dataclass(frozen=True)
class _Outcome:
    """What one comparison adds to each metric it belongs to: 1 where it is won, 0, or 1/2 for a tie without pictures."""

    won: dict[str, float]
    blind: dict[str, float]
    shuffled: dict[str, float]

    @property
    def metrics(self) -> list[str]:
        return [*self.won, *(f"shuffled_{metric}" for metric in self.shuffled)]


def _outcomes(group: CounterfactualGroup, score: GroupScores) -> Iterable[tuple[tuple[str, ...], _Outcome]]:
    logp, debiased = score.logp.tolist(), (score.logp - score.blank).tolist()
    blank = score.blank.tolist()
    shuffled = None if score.shuffled is None or not len(score.shuffled) else score.shuffled.tolist()
    for each in comparisons(group):
        won = {name: float(rule(logp, debiased, *each.at)) for name, rule in _RULES[each.kind].items()}
        language: dict[str, float] = {}
        other: dict[str, float] = {}
        if each.kind == "text":
            i, c, d = each.at
            if i == 0:
                won["factual"] = won["pair"]
            language = dict.fromkeys(won, (blank[c] > blank[d]) + (blank[c] == blank[d]) / 2)
            if shuffled is not None:
                other = dict.fromkeys(won, (shuffled[c] > shuffled[d]) + (shuffled[c] == shuffled[d]) / 2)
        yield each.labels, _Outcome(won, language, other)


def _text(s: Matrix, i: int, j: int, c: int, d: int) -> bool:
    return s[i][c] > s[i][d] and s[j][d] > s[j][c]


def _image(s: Matrix, i: int, j: int, c: int, d: int) -> bool:
    return s[i][c] > s[j][c] and s[j][d] > s[i][d]


_RULES: Mapping[Kind, Mapping[str, Callable[..., bool]]] = {
    "quad": {
        "text": lambda s, _, *at: _text(s, *at),
        "image": lambda s, _, *at: _image(s, *at),
        "group": lambda s, _, *at: _text(s, *at) and _image(s, *at),
        "text_pmi": lambda _, s, *at: _text(s, *at),
        "group_pmi": lambda _, s, *at: _text(s, *at) and _image(s, *at),
    },
    "text": {"pair": lambda s, _, i, c, d: s[i][c] > s[i][d]},
    "image": {"image_pair": lambda s, _, c, i, j: s[i][c] > s[j][c]},
    "sham": {"sham": lambda s, _, c, i, j: s[i][c] > s[j][c]},
}


class _Slice:
    """Sums over the comparisons of one edit type, or of all."""

    def __init__(self) -> None:
        self.sums: tuple[dict[str, float], ...] = ({}, {}, {})
        self.counts: tuple[dict[str, int], ...] = ({}, {}, {})  # won, blind, shuffled
        self.groups: dict[str, int] = {}
        self.num = 0
        self._of_group: set[str] = set()

    @property
    def comparisons(self) -> dict[str, int]:
        return self.counts[0] | {f"shuffled_{metric}": count for metric, count in self.counts[2].items()}

    def add(self, outcome: _Outcome) -> None:
        for values, sums, counts in zip((outcome.won, outcome.blind, outcome.shuffled), self.sums, self.counts, strict=True):
            for metric, value in values.items():
                sums[metric] = sums.get(metric, 0.0) + value
                counts[metric] = counts.get(metric, 0) + 1
        self._of_group.update(outcome.metrics)

    def next_group(self) -> None:
        for metric in self._of_group:
            self.groups[metric] = self.groups.get(metric, 0) + 1
        self.num += bool(self._of_group)
        self._of_group = set()

    def row(self, name: str) -> Accuracy:
        metrics, blind, shuffled = (
            {metric: 100 * sums[metric] / counts[metric] for metric in METRICS if metric in sums}
            for sums, counts in zip(self.sums, self.counts, strict=True)
        )
        made, used = ({metric: of[metric] for metric in METRICS + SHUFFLED if metric in of} for of in (self.comparisons, self.groups))
        return Accuracy(name, self.num, metrics, blind, shuffled, made, used)


def flat_metrics(splits: Mapping[str, Sequence[Accuracy]]) -> dict[str, float]:
    """The accuracies under the names metrics are logged by: eval/SPLIT/METRIC for the mean, eval/SPLIT/EDIT/METRIC by edit type.

    The training's loss is eval/SPLIT/loss, its terms eval/SPLIT/loss_TERM; eval/SPLIT/nll is the NLL of true texts per token.
    """
    flat = {}
    for split, rows in splits.items():
        for row in rows:
            prefix = f"eval/{split}" if row.mean else f"eval/{split}/{row.name}"
            flat.update({f"{prefix}/{metric}": value for metric, value in row.metrics.items()})
            if row.mean:
                flat.update({f"{prefix}/blind_{metric}": value for metric, value in row.blind.items()})
                flat.update({f"{prefix}/shuffled_{metric}": value for metric, value in row.shuffled.items()})
                flat.update({f"{prefix}/loss_{name}": term["value"] for name, term in row.losses.items() if term["value"] is not None})
                if (whole := total_loss(row.losses)) is not None:
                    flat[f"{prefix}/loss"] = whole
                if row.nll is not None:
                    flat[f"{prefix}/nll"] = row.nll
    return flat


def total_loss(losses: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The weighted sum of the terms; None where one of them could not be computed, or no group has anything for any."""
    found = [(term["weight"], term["value"]) for term in losses.values() if term["value"] is not None]
    return None if not found or any(term["lacking"] for term in losses.values()) else sum(weight * value for weight, value in found)


def metric_names(splits: Mapping[str, Sequence[CounterfactualGroup]]) -> set[str]:
    """The names that ``flat_metrics`` will have for an evaluation of these splits during training: known from the data alone."""

    def tied(group: CounterfactualGroup) -> GroupScores:
        return GroupScores(torch.zeros(len(group.images), len(group.candidates)), torch.zeros(len(group.candidates)))

    def scored(groups: Sequence[CounterfactualGroup]) -> Sequence[GroupScores]:
        return Lazy(lambda index: tied(groups[index]), len(groups))

    return set(flat_metrics({name: accuracies(groups, scored(groups)) for name, groups in splits.items()}))


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each metric's mean over the rows that have it."""
    values = {metric: [row[metric] for row in rows if metric in row] for metric in METRICS}
    return {metric: sum(found) / len(found) for metric, found in values.items() if found}
