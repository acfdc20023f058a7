"""A run's data. Before training, each data set is prepared as a store (indexed files) unless it is one already, and opened. Errors are
raised on every rank.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from cfvlm_ds.batching.collator import Collator, load_collator
from cfvlm_ds.cluster.signals import WorkerLost, last_word, shield_worker, worker_deaths
from cfvlm_ds.core.config import IMAGE_LIMITS, RunConfig
from cfvlm_ds.core.data_config import DataSet, is_hub
from cfvlm_ds.core.distributed import ProgressBarrier, World, gather_objects, run_on_rank0
from cfvlm_ds.core.errors import ConfigError, DataError, StorageError
from cfvlm_ds.core.files import replace, write_if_possible
from cfvlm_ds.core.groups import Groups
from cfvlm_ds.core.layout import GroupLayout
from cfvlm_ds.core.reading import MALFORMED, read_json
from cfvlm_ds.core.secrets import without_secrets
from cfvlm_ds.data import CheckReport, GroupStore, data_roots, open_groups
from cfvlm_ds.data.check import check_texts
from cfvlm_ds.data.identity import Identity, digest, mixed_identity
from cfvlm_ds.data.manifest import local_path
from cfvlm_ds.data.mixture import MixedGroups
from cfvlm_ds.data.overlap import keys_of, shared_with
from cfvlm_ds.data.passes import Scan
from cfvlm_ds.data.picture_index import PictureTable, PictureTables
from cfvlm_ds.data.stored import FILE as STORE
from cfvlm_ds.data.stored import SCHEMA, StoredRows, is_store, open_store
from cfvlm_ds.evaluation.report import overlap_warning
from cfvlm_ds.models import inputs_fingerprint
from cfvlm_ds.training.benchmarks import Benchmarks, read_benchmarks

_FOLDER = "prepared"
MOST_ROWS = 100_000
"""Maximum number of groups in a data set that a run prepares itself. Preparing a larger set would leave the GPUs idle for too long."""


@dataclass(frozen=True)
class RunData:
    """A run's training and evaluation data.

    ``identity`` holds hashes of the training groups, and ``identities`` holds those of each split. ``pictures`` is the stores' picture
    table, or None if the data check opened no pictures; each picture is compared with its entry when it is opened. ``sources`` maps names
    to the training sets that make up ``groups``, and ``benchmarks`` maps names to evaluation benchmarks. On rank 0, ``overlaps`` describes
    the rows and pictures that an evaluation set or benchmark (first key) shares with the training set at a path (second key).
    """

    groups: Groups
    splits: dict[str, GroupStore]
    identity: Identity
    pictures: PictureTable | None
    collator: Collator
    identities: Mapping[str, Identity] = field(default_factory=dict)
    sources: Mapping[str, SourceData] = field(default_factory=dict)
    benchmarks: Benchmarks = field(default_factory=dict)
    overlaps: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


class SourceData(NamedTuple):
    """A training set's groups and identity."""

    groups: GroupStore
    identity: Identity


def read_data(config: RunConfig, world: World, *, most_rows: int | None = MOST_ROWS) -> RunData:
    """Open the stores of the training groups and evaluation splits.

    If a data set is not a store yet, rank 0 prepares it (cfvlm_ds/data/prepare.py). All ranks raise ConfigError if a rank is lost,
    and DataError for an invalid manifest, image or text, or for an unprepared data set of more than ``most_rows`` groups.
    """
    data = config.data
    barrier, train_sets, evaluation_sets = ProgressBarrier(world), data.train_sets, data.evaluation_sets
    scan = Scan(barrier.alive, shield_worker)
    if hub := [each.path for each in (*train_sets.values(), *evaluation_sets.values()) if is_hub(each.path)]:
        run_on_rank0(world, lambda: [str(local_path(path, scan, world.say)) for path in hub], barrier)
    collator = load_collator(config.model, data.max_pixels)
    stores = _Stores(config, world, barrier, scan, most_rows, collator)
    train = {name: stores.open(each) for name, each in train_sets.items()}
    splits = {name: stores.open(each) for name, each in evaluation_sets.items()}
    sources = {name: SourceData(groups, stored_rows(groups).identity) for name, groups in train.items()}
    identities = {name: stored_rows(groups).identity for name, groups in splits.items()}
    if data.is_mixture:
        objectives = {name: None if each.objectives is None else tuple(each.objectives) for name, each in train_sets.items()}
        groups: Groups = MixedGroups(list(train.values()), list(train), list(objectives.values()))
        identity = mixed_identity({name: each.identity for name, each in sources.items()}, objectives)
    else:
        ((groups, identity),) = sources.values()
    benchmarks = read_benchmarks(config, world, collator)
    tables = [table for each in (*train.values(), *splits.values()) if (table := stored_rows(each).pictures) is not None]
    evaluated = {name: stored_rows(groups).keys for name, groups in splits.items()}
    evaluated |= {name: keys_of(benchmark.plan.groups, benchmark.pictures) for name, benchmark in benchmarks.items()}
    overlaps: dict[str, dict[str, str]] = {}
    for (name, train_groups), (split, keys) in itertools.product(train.items(), evaluated.items()) if world.is_main else ():
        if shared := str(shared_with(stored_rows(train_groups).keys, keys)):
            trained = without_secrets(train_sets[name].path)
            overlaps.setdefault(split, {})[trained] = shared
            world.say(overlap_warning(split, shared, trained))
    _refuse_idle(config, train)
    pictures = PictureTables(tables) if tables else None
    return RunData(groups, splits, identity, pictures, collator, identities, sources, benchmarks, overlaps)


