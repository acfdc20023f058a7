"""Fixed samples of the evaluation sets. A run scores them several times to draw the learning curves."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from cfvlm_ds.core.groups import Groups
from cfvlm_ds.core.sequences import Lazy
from cfvlm_ds.evaluation.metrics import HEADLINES, content_hash
from cfvlm_ds.training.evaluator import Accuracies, Splits

FEWEST, MOST = 30, 300
"""Minimum and maximum number of sampled groups per set. If the budget is too small for the minimum, the set has no sample."""
SHARE = 0.15
"""Ratio of groups scored in evaluations to groups trained on. Training on a group costs as much as three forward passes, and scoring it up
to two, so evaluation takes up to a tenth of the training time.
"""
_PARTS = 4
"""Number of equal parts into which the sample's evaluations divide the run."""


@dataclass(frozen=True)
class EvaluationSample:
    """A fixed random sample of groups from each evaluation set.

    Args:
        trained: number of groups that the run trains on, including repeats.
    """

    splits: Splits
    trained: int
    total_steps: int

    @cached_property
    def groups(self) -> dict[str, Groups]:
        """The sampled groups, keyed by set."""
        sampled: dict[str, Groups] = {}
        budget = SHARE * self.trained / (_PARTS - 1) / max(1, sum(map(len, self.splits.values())))
        for name, groups in self.splits.items():
            size = min(MOST, len(groups), int(budget * len(groups)))
            if size >= min(FEWEST, len(groups)) > 0:
                sampled[name] = part_of(groups, random_order(len(groups), size))
        return sampled

    @property
    def counts(self) -> dict[str, str]:
        """Sample size of each metric as shown in the learning curves, for example "300 of 5000 groups"."""
        sizes = {name: f"{len(groups)} of {len(self.splits[name])} groups" for name, groups in self.groups.items()}
        return {f"eval_sample/{name}/{metric}": size for name, size in sizes.items() for metric in HEADLINES}

    def is_due(self, step: int) -> bool:
        """Return True if the sample must be scored after this step."""
        return bool(self.groups) and step in {self.total_steps * part // _PARTS for part in range(1, _PARTS)}

    def metrics(self, results: Accuracies) -> dict[str, float]:
        """Return the headline accuracy, in %, on each set's sample, keyed by eval_sample/SET/METRIC.

        A set whose sample is the whole set is omitted, because eval/SET/METRIC has the same value.

        ``results`` holds per-group results, either for the samples only or for the whole sets. Groups outside the samples are ignored.
        """
        accuracies = {}
        for name, keys in self._keys.items():
            rows = results.get(name, ())
            if not rows or len(self.groups[name]) == len(self.splits[name]):
                continue
            sampled = [points for group, content, points in rows[-1].by_group if (group, content) in keys]
            metric = max(HEADLINES, key=lambda each: sum(each in points for points in sampled))  # chosen from the sample alone
            sums = defaultdict[str, list[float]](lambda: [0.0, 0])  # edit type -> comparisons won, comparisons made
            for points in sampled:
                for edit, (won, made) in points.get(metric, {}).items():
                    sums[edit][0], sums[edit][1] = sums[edit][0] + won, sums[edit][1] + made
            if sums:
                accuracies[f"eval_sample/{name}/{metric}"] = sum(100 * won / made for won, made in sums.values()) / len(sums)
        return accuracies

    @cached_property
    def _keys(self) -> dict[str, set[tuple[str, int]]]:
        return {name: {(group.id, content_hash(group)) for group in groups} for name, groups in self.groups.items()}


def random_order(size: int, count: int) -> list[int]:
    """Return the first ``count`` elements of a fixed random permutation of range(size)."""
    return random.Random(0).sample(range(size), size)[:count]


def part_of(groups: Groups, places: Sequence[int]) -> Groups:
    """Return the groups at the indices in ``places``, in the order of ``groups``."""
    ordered = sorted(places)
    return groups if len(places) == len(groups) else Lazy(lambda place: groups[ordered[place]], len(ordered))
