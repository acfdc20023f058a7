"""Evaluation: groups are scored with the training forward; all metrics are functions of score matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.core.distributed import World
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.evaluation.comparisons import UNLABELLED, Comparison, comparisons
from cfvlm_ds.evaluation.largest_batch import rehearse
from cfvlm_ds.evaluation.metrics import Accuracy, accuracies, flat_metrics, metric_names
from cfvlm_ds.evaluation.report import headline, table
from cfvlm_ds.evaluation.scoring import Forward, GroupScores, guarded, score_groups

__all__ = [
    "UNLABELLED",
    "Accuracy",
    "Comparison",
    "GroupScores",
    "accuracies",
    "comparisons",
    "evaluate",
    "flat_metrics",
    "guarded",
    "headline",
    "metric_names",
    "rehearse",
    "score_groups",
    "table",
]


def evaluate(
    forward: Forward,
    collator: Collator,
    splits: Mapping[str, Sequence[CounterfactualGroup]],
    world: World,
    batch_size: int = 16,
    num_workers: int = 0,
    *,
    max_tokens: int | None = None,
    shuffled: bool = False,
    remedy: str = "lower the batch size",
) -> tuple[dict[str, list[Accuracy]], dict[str, list[GroupScores]]]:
    """Accuracies and scores of every split, the same on every rank; the options are those of ``score_groups``."""
    scores = {}
    for name, groups in splits.items():
        label = f"evaluating {name}"
        scores[name] = score_groups(
            forward, collator, groups, world, batch_size, num_workers, label, max_tokens=max_tokens, shuffled=shuffled, remedy=remedy
        )
    return {name: accuracies(splits[name], scores[name]) for name in splits}, scores
