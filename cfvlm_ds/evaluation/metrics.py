"""Accuracies over group comparisons: Winoground's text, image and group scores (arXiv 2204.03162), and shares of comparisons won.

S_ic is the log-likelihood of text c on image i. Take two images i and j and two texts c and d of one prompt, where c is true only of i, and
d is true only of j (see ``Comparison``). The model wins

- text, if it prefers the right text for each image: S_ic > S_id and S_jd > S_jc;
- image, if it prefers the right image for each text: S_ic > S_jc and S_jd > S_id;
- group, if it wins both.

The other metrics are shares of two-cell comparisons that are won:

- pair: on one image, a true text must beat a false text of the same prompt;
- factual: the same, on the factual image only;
- image_pair: for one text, an image for which it is true must beat an image for which it is false;
- sham: for the factual text, a sham image must beat a counterfactual image. A model that merely detects edited pictures loses.

A tie counts as a loss. Text comparisons depend on the texts' prior likelihood; ``text_pmi`` and ``group_pmi`` subtract it.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cfvlm_ds.core.groups import CounterfactualGroup, Groups
from cfvlm_ds.core.sequences import Lazy
from cfvlm_ds.core.text import hashed
from cfvlm_ds.evaluation.comparisons import comparisons
from cfvlm_ds.evaluation.scoring import GroupScores

RANDOM = {
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
"""Accuracy of random scores, in %."""

METRICS = tuple(RANDOM)
HEADLINES = ("group", "pair", "image_pair")
"""Metrics that can summarise a split in one number, in order of preference."""
COMPARED = (*HEADLINES, "factual", "sham")
"""Metrics that are compared before and after training. ``text`` and ``image`` are omitted because ``group`` requires both."""
MEANINGS = {
    "text": "each of two pictures prefers its own text; random scores give 25 %",
    "image": "each of two texts prefers its own picture; random scores give 25 %",
    "group": "each of two pictures prefers its own text, and each text its own picture; random scores give 16.7 %, one answer for every "
    "picture 0 %",
    "group_pmi": "group, after the score of each text on a blank image is subtracted",
    "pair": "a picture prefers a true text to a false one; random scores give 50 %",
    "image_pair": "a text prefers a picture that it is true of to one that it is false of; random scores give 50 %, scores that ignore the "
    "picture 0 %",
    "factual": "pair, on the first picture only",
    "sham": "the first text prefers its scene, rendered again, to an edited picture; random scores give 50 %",
}
"""Explanations of the metrics that tables show."""
MEAN = "mean of edit types"
"""Table label of the mean row, in which every edit type has equal weight."""
NAMED = 5
"""Maximum number of groups without a comparison that are listed per metric."""
Matrix = list[list[float]]


@dataclass(frozen=True)
class Accuracy:
    """One row of a result table: an edit type, or the mean over edit types (``mean`` is True, ``name`` is ``all``). Accuracies are in %.

    ``num`` is the row's number of groups. ``comparisons`` and ``groups`` are the numbers of comparisons and groups from which each metric
    is computed. The mean row contains these counts for all metrics: a metric without comparisons in the split has a count of 0 and is
    absent from ``metrics``.

    ``blind`` holds ``pair`` and ``factual`` on a blank image. They measure the language prior and count a tie as one half.

    Four fields are used only in the mean row. ``unused`` names, for each metric, a few groups that have no comparison for it. ``losses``
    holds the training loss terms on this split (cfvlm_ds.evaluation.loss). ``nll`` is the negative log-likelihood of the split's true texts
    on their images, in nats per token, including end-of-turn tokens. ``by_group`` contains an entry [id, ``content_hash``, results] for
    each group; the results are [points, number of comparisons], keyed by metric and edit type. The metrics are those of ``COMPARED``, and
    ``pair`` and ``factual`` on a blank image (``blind_pair``, ``blind_factual``).
    """

    name: str
    num: int
    metrics: dict[str, float]
    blind: dict[str, float] = field(default_factory=dict)
    comparisons: dict[str, int] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    unused: dict[str, list[str]] = field(default_factory=dict)
    mean: bool = False
    losses: dict[str, dict[str, Any]] = field(default_factory=dict)
    nll: float | None = None
    by_group: list[list[Any]] = field(default_factory=list)


def accuracies(groups: Groups, scores: Sequence[GroupScores]) -> list[Accuracy]:
    """Return one row per edit type in alphabetical order, then the row ``all`` with the means over edit types. Return [] if there are no
    groups.
    """
    sums, counts, used = (defaultdict[str, Counter[str]](Counter) for _ in range(3))  # label -> metric -> points, comparisons, groups
    num = Counter[str]()
    unused: dict[str, list[str]] = {metric: [] for metric in METRICS}
    by_group: list[list[Any]] = []
    for group, score in zip(groups, scores, strict=True):
        measured = defaultdict[str, set[str]](set)
        of_group = defaultdict[str, dict[str, list[float]]](dict)
        for labels, points in _outcomes(group, score):
            for metric, label in itertools.product(points.keys() & _BY_GROUP, labels):
                pair = of_group[metric].setdefault(label, [0.0, 0])
                pair[0], pair[1] = pair[0] + points[metric], pair[1] + 1
            for label in (_ALL, *labels):
                sums[label].update(points)
                counts[label].update(points.keys())
                measured[label] |= points.keys()
        num.update(measured.keys())
        by_group.append([group.id, content_hash(group), dict(of_group)])
        for label, metrics in measured.items():
            used[label].update(metrics)
        for metric in set(METRICS) - measured[_ALL]:
            if len(unused[metric]) < NAMED:
                unused[metric].append(group.shown_name)

    def row(label: str) -> Accuracy:
        percent = {metric: 100 * points / counts[label][metric] for metric, points in sums[label].items()}
        seen, blind = ({metric: percent[each] for metric in METRICS if (each := prefix + metric) in percent} for prefix in ("", "blind_"))
        comparisons_by_metric, of_groups = (
            {metric: of[label][metric] for metric in METRICS if metric in of[label]} for of in (counts, used)
        )
        return Accuracy(label, num[label], seen, blind, comparisons_by_metric, of_groups)

    rows = [row(label) for label in sorted(num) if label != _ALL]
    if groups:
        seen, blind = (_means([getattr(row, name) for row in rows]) for name in ("metrics", "blind"))
        comparisons_by_metric, of_groups = ({metric: of[_ALL][metric] for metric in METRICS} for of in (counts, used))
        rows.append(
            Accuracy(
                "all",
                len(groups),
                seen,
                blind,
                comparisons_by_metric,
                of_groups,
                {name: some for name, some in unused.items() if some},
                mean=True,
                by_group=by_group,
            )
        )
    return rows


def headline_metric(rows: Sequence[Accuracy]) -> str | None:
    """Return the metric that summarises a split: the one of ``HEADLINES`` that is defined for the most groups. Return None if the split has
    no comparison.
    """
    return max(
        (metric for metric in HEADLINES if rows and metric in rows[-1].metrics), key=lambda m: rows[-1].groups.get(m, 0), default=None
    )


def content_hash(group: CounterfactualGroup) -> int:
    """Return a hash of a group's texts, prompts, truth table, edits and picture file names."""
    texts = [[repr(each.prompt), each.text] for each in group.candidates]
    names = [[picture.name for picture in pictures] for pictures in group.images]
    return hashed(json.dumps([texts, group.match, [[each.type, each.image, each.text] for each in group.edits], names]))


