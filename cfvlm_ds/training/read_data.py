"""Data is checked before anything is trained on it: a problem is one sentence on every rank, not a crash after an hour."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cfvlm_ds.batching.collator import Collator, load_collator
from cfvlm_ds.cluster.signals import WorkerLost, last_word, shield_worker, worker_deaths
from cfvlm_ds.core.config import IMAGE_LIMITS, ModelConfig, RunConfig
from cfvlm_ds.core.data_config import DataConfig, DataSet
from cfvlm_ds.core.distributed import Patience, World, agreed, broadcast_object, gather_objects
from cfvlm_ds.core.errors import ConfigError, DataError, StorageError
from cfvlm_ds.core.files import keep
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.layout import GroupLayout
from cfvlm_ds.core.reading import read_json
from cfvlm_ds.core.secrets import without_secrets
from cfvlm_ds.data import GroupStore, check_groups, check_rows, data_roots, open_groups
from cfvlm_ds.data.containers.hub import fetched, is_hub
from cfvlm_ds.data.containers.kinds import sources_state
from cfvlm_ds.data.identity import Identity, digest, mixed_identity, store_identity
from cfvlm_ds.data.mixture import MixedGroups
from cfvlm_ds.data.overlap import shared_with
from cfvlm_ds.data.packed import FILE as STORE
from cfvlm_ds.data.packed import PackedRows, is_store
from cfvlm_ds.data.passes import Scan
from cfvlm_ds.data.picture_index import PictureNotes, PictureTable, PictureTables, stored_pictures
from cfvlm_ds.models import fingerprint, inputs_fingerprint
from cfvlm_ds.training.benchmarks import RunBenchmark, read_benchmarks

_FORM = 3  # of data_check.json and of what a check looks at; another number has everything looked at again
_FILE = "data_check.json"
Splits = Mapping[str, Sequence[CounterfactualGroup]]

Tick = Callable[[], object]
"""Called at least every second in whatever takes long here; may raise in order to leave."""


@dataclass(frozen=True)
class RunData:
    """What a run trains on and is evaluated on.

    ``identity`` is that of the training groups, ``identities`` those of the splits. ``pictures`` are those found sound, with which a
    picture is compared when it is opened; if only rows were checked those of packed stores, or None. ``collator`` is the model's, if the
    check needed one. ``sources`` are the training sets by name, of which ``groups`` are made; ``benchmarks`` are those of the evaluation.
    """

    groups: Sequence[CounterfactualGroup]
    splits: dict[str, Sequence[CounterfactualGroup]]
    identity: Identity
    pictures: PictureTable | None
    collator: Collator | None = None
    identities: Mapping[str, Identity] = field(default_factory=dict)
    sources: Mapping[str, SourceData] = field(default_factory=dict)
    benchmarks: Mapping[str, RunBenchmark] = field(default_factory=dict)


class SourceData(NamedTuple):
    """One of the training sets, and what it is recognised by."""

    groups: Sequence[CounterfactualGroup]
    identity: Identity


def read_data(config: RunConfig, world: World, tick: Tick = lambda: None) -> RunData:
    """Read the training groups and evaluation splits, which rank 0 checks; a problem is raised on every rank.

    Raises ConfigError when no training manifest is named, or a rank is lost, DataError for anything wrong with a manifest, an image or a
    text.
    """
    data = config.data
    if not data.train:
        raise ConfigError("data.train is not set; give the manifest of your training groups")
    patience, train_sets, evaluation_sets = Patience(world, tick), data.train_sets, data.evaluation_sets
    if hub := [each.path for each in (*train_sets.values(), *evaluation_sets.values()) if is_hub(each.path)]:
        agreed(world, lambda: [str(fetched(path, patience.alive, world.say)) for path in hub], patience)
    check = _Check(config, world, patience)
    train = {name: check(each) for name, each in train_sets.items()}
    splits: dict[str, Sequence[CounterfactualGroup]] = {name: check(each) for name, each in evaluation_sets.items()}
    sources = {name: SourceData(train[name], check.identity(each, train[name])) for name, each in train_sets.items()}
    identities = {name: check.identity(each, splits[name]) for name, each in evaluation_sets.items()}
    groups, identity = _together(data, sources)
    benchmarks = read_benchmarks(config, world, check.collator, tick)
    collator = next((each.collator for each in benchmarks.values()), check.collator)
    check.name_shared(sources, splits, identities, benchmarks)
    agreed(world, lambda: check.refuse_idle(config.objective), patience)
    return RunData(groups, splits, identity, check.pictures, collator, identities, sources, benchmarks)


def by_rank_0(world: World, patience: Patience, what: str, function: Callable[[], Any]) -> Any:
    """Call a function on rank 0, with all cores of its machine, while the other ranks wait; returns its result on every rank.

    Raises its error on every rank, and StorageError where one of its processes was killed.
    """

    def call() -> Any:
        try:
            with last_word(), worker_deaths():
                return function()
        except WorkerLost as lost:
            raise StorageError(
                f"{what} has lost a process ({lost}); memory is what such processes are usually killed for: start again with more of it, "
                "nothing found is lost"
            ) from lost

    try:
        return agreed(world, call, patience)
    except TimeoutError as error:
        raise ConfigError(f"{what} cannot end: {error}; look at its node and start again, nothing found is lost") from error


def _together(data: DataConfig, sources: Mapping[str, SourceData]) -> tuple[Sequence[CounterfactualGroup], Identity]:
    """The training groups of a run and their identity: those of its one set, or of the sources of a mixture."""
    if not data.is_mixture:
        (only,) = sources.values()
        return only.groups, only.identity
    objectives = {name: None if each.objectives is None else tuple(each.objectives) for name, each in data.train_sets.items()}
    groups = MixedGroups([each.groups for each in sources.values()], list(sources), list(objectives.values()))
    return groups, mixed_identity({name: each.identity for name, each in sources.items()}, objectives)


def forget(config: RunConfig, world: World) -> None:
    """Make the next start check the training data again, because this start is refused for them: files may be restored while the manifest
    stays the same. Pictures that have not been written since are not opened again."""
    if world.is_main:
        file = Path(config.train.output_dir) / _FILE
        known = _recorded(file)
        names = [_name(each, config.data.format) for each in config.data.train_sets.values()]
        if [name for name in names if known.pop(name, None) is not None]:
            keep(file, json.dumps(known, indent=1), world.say)


def model_fingerprint(model: ModelConfig, world: World, tick: Tick = lambda: None) -> dict[str, str]:
    """``fingerprint``, for which rank 0 reads all weights. Raises ConfigError on every rank when they cannot be read."""
    patience = Patience(world, tick)
    return agreed(world, lambda: fingerprint(model, patience.alive, world.say), patience)


def _from_main(item: Any, world: World) -> Any:
    return broadcast_object(item) if world.size > 1 else item


def _recorded(file: Path) -> dict[str, Any]:
    try:
        return dict(read_json(file))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def _name(each: DataSet, format: str) -> str:
    return without_secrets(
        json.dumps([os.path.abspath(each.path), each.root, each.format or format, *[each.limit] * (each.limit is not None)])
    )


class _Check:
    """Checks data sets once: a set that was sound with the same options is not checked again while its manifest is unchanged.

    ``data_check.json`` in the run folder says what is sound, the folder ``data_check`` beside it which pictures were seen.
    """

    def __init__(self, config: RunConfig, world: World, patience: Patience) -> None:
        self._config, self._world, self._patience = config, world, patience
        run_dir = Path(config.train.output_dir)
        self._file, self._folder = run_dir / _FILE, run_dir / "data_check"
        self._full = config.data.check == "full"
        self.collator: Collator | None = None
        self._known: dict[str, Any] = {}
        self._stamps: dict[str, list[Any]] = {}
        self._packed: list[PictureTable] = []
        if world.is_main:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._known = _recorded(self._file)
        self._notes: PictureNotes | None = None

    def __call__(self, each: DataSet) -> GroupStore:
        """The groups of a set without a problem; rank 0 says what it holds. Raises DataError with the first problem on every rank."""
        problem, summary = _from_main(self._known_of(each) if self._world.is_main else None, self._world)
        if problem:
            raise DataError(problem)
        groups = self._opened(each)
        if isinstance(groups.rows, PackedRows) and groups.rows.pictures is not None:
            self._packed.append(groups.rows.pictures)
        if summary is None:
            summary = self._by_rank_0(lambda: self._looked_at(each, groups))
        self._world.say(summary)
        return groups

    def _by_rank_0(self, function: Callable[[], Any]) -> Any:
        return by_rank_0(self._world, self._patience, f"the data check of {self._config.data.trained_on}", function)

    @property
    def pictures(self) -> PictureTable | None:
        """The pictures that were checked; if only rows were, what packed stores say of theirs."""
        if self._full:
            return stored_pictures(self._folder)
        return PictureTables(self._packed) if self._packed else None

    def identity(self, each: DataSet, groups: Sequence[CounterfactualGroup]) -> Identity:
        """What the groups of a set are recognised by."""
        assert isinstance(groups, GroupStore)

        def find() -> Identity:
            pictures, entry = self.pictures, self._entry(each)
            table = _state(pictures)
            if isinstance(known := entry.get("identity"), dict) and entry.get("pictures") == table:
                return known  # else another set's check may have noted a changed picture of this
            found = store_identity(groups, pictures, self._scan(), self._world.say)
            self._keep(each, identity=found, pictures=table)
            return found

        return dict(self._by_rank_0(find))

    def name_shared(
        self, sources: Mapping[str, SourceData], splits: Splits, identities: Mapping[str, Identity], benchmarks: Mapping[str, RunBenchmark]
    ) -> None:
        """Say what training and evaluation sets have in common: a result on what was trained on says little."""
        data, say, pictures = self._config.data, self._world.say, self.pictures
        splits = {**splits, **{name: each.plan.groups for name, each in benchmarks.items()}}
        identities = {**identities, **{name: each.identity for name, each in benchmarks.items()}}
        if pictures is not None and benchmarks:
            pictures = PictureTables([pictures, *(each.pictures for each in benchmarks.values())])

        def found(name: str, each: DataSet) -> list[str]:
            depends = digest({part: digest(identity) for part, identity in {"": sources[name].identity, **identities}.items()})
            kept = self._entry(each).get("shared")
            if isinstance(kept, dict) and kept.get("of") == depends and isinstance(kept.get("said"), list):
                return list(kept["said"])
            shared = shared_with(sources[name].groups, splits, pictures, self._scan(), say)
            lines = [
                f"data.evaluation.{split}: {what} are in the training set {each.path} too" for split, what in shared.items() if str(what)
            ]
            self._keep(each, shared={"of": depends, "said": [without_secrets(line) for line in lines]})
            return lines

        for name, each in data.train_sets.items():
            said = self._by_rank_0(partial(found, name, each))
            for line in said:
                say(f"warning: {line}; what is measured there is no generalisation")

    def refuse_idle(self, objectives: Mapping[str, Any]) -> None:
        """Raise ConfigError for terms with nothing to do: no training group that counts in them has a text that is known to be false."""
        sets = [(each.objectives, self._entry(each).get("known_false") == 0) for each in self._config.data.train_sets.values()]
        one = torch.ones(1, 1, 1, dtype=torch.int64)
        plain = GroupLayout(one.bool(), one.to(torch.int8), one, one, torch.ones(1))
        idle = []
        for name, term in objectives.items():
            counting = [nothing_false for named, nothing_false in sets if named is None or name in named]
            if not counting or (all(counting) and not (torch.atleast_1d(term.denominator(plain)) > 0).any()):
                idle.append(name)
        if idle:
            raise ConfigError(
                f"no training group that counts in {', '.join(idle)} has a text that is false of one of its images, so that there is "
                "nothing to compare; leave these terms out of objective, or give them the weight 0, if that is meant"
            )

    def _format(self, each: DataSet) -> str:
        return each.format or self._config.data.format

    def _scan(self) -> Scan:
        return Scan(self._notes or PictureNotes(), self._patience.alive, shield_worker)

    def _opened(self, each: DataSet) -> GroupStore:
        """The groups of a set. A large file is indexed by one rank, or by one of each node that does not see what the first has written."""
        world, found = self._world, list[GroupStore]()
        for turn in (world.is_main, world.local_rank == 0, True)[-1 if world.size == 1 else 0 :]:
            problem = None
            try:
                if turn and not found:
                    found.append(
                        open_groups(each.path, each.root, self._format(each), limit=each.limit, scan=self._scan(), progress=world.say)
                    )
            except DataError as error:
                problem = str(error)
            self._patience.meet()
            if problem := next((each for each in gather_objects(problem, world) if each), None):
                raise DataError(problem)
        return found[0]

    def _looked_at(self, each: DataSet, groups: GroupStore) -> str:
        """What a set holds, in a line, which is kept with how many cells of its truth tables are known to be false."""
        data, say = self._config.data, self._world.say
        if self._full:
            self.collator = self.collator or load_collator(self._config.model, "full", data.max_pixels)
            self._notes = self._notes or PictureNotes(self._folder)
            report = check_groups(groups, lengths=self.collator, max_pixels=data.max_pixels, progress=say, scan=self._scan())
        else:
            report = check_rows(groups, progress=say, scan=self._scan())
        if report.problems:
            more = len(report.problems) - 1
            remedy = f"; data.on_error is about what breaks later, and `cfvlm-ds data convert {each.path} --on_error skip` leaves this out"
            others = f" ({more} more: see `cfvlm-ds data check {each.path}`)" if more else ""
            raise DataError(report.problems[0] + remedy * (data.on_error == "skip") + others)
        summary = f"{each.path}: {report.num_groups} groups"
        if self._full:
            summary += f", {report.num_images} images"
            summary += f", visual tokens {report.visual_range}" if report.visual_range else ""
            summary += f", metadata {report.unused}" if report.metadata else ""
        self._refuse_written(each, groups)
        self._keep(each, summary=without_secrets(summary), known_false=report.num_false_cells)
        return summary

    def _refuse_written(self, each: DataSet, groups: GroupStore) -> None:
        """DataError where a manifest is not what it was before it was checked: its rows are read again, whenever they are used."""
        written = _written(each)
        if not written == list(groups.rows.state) == self._stamp(each)[1:4]:
            raise DataError(f"{each.path}: the manifest was written while it was checked; start again when it is whole")

    def _known_of(self, each: DataSet) -> tuple[str | None, str | None]:
        """(what is wrong, what was found): both None for a set that has to be looked at."""
        try:
            _written(each)
        except DataError as error:
            return str(error), None
        except OSError as error:
            if os.path.isdir(each.path):
                return None, None  # whoever opens it says what it lacks
            missing = "no such manifest" if isinstance(error, FileNotFoundError) else f"the manifest cannot be read ({error.strerror})"
            return f"{each.path}: {missing}; correct data.train or data.evaluation", None
        summary = self._entry(each).get("summary")
        pictures = not self._full or stored_pictures(self._folder) is not None
        return None, summary if isinstance(summary, str) and pictures else None

    def _entry(self, each: DataSet) -> dict[str, Any]:
        """The entry for a set in its present state, checked with the present options."""
        stamp, entry = self._stamp(each), self._known.get(_name(each, self._config.data.format))
        return entry if isinstance(entry, dict) and entry.get("stamp") == stamp else {}

    def _keep(self, each: DataSet, **found: Any) -> None:
        if self._world.is_main:
            self._known[_name(each, self._config.data.format)] = {**self._entry(each), "stamp": self._stamp(each), **found}
            keep(self._file, json.dumps(self._known, indent=1), self._world.say)

    def _stamp(self, each: DataSet) -> list[Any]:
        """The state of a set before it is read: if its manifest is written during the check, the next start checks it again."""
        model, data, name = self._config.model, self._config.data, _name(each, self._config.data.format)
        if name not in self._stamps:
            roots = [os.path.abspath(root) for root in data_roots(each.path, each.root)]
            limits = [getattr(model, option) for option in IMAGE_LIMITS]
            paths = [without_secrets(path) for path in (*roots, model.name_or_path)]
            inputs = None
            with contextlib.suppress(OSError, ConfigError):  # named where they are read to be used
                inputs = inputs_fingerprint(model) if os.path.isdir(model.name_or_path) else None
            self._stamps[name] = [_FORM, *_written(each), self._format(each), data.check, data.max_pixels, *limits, *paths, inputs]
        return self._stamps[name]


def _written(each: DataSet) -> list[int]:
    """The state of a manifest: an old time can be set again, but not the last one."""
    path = fetched(each.path)
    return list(sources_state(path / STORE if path.is_dir() and is_store(path) else path))


def _state(pictures: PictureTable | None) -> list[int] | None:
    """What tells one state of a stored table from another."""
    if pictures is None or pictures.file is None:
        return None
    stat = pictures.file.stat()
    return [stat.st_size, stat.st_mtime_ns]