def stored_rows(groups: GroupStore) -> StoredRows:
    """Return the store that groups are read from."""
    assert isinstance(groups.rows, StoredRows)
    return groups.rows


def _refuse_idle(config: RunConfig, train: Mapping[str, GroupStore]) -> None:
    """Raise ConfigError if a term has nothing to compare, that is, if no text in its training groups is known to be false."""
    sets = [(each.objectives, stored_rows(train[name]).found["false_cells"] == 0) for name, each in config.data.train_sets.items()]
    one, match = torch.ones(1, 3, 1, dtype=torch.int64), torch.tensor([[[1], [1], [-1]]], dtype=torch.int8)
    plain = GroupLayout(one.bool(), match, one, one, torch.ones(1), blank=True)  # a picture, its sham and the blank picture
    idle = []
    for name, term in config.objective.items():
        counting = [nothing_false for terms, nothing_false in sets if terms is None or name in terms]
        if not counting or (all(counting) and not (torch.atleast_1d(term.denominator(plain)) > 0).any()):
            idle.append(name)
    if idle:
        raise ConfigError(
            f"no training group used by {', '.join(idle)} has a text that is false of one of its images, so there is nothing to compare; "
            "make false texts (`cfvlm-ds data propose`), or remove these terms from objective or set their weight to 0"
        )


def by_rank_0(world: World, barrier: ProgressBarrier, what: str, function: Callable[[], Any]) -> Any:
    """Call a function on rank 0 while the other ranks wait, so that it can use all cores of the machine. Return its result on every rank.

    Raises the function's error on every rank, StorageError if a process that the function started was killed, and ConfigError if a rank is
    lost.
    """

    def call() -> Any:
        try:
            with last_word(), worker_deaths():
                return function()
        except WorkerLost as lost:
            raise StorageError(
                f"{what} lost a process ({lost}); such processes are usually killed for lack of memory: start again with more memory; "
                "the work done so far is kept"
            ) from lost

    try:
        return run_on_rank0(world, call, barrier)
    except TimeoutError as error:
        raise ConfigError(f"{what} cannot finish: {error}; check its node and start again; the work done so far is kept") from error


def forget(config: RunConfig, world: World) -> None:
    """Mark the prepared training data as outdated after a start has failed because of the data.

    The next start then prepares it again and notices pictures that the user has restored, even if the manifest is unchanged. Unmodified
    pictures are not opened again.
    """
    if world.is_main:
        for each in config.data.train_sets.values():
            _disown(_folder(config, each))


def _disown(folder: Path) -> None:
    """Mark a store as outdated, so that it is prepared again. Its picture table is kept."""
    with contextlib.suppress(OSError):
        if (folder / STORE).exists():
            replace(folder / STORE, json.dumps({"schema": SCHEMA}).encode())