_BY_GROUP = {*COMPARED, "blind_pair", "blind_factual"}
_ALL = ""
"""Label that covers all comparisons, used like an edit type."""


def _outcomes(group: CounterfactualGroup, score: GroupScores) -> Iterator[tuple[tuple[str, ...], dict[str, float]]]:
    """For each comparison, yield its edit types and its points by metric: 1 for a win and 0 for a loss. A tie counts as 1/2 on a blank
    image, otherwise as 0.
    """
    matrices = {"": score.logp.tolist(), "_pmi": (score.logp - score.blank).tolist()}
    blank = score.blank.tolist()
    for comparison in comparisons(group):
        if comparison.kind == "quad":
            yield (
                comparison.labels,
                {f"{name}{of}": float(won) for of, s in matrices.items() for name, won in _quad(s, *comparison.at).items()},
            )
            continue
        (i, c), (j, d) = comparison.cells
        points = {_SINGLE[comparison.kind]: float(matrices[""][i][c] > matrices[""][j][d])}
        if comparison.kind == "text":
            if i == 0:
                points["factual"] = points["pair"]
            points |= {f"blind_{name}": (blank[c] > blank[d]) + (blank[c] == blank[d]) / 2 for name in points}
        yield comparison.labels, points


def _quad(s: Matrix, i: int, j: int, c: int, d: int) -> dict[str, bool]:
    text, image = s[i][c] > s[i][d] and s[j][d] > s[j][c], s[i][c] > s[j][c] and s[j][d] > s[i][d]
    return {"text": text, "image": image, "group": text and image}


_SINGLE = {"text": "pair", "image": "image_pair", "sham": "sham"}
"""Kind of two-cell comparison -> metric."""


def flat_metrics(splits: Mapping[str, Sequence[Accuracy]]) -> dict[str, float]:
    """Return the accuracies keyed by logged name: eval/SPLIT/METRIC for the mean, eval/SPLIT/blind_METRIC for the mean on a blank image,
    and eval/SPLIT/EDIT/METRIC for an edit type.

    eval/SPLIT/loss is the training loss, eval/SPLIT/loss_TERM is one of its terms, and eval/SPLIT/nll is the NLL of true texts in nats per
    token.
    """
    flat = {}
    for split, rows in splits.items():
        for row in rows:
            prefix = f"eval/{split}" if row.mean else f"eval/{split}/{row.name}"
            flat.update({f"{prefix}/{metric}": value for metric, value in row.metrics.items()})
            if row.mean:
                more: dict[str, float | None] = {f"blind_{metric}": value for metric, value in row.blind.items()}
                more |= {f"loss_{name}": term["value"] for name, term in row.losses.items()}
                more |= {"loss": total_loss(row.losses), "nll": row.nll}
                flat.update({f"{prefix}/{name}": value for name, value in more.items() if value is not None})
    return flat


def total_loss(losses: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Return the weighted sum of the terms, or None if a term could not be computed or no term has a value."""
    weighted = [(term["weight"], term["value"]) for term in losses.values() if term["value"] is not None]
    return None if not weighted or any(term["lacking"] for term in losses.values()) else sum(weight * value for weight, value in weighted)


def metric_names(splits: Mapping[str, Groups]) -> set[str]:
    """Return the names of the accuracies that ``flat_metrics`` will return for these splits during training. No model is needed."""

    def tied(group: CounterfactualGroup) -> GroupScores:
        return GroupScores(torch.zeros(len(group.images), len(group.candidates)), torch.zeros(len(group.candidates)))

    def scored(groups: Groups) -> Sequence[GroupScores]:
        return Lazy(lambda index: tied(groups[index]), len(groups))

    return set(flat_metrics({name: accuracies(groups, scored(groups)) for name, groups in splits.items()}))


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    values = {metric: [row[metric] for row in rows if metric in row] for metric in METRICS}
    return {metric: sum(of_metric) / len(of_metric) for metric, of_metric in values.items() if of_metric}
