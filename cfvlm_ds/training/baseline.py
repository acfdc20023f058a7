"""A run's baseline: its accuracies on the evaluation sets before the first step, in the run folder. The final accuracies are compared with
them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.distributed import World, run_on_rank0
from cfvlm_ds.core.files import write_if_possible
from cfvlm_ds.core.reading import read_json
from cfvlm_ds.core.run_folder import BASELINE
from cfvlm_ds.data.identity import Identity, changes
from cfvlm_ds.evaluation import Accuracy
from cfvlm_ds.evaluation.before_after import Change, compare_accuracies
from cfvlm_ds.training.evaluation_sample import SHARE, part_of, random_order
from cfvlm_ds.training.evaluator import Evaluator, Splits

FEWEST = 100
"""Minimum number of groups to evaluate per set, however short the training is."""


@dataclass(frozen=True)
class Baseline:
    """Accuracies on the evaluation sets before the first step.

    Args:
        trained: number of groups that the run trains on, including repeats.
    """

    config: RunConfig
    splits: Splits
    identities: Mapping[str, Identity]
    trained: int
    world: World

    def measure(self, evaluator: Evaluator) -> dict[str, list[Accuracy]]:
        """Evaluate the sets unless ``train.eval_on_start`` is False, and return their accuracies.

        If only a random sample of a set is evaluated, ``num`` in the last row (mean accuracies) is the sample size. An earlier run's
        baseline in the run folder is deleted.
        """
        wanted = {name: self._drawn(name) for name in self.splits if self.config.train.eval_on_start}
        for name, places in wanted.items():
            if len(places) < len(self.splits[name]):
                self.world.say(
                    f"before the first step: {len(places)} of {len(self.splits[name])} groups of {name} are sampled, for a tenth of the "
                    f"training time but at least {FEWEST} groups (train.eval_on_start: true for all groups, false for none)"
                )
        folder = Path(self.config.train.output_dir, BASELINE)

        def clear() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            if wanted:
                folder.mkdir(parents=True, exist_ok=True)

        run_on_rank0(self.world, clear)
        results, _ = evaluator({name: part_of(self.splits[name], places) for name, places in wanted.items()})
        for name, rows in results.items() if self.world.is_main else ():
            text = json.dumps({"data": self.identities[name], "rows": [vars(row) for row in rows]})
            write_if_possible(folder / f"{name}.json", text, self.world.say)
        return results

    def compare(self, results: Mapping[str, Sequence[Accuracy]]) -> list[Change]:
        """Compare accuracies with the baseline and return the changes. Call this on rank 0 only. A set is skipped if it has no baseline or
        has changed since its baseline was measured.
        """
        changed = []
        for name, after in results.items():
            identity, before = self._read(name)
            if before and not changes(identity, self.identities[name], of_scores=True):
                changed += compare_accuracies(name, before, after)
        return changed

    def _drawn(self, name: str) -> Sequence[int]:
        """Return the indices of those groups of a set for which the baseline is measured."""
        size, of_all = len(self.splits[name]), max(1, sum(map(len, self.splits.values())))
        most = max(FEWEST, int(SHARE * self.trained * size / of_all))
        if self.config.train.eval_on_start is True or size <= most:
            return range(size)
        return random_order(size, most)

    def _read(self, name: str) -> tuple[Any, list[Accuracy]]:
        """Read a set's identity (hashes of its contents) and its accuracies from the run folder. If the file is damaged, print a warning
        and return no accuracies.
        """
        file = Path(self.config.train.output_dir, BASELINE, f"{name}.json")
        try:
            kept = read_json(file) if file.is_file() else {"data": None, "rows": []}
            return kept["data"], [Accuracy(**row) for row in kept["rows"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.world.say(f"warning: {file} cannot be read ({type(error).__name__}) and is ignored")
            return None, []
