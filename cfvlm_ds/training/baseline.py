"""Baseline of a run: the accuracies on its evaluation sets before the first step, with which the final accuracies are compared.

They are stored in the run folder, and in a cache keyed by model, precision and evaluation set, so that later runs of the same model can
skip the evaluation.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.distributed import World, run_on_rank0
from cfvlm_ds.core.files import cache_folder, replace, write_if_possible
from cfvlm_ds.core.reading import MALFORMED, read_json
from cfvlm_ds.core.run_folder import BASELINE
from cfvlm_ds.core.versions import version
from cfvlm_ds.data.identity import Identity, changes, digest
from cfvlm_ds.evaluation import Accuracy
from cfvlm_ds.evaluation.before_after import Change, compare_accuracies
from cfvlm_ds.evaluation.metrics import content_hash
from cfvlm_ds.training.evaluation_sample import SHARE, part_of, random_order
from cfvlm_ds.training.evaluator import Accuracies, Evaluator, Splits

FEWEST = 100
"""Minimum number of groups to evaluate per set, however short the training is."""
_FORM = 4
"""Version of the cache format. Files of a different version are ignored."""


@dataclass(frozen=True)
class Baseline:
    """Measures a run's accuracies before the first step, and compares later accuracies with them.

    Args:
        model: fingerprint of the model's files, or None if unknown. Without a fingerprint, nothing is cached.
        dtype: the model's dtype in this run.
        trained: number of groups that the run trains on, including repeats.
    """

    config: RunConfig
    splits: Splits
    identities: Mapping[str, Identity]
    model: Mapping[str, str] | None
    dtype: torch.dtype
    trained: int
    world: World

    def measure(self, evaluator: Evaluator) -> dict[str, list[Accuracy]]:
        """Return the accuracies on the evaluation sets, from the cache where possible. Returns {} if ``train.eval_on_start`` is False.

        ``num`` in a set's last row (the means) is the number of groups evaluated, which is less than the set's size if a sample was drawn.
        """
        say = self.world.say
        wanted = {name: self._drawn(name) for name in self.splits if self.config.train.eval_on_start}
        for name, places in wanted.items():
            if len(places) < len(self.splits[name]):
                say(
                    f"before the first step: {len(places)} of {len(self.splits[name])} groups of {name} are sampled, for a tenth of the "
                    f"training time but at least {FEWEST} groups (train.eval_on_start: true for all groups, false for none)"
                )
        results: dict[str, list[Accuracy]] = run_on_rank0(self.world, lambda: self._from_cache(wanted))
        if results:
            say(f"before the first step: accuracies of {', '.join(results)} are taken from an earlier run with this model")
        for name, places in wanted.items():
            if name not in results:
                results |= evaluator({name: part_of(self.splits[name], places)})[0]
                if self.world.is_main:
                    self._keep(name, results[name], len(places))
        return results

    def compare(self, results: Accuracies) -> list[Change]:
        """Compare accuracies with the baseline and return the changes. Call this on rank 0 only. A set is skipped if it has no baseline or
        has changed since its baseline was measured.
        """
        changed = []
        for name, after in results.items():
            identity, before = self._read(self._file(name))
            if before and not changes(identity, self.identities[name], of_scores=True):
                changed += compare_accuracies(name, before, after)
        return changed

    def _drawn(self, name: str) -> Sequence[int]:
        """Return the indices of the groups that a set's baseline is measured on."""
        size, of_all = len(self.splits[name]), max(1, sum(map(len, self.splits.values())))
        most = max(FEWEST, int(SHARE * self.trained * size / of_all))
        if self.config.train.eval_on_start is True or size <= most:
            return range(size)
        return random_order(size, most)

    def _from_cache(self, wanted: Mapping[str, Sequence[int]]) -> dict[str, list[Accuracy]]:
        """Return the cached accuracies of the ``wanted`` sets, and copy them into the run folder in place of any earlier baseline."""
        folder = self._file("").parent
        shutil.rmtree(folder, ignore_errors=True)
        if wanted:
            folder.mkdir(parents=True, exist_ok=True)
        found = {}
        for name, places in wanted.items():
            file = self._cached(name, len(places))
            if file is None or not (rows := self._read(file)[1]):
                continue
            now = {(group.id, content_hash(group)) for group in part_of(self.splits[name], places)}
            if all((group, content) in now for group, content, _ in rows[-1].by_group):  # a set's identity does not cover edit types
                replace(self._file(name), file.read_bytes())
                found[name] = rows
        return found

    def _keep(self, name: str, rows: Sequence[Accuracy], count: int) -> None:
        """Write a set's accuracies to the run folder and the cache. Losses are omitted, because they depend on the run's objective."""
        plain = [vars(row) | {"losses": {}} for row in rows]
        text = json.dumps({"data": self.identities[name], "rows": plain})
        write_if_possible(self._file(name), text, self.world.say)
        if (file := self._cached(name, count)) is not None:
            with contextlib.suppress(OSError):  # without the cache, a later run only takes longer
                file.parent.mkdir(parents=True, exist_ok=True)
                replace(file, text.encode(), shared=True)

    def _read(self, file: Path) -> tuple[Any, list[Accuracy]]:
        """Read a set's identity (hashes of its contents) and accuracies from a file that ``_keep`` wrote. If the file is damaged, print a
        warning and return no accuracies.
        """
        try:
            kept = read_json(file) if file.is_file() else {"data": None, "rows": []}
            return kept["data"], [Accuracy(**row) for row in kept["rows"]]
        except MALFORMED as error:
            self.world.say(f"warning: {file} cannot be read ({type(error).__name__}) and is ignored")
            return None, []

    def _file(self, name: str) -> Path:
        return Path(self.config.train.output_dir, BASELINE, f"{name}.json")

    def _cached(self, name: str, count: int) -> Path | None:
        if self.model is None or self.identities[name]["pictures"] is None:
            return None
        model = self.config.model
        limits = (
            f"{model.min_pixels} {model.max_pixels} {model.max_tiles} {model.lora.load_in_4bit} {self.dtype} {model.attn_implementation}"
        )
        key: dict[str, Any] = {"limits": limits, "groups": count, "versions": f"{_FORM} {torch.__version__} {version('transformers')}"}
        return cache_folder() / BASELINE / f"{digest({**self.identities[name], **self.model, **key})}.json"
