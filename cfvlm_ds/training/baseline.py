"""The baseline of a run: accuracies of its evaluation sets before the first step, for the table of what the training changed.

The run folder holds them, and a cache by model, precision and set, so that a second run from the same model evaluates nothing.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.distributed import World, run_on_rank0
from cfvlm_ds.core.files import cache_folder, replace, write_if_possible
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.reading import read_json
from cfvlm_ds.core.sequences import Lazy
from cfvlm_ds.data.identity import Identity, changes, digest
from cfvlm_ds.evaluation import Accuracy
from cfvlm_ds.evaluation.before_after import Change, compare_accuracies
from cfvlm_ds.evaluation.metrics import content_hash
from cfvlm_ds.training.evaluator import Evaluator, Splits

FOLDER = "baseline"
FEWEST = 100
"""Groups of each set that are always evaluated, however short the training is."""
_FORM = 1
"""Form of the files in the cache; a file of another form is not found."""
_SHARE = 0.15
"""Groups scored per group trained: a training group takes three forwards, a scored one up to two, so that the baseline takes a tenth."""


class Baseline:
    """Accuracies of the evaluation sets before the first step.

    Args:
        model: fingerprint of the model's files; None where it is not known, and nothing is cached.
        dtype: of the model in this run.
        trained: groups that the run trains on, repeated ones counted as often.
    """

    def __init__(
        self,
        config: RunConfig,
        splits: Splits,
        identities: Mapping[str, Identity],
        model: Mapping[str, str] | None,
        dtype: torch.dtype,
        trained: int,
        world: World,
    ) -> None:
        self._config, self._splits, self._identities, self._world = config, splits, identities, world
        self._model, self._dtype, self._trained = model, str(dtype), trained
        self._folder = Path(config.train.output_dir) / FOLDER

    def measure(self, evaluator: Evaluator) -> dict[str, list[Accuracy]]:
        """Evaluate what ``train.eval_on_start`` and ``train.retention`` ask for; returns accuracies of the sets evaluated whole.

        A set of ``train.retention`` is always evaluated whole and now. Rank 0 also returns those that the cache holds whole.
        """
        train, say = self._config.train, self._world.say
        wanted = [name for name in self._splits if train.eval_on_start or name in (train.retention or ())]
        places = {name: self._drawn(name) for name in wanted}
        for name in wanted:
            if len(places[name]) < len(self._splits[name]):
                say(
                    f"before the first step: {len(places[name])} of {len(self._splits[name])} groups of {name} are drawn, for a tenth of "
                    f"the training's time or {FEWEST} groups (train.eval_on_start true takes all, false none)"
                )
        cached = run_on_rank0(self._world, lambda: self._from_cache(places))
        if cached:
            say(f"before the first step: accuracies of {', '.join(cached)} are those of an earlier run from this model")
        results: dict[str, list[Accuracy]] = {}
        for name in wanted:
            if name not in cached:
                results |= evaluator({name: _part(self._splits[name], places[name])})[0]
                if self._world.is_main:
                    self._keep(name, results[name], len(places[name]))
            elif self._world.is_main:
                results[name] = self._read(self._file(name))
        return {name: rows for name, rows in results.items() if len(places[name]) == len(self._splits[name])}

    def forget(self) -> None:
        """Remove the baseline of an earlier run in the folder (rank 0)."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def compare(self, results: Mapping[str, Sequence[Accuracy]]) -> list[Change]:
        """Compare the accuracies of sets with the baseline (rank 0); a set without one, or with other contents since, has no rows."""
        return [change for name, rows in results.items() for change in compare_accuracies(name, self._of_run(name), rows)]

    def _drawn(self, name: str) -> Sequence[int]:
        """Return the places of the groups of a set that are evaluated."""
        train, size = self._config.train, len(self._splits[name])
        most = max(FEWEST, int(_SHARE * self._trained * size / max(1, sum(map(len, self._splits.values())))))
        if train.eval_on_start is True or name in (train.retention or ()) or size <= most:
            return range(size)
        return sorted(random.Random(0).sample(range(size), most))

    def _from_cache(self, places: Mapping[str, Sequence[int]]) -> list[str]:
        """Copy the sets that the cache holds into the run folder, and return their names."""
        self.forget()
        if places:
            self._folder.mkdir(parents=True, exist_ok=True)
        found = []
        for name, of_set in places.items():
            file = self._cached(name, len(of_set))
            if file is None or name in (self._config.train.retention or ()) or not (rows := self._read(file)):
                continue
            groups = (self._splits[name][place] for place in of_set)
            now = {(group.id, content_hash(group)) for group in groups}
            if all((group, content) in now for group, content, _ in rows[-1].by_group):  # labels of edits are outside the set's identity
                replace(self._file(name), file.read_bytes())
                found.append(name)
        return found

    def _keep(self, name: str, rows: Sequence[Accuracy], count: int) -> None:
        """Write the accuracies of a set, without losses, which depend on the objective of a run."""
        plain = [vars(row) | {"losses": {}, "nll": None} for row in rows]
        text = json.dumps({"data": self._identities[name], "rows": plain})
        write_if_possible(self._file(name), text, self._world.say)
        if (file := self._cached(name, count)) is not None:
            with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
                file.parent.mkdir(parents=True, exist_ok=True)
                replace(file, text.encode(), shared=True)

    def _of_run(self, name: str) -> list[Accuracy]:
        """Return the run's baseline of a set; nothing if the set has other contents since."""
        file = self._file(name)
        rows = self._read(file)
        return [] if rows and changes(read_json(file)["data"], self._identities[name], of_scores=True) else rows

    def _read(self, file: Path) -> list[Accuracy]:
        """Read a file of ``_keep``; nothing, with a warning, if it is damaged."""
        if not file.is_file():
            return []
        try:
            return [Accuracy(**row) for row in read_json(file)["rows"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._world.say(f"warning: {file} cannot be read ({type(error).__name__}), and is not used")
            return []

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _cached(self, name: str, count: int) -> Path | None:
        if self._model is None or self._identities[name]["pictures"] is None:
            return None
        model = self._config.model
        limits = f"{_FORM} {model.min_pixels} {model.max_pixels} {model.max_tiles} {model.lora.load_in_4bit} {self._dtype}"
        return cache_folder() / FOLDER / f"{digest({**self._identities[name], **self._model, 'limits': limits, 'groups': count})}.json"


def _part(groups: Sequence[CounterfactualGroup], places: Sequence[int]) -> Sequence[CounterfactualGroup]:
    """Return the groups at some places."""
    return groups if len(places) == len(groups) else Lazy(lambda place: groups[places[place]], len(places))
