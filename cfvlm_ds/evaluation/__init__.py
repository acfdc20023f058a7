"""Evaluation: score groups with the training forward, then metrics that are functions of score matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cfvlm_ds.collate import Collator
from cfvlm_ds.distributed import World
from cfvlm_ds.evaluation.scoring import Forward, GroupScores, guarded, score_groups
from cfvlm_ds.evaluation.winoground import Accuracy, accuracies, table
from cfvlm_ds.groups import CounterfactualGroup

__all__ = ["Accuracy", "GroupScores", "accuracies", "evaluate", "flat_metrics", "guarded", "score_groups", "table"]


def evaluate(
    forward: Forward,
    collator: Collator,
    splits: Mapping[str, Sequence[CounterfactualGroup]],
    world: World,
    batch_size: int = 16,
    num_workers: int = 0,
) -> tuple[dict[str, list[Accuracy]], dict[str, list[GroupScores]]]:
    """Accuracies and scores of every split, the same on every rank."""
    scores = {}
    for name, groups in splits.items():
        scores[name] = score_groups(forward, collator, groups, world, batch_size, num_workers, f"evaluating {name}")
    return {name: accuracies(splits[name], scores[name]) for name in splits}, scores


def flat_metrics(splits: Mapping[str, list[Accuracy]]) -> dict[str, float]:
    """The accuracies under the names metrics are logged by: eval/SPLIT/METRIC for the mean, eval/SPLIT/EDIT/METRIC by edit type."""
    flat = {}
    for split, rows in splits.items():
        for row in rows:
            prefix = f"eval/{split}" if row.name == "all" else f"eval/{split}/{row.name}"
            flat.update({f"{prefix}/{metric}": value for metric, value in row.metrics.items()})
            if row.name == "all":
                flat.update({f"{prefix}/blind_{metric}": value for metric, value in row.blind.items()})
    return flat
