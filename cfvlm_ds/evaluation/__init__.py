"""Evaluation of groups with the training forward pass. All metrics are functions of score matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.core.distributed import World
from cfvlm_ds.core.groups import Groups
from cfvlm_ds.evaluation.loss import EvaluationLoss, Reference
from cfvlm_ds.evaluation.metrics import Accuracy, accuracies, flat_metrics, metric_names
from cfvlm_ds.evaluation.report import headline, table
from cfvlm_ds.evaluation.scoring import Batching, Forward, GroupScores, guarded, rehearse, score_groups
from cfvlm_ds.evaluation.view import view
from cfvlm_ds.objectives import Objectives


def evaluate(
    forward: Forward,
    collator: Collator,
    splits: Mapping[str, Groups],
    world: World,
    batching: Batching = Batching(),
    *,
    objectives: Objectives | None = None,
    reference: Reference | None = None,
) -> tuple[dict[str, list[Accuracy]], dict[str, Sequence[GroupScores]]]:
    """Score every split. Return two dicts keyed by split name, equal on all ranks: tables of accuracies, and scores.

    A table's last row contains the means over edit types, the NLL of the true texts and the losses of ``objectives``. ``reference``
    computes the reference scores that some objectives need. For the other arguments, see ``score_groups``.
    """
    results, scores = {}, {}
    for name, groups in splits.items():
        loss = EvaluationLoss(objectives or {}, reference)
        scores[name] = score_groups(forward, collator, groups, world, batching, f"evaluating {name}", loss)
        results[name] = accuracies(groups, scores[name])
        split_loss = loss.reduce(world)
        if results[name]:
            results[name][-1] = replace(results[name][-1], **split_loss)
    return results, scores