@dataclass
class _Stores:
    """Opens a run's stores on all ranks.

    A data set that is not a store is prepared in the run folder, and prepared again if its files have been modified since. The run folder
    also stores the results of the data check that depend on the model: text lengths and visual token counts.
    """

    config: RunConfig
    world: World
    barrier: ProgressBarrier
    scan: Scan
    most_rows: int | None
    collator: Collator

    def open(self, data_set: DataSet) -> GroupStore:
        """Open the groups of a data set, and print a summary on rank 0. If there are problems, all ranks raise DataError for the first."""
        prepared = self._by_rank_0(lambda: self._prepared(data_set))
        stores, problem = list[GroupStore](), None
        try:
            roots = data_roots(local_path(data_set.path), data_set.root) if prepared or data_set.root is not None else ()
            stores.append(open_store(Path(prepared or data_set.path), [Path(os.path.abspath(root)) for root in roots]))
        except DataError as error:
            problem = str(error)
            if prepared and not self.world.is_main:
                problem += f"; every node must have access to {self.config.train.output_dir}"
        if problem := next((data_set for data_set in gather_objects(problem, self.world) if data_set), None):
            raise DataError(problem)
        self.world.say(self._by_rank_0(lambda: self._summary(data_set, stores[0], prepared is not None)))
        return stores[0]

    def _by_rank_0(self, function: Callable[[], Any]) -> Any:
        return by_rank_0(self.world, self.barrier, f"the preparation of {self.config.data.trained_on}", function)

    def _prepared(self, each: DataSet) -> str | None:
        """Prepare a data set in the run folder if necessary, and return its folder. Return None for a store, which is used directly."""
        path, config, say = local_path(each.path), self.config, self.world.say
        if path.is_dir() and is_store(path) and each.limit is None:
            return None
        from cfvlm_ds.data.prepare import PrepareOptions, prepare, source_stamp, source_state  # imports all formats

        options = PrepareOptions(open_pictures=config.data.check == "full", max_pixels=config.data.max_pixels)
        folder, format, state = _folder(config, each), each.format or config.data.format, source_state(path)
        stamp = source_stamp(path, state, data_roots(path, each.root), format, each.limit, options)
        try:
            if StoredRows(folder).stamp == stamp:
                return str(folder)
        except DataError:  # a damaged store is prepared again
            _disown(folder)
        groups = self._source(each)
        if self.most_rows is not None and len(groups) > self.most_rows:
            roots = [each.root] if isinstance(each.root, str) else each.root or []
            options_given = [("format", format), *(("root", root) for root in roots), ("limit", each.limit)]
            written = "".join(f" --{name} {value}" for name, value in options_given if value is not None)
            raise DataError(
                f"{each.path}: has {len(groups)} groups, but a run itself prepares at most {self.most_rows} of a data set; run "
                f"`cfvlm-ds data prepare {each.path}{written} --out {each.path}.store` first, and use {each.path}.store instead"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        report = prepare(groups, folder, stamp, options, say, anew=True, scan=self.scan).report
        self._refuse(each, report)
        if source_state(path) != state:
            _disown(folder)
            raise DataError(f"{each.path}: the manifest was modified while it was being checked; start again when it is complete")
        return str(folder)

    def _source(self, each: DataSet) -> GroupStore:
        """Open the groups of a data set that is not a store. Errors refer to the rows of the original files."""
        format = each.format or self.config.data.format
        return open_groups(each.path, each.root, format, limit=each.limit, scan=self.scan, progress=self.world.say)

    def _refuse(self, each: DataSet, report: CheckReport) -> None:
        """Raise DataError for the first of the data set's problems, if any."""
        if not report.problems:
            return
        more = len(report.problems) - 1
        remedy = "; data.on_error only covers errors during training, but `cfvlm-ds data prepare --on_error skip` leaves such rows out"
        others = f" ({more} more: see `cfvlm-ds data check {each.path}`)" if more else ""
        raise DataError(report.problems[0] + remedy * (self.config.data.on_error == "skip") + others)

    def _summary(self, each: DataSet, groups: GroupStore, prepared: bool) -> str:
        """Return a line that describes a data set. Raises DataError for a text or an image that the model cannot process."""
        store, config = stored_rows(groups), self.config
        summary = f"{each.path}: {len(groups)} groups"
        if store.found["left_out"]:
            summary += f" ({store.found['left_out']} were left out when the data were prepared)"
        if (pixels := store.found["most_pixels"]) > (most := config.data.max_pixels):
            raise DataError(
                f"{each.path}: a picture has {pixels} pixels, but data.max_pixels is {most}; raise data.max_pixels, or remove the picture"
            )
        if config.data.check != "full":
            return summary
        file = Path(config.train.output_dir) / _FOLDER / f"{_named(each)}.json"
        key, known = self._measured_by(store), _recorded(file)
        if known.get("key") != key:
            report, _ = check_texts(self._source(each) if prepared else groups, self.collator, store.pictures, self.world.say, self.scan)
            self._refuse(each, report)
            known = {"key": key, "visual_tokens": report.visual_range}
            file.parent.mkdir(parents=True, exist_ok=True)
            write_if_possible(file, json.dumps(known), self.world.say)
        summary += f", {store.found['images']} images"
        summary += f", visual tokens {known['visual_tokens']}" if known["visual_tokens"] else ""
        return without_secrets(summary + (f", metadata {store.found['metadata']}" if store.found["metadata"] else ""))

    def _measured_by(self, store: StoredRows) -> str:
        """Return a hash of everything that determines a store's text lengths and visual token counts."""
        model = self.config.model
        inputs = inputs_fingerprint(model) if os.path.isdir(model.name_or_path) else None
        limits = [getattr(model, option) for option in IMAGE_LIMITS]
        parts = [digest(store.identity), without_secrets(model.name_or_path), inputs, *limits, self.config.data.max_pixels]
        return hashlib.sha256(json.dumps([*parts, transformers.__version__]).encode()).hexdigest()


def _named(each: DataSet) -> str:
    """Return the stem of the names of a data set's files in the run folder."""
    parts = [os.path.abspath(each.path), each.root, each.format, each.limit]
    name = hashlib.blake2b(without_secrets(json.dumps(parts)).encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    return f"{Path(each.path).stem[:80].replace('*', '_')}-{name}"


def _folder(config: RunConfig, each: DataSet) -> Path:
    return Path(config.train.output_dir) / _FOLDER / _named(each)


def _recorded(file: Path) -> dict[str, Any]:
    try:
        return dict(read_json(file))
    except MALFORMED:
        return {}
