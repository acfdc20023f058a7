"""Benchmark runner: scores benchmarks one by one and reuses results on disk.

The division of items into forward passes depends only on the items and the settings, not on the number of ranks or on interruptions, so
the result files are always identical.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from cfvlm_ds.batching.batch import blank_view
from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.cluster.run_lock import RunLock
from cfvlm_ds.core.distributed import ProgressBarrier, World, gather_objects, run_on_rank0
from cfvlm_ds.core.errors import ConfigError, InputError
from cfvlm_ds.core.files import replace as write_whole
from cfvlm_ds.core.groups import Pictures
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.untrusted import own_output, refuse_link
from cfvlm_ds.data.picture_index import PictureTable
from cfvlm_ds.evaluation.asking import Plan, plan, written
from cfvlm_ds.evaluation.benchmarks import Item, Loaded, Outcome
from cfvlm_ds.evaluation.probes import Generate
from cfvlm_ds.evaluation.scoring import Batching, Forward, matrices, scored_batches, seen_as
from cfvlm_ds.evaluation.suite.bootstrap import drawn_together
from cfvlm_ds.evaluation.suite.item_check import Checked, checked_items, prompt_of, token_lengths
from cfvlm_ds.evaluation.suite.results import (
    RESULTS,
    Partial,
    Result,
    kept,
    read_result,
    read_results,
    refuse_other,
    result_folder,
    result_of,
    taken,
    write_result,
)
from cfvlm_ds.evaluation.suite.selection import OF_MODEL, Chosen, refuse_problems
from cfvlm_ds.evaluation.suite.tables import HEADING, markdown

_Rows = dict[int, dict[str, Any]]
"""Group index -> scores, or item index -> generated texts."""
MAX_TOKENS = 16_384
"""Default maximum number of tokens in a forward pass, enough for about a hundred questions about one picture with any model."""
_TABLES = "results.md"


@dataclass(frozen=True)
class Asked:
    """Model under evaluation: its forward pass (in evaluation mode on every rank) and its identity.

    ``identity`` contains the hashes ``weights`` and ``inputs`` (see cfvlm_ds.models.identity), ``adapter`` if the model has adapters, and
    ``writing`` (hash of the generation options) if it generates text. ``say`` generates a text from pictures, a prompt and a maximum number
    of tokens. It is None if the model cannot generate text, for instance because it is partitioned over several GPUs.
    """

    forward: Forward
    collator: Collator
    world: World
    name: str
    identity: Mapping[str, str]
    precision: Mapping[str, str]
    say: Callable[[Pictures, str, int], str] | None = None


@dataclass(frozen=True)
class Settings(Batching):
    """Settings of a benchmark evaluation.

    Args:
        skip: leave out and report items that the model cannot process. If False, the first of them raises an error.
        draws: number of bootstrap draws; by default it depends on the number of items.
    """

    max_tokens: int | None = MAX_TOKENS
    skip: bool = False
    draws: int | None = None


@contextlib.contextmanager
def results_held(out: Path, world: World) -> Iterator[None]:
    """Lock the results folder within the ``with`` block. Raises ConfigError on all ranks if another process holds the lock, or if ``out``
    cannot be used as a results folder (for example, because it is a run folder).
    """
    locks: list[RunLock] = []

    def acquire() -> None:
        refuse_link(out, "name the folder itself with --out")
        if out.exists() and not out.is_dir():
            raise ConfigError(f"{out} is a file, but results are written to a folder; name one with --out")
        if (out / "config.yaml").exists():
            raise ConfigError(f"{out} is a run folder, whose own results would be overwritten; name another folder with --out")
        own_output(out / _TABLES, lambda file: file.read(len(HEADING)) == HEADING.encode(), "evaluate")
        locks.append(RunLock(out, "folder with --out"))

    run_on_rank0(world, acquire)
    try:
        with locks[0] if locks else contextlib.nullcontext():
            yield
    finally:
        if locks:  # a refused evaluation must not leave an empty folder
            with contextlib.suppress(OSError):
                out.rmdir()


def evaluate_benchmarks(model: Asked, chosen: Sequence[tuple[Chosen, Loaded]], out: Path, settings: Settings) -> list[Result]:
    """Evaluate a model on loaded benchmarks. Write each result to a folder below ``out``, write ``results.md``, and return the results.

    Results on disk for the same model and data are not computed again. All ranks must call this, and all get the results.

    Raises ConfigError if a folder contains results of a different evaluation, and DataError for an invalid item unless invalid items are
    skipped.
    """
    world = model.world
    run_on_rank0(world, lambda: _refuse_another_model(out, model))
    results = [_evaluate_one(model, benchmark, loaded, out, settings) for benchmark, loaded in chosen]
    run_on_rank0(world, lambda: write_whole(out / _TABLES, (markdown(read_results(out)) + "\n").encode()))
    return results


def _refuse_another_model(out: Path, model: Asked) -> None:
    now = {name: model.identity.get(name) for name in OF_MODEL}
    for path in sorted(out.glob(f"*/*/{RESULTS}")):
        before = read_result(path.parent).record["model"]
        refuse_other(path, {"model": {name: before.get(name) for name in OF_MODEL}}, {"model": now})


def _evaluate_one(model: Asked, chosen: Chosen, loaded: Loaded, out: Path, settings: Settings) -> Result:
    """Return the result of one benchmark with one probe. If a complete result is on disk, read it; otherwise evaluate the model."""
    world, label, folder, barrier = model.world, f"{chosen.name} ({chosen.label})", out / chosen.place, ProgressBarrier(model.world)
    checked = checked_items(loaded.items, chosen.way, model.collator, world, label)
    refuse_problems(f"benchmark {chosen.name}", [why for _, why in checked.left_out], len(checked.items), settings.skip)
    limits = {"batch_size": settings.batch_size, "max_tokens_per_forward": settings.max_tokens}
    header = chosen.header(model.identity, checked.identity(), {**limits, "limit": loaded.limit, **model.precision})

    def finished() -> Result | None:
        if not (folder / RESULTS).is_file():
            return None
        found = read_result(folder)
        refuse_other(folder / RESULTS, found.record, header)
        return found

    known: Result | None = run_on_rank0(world, finished, barrier)
    if known is not None:
        world.say(f"{label}: {len(known.outcomes)} items are already in {folder}")
        return known
    journal: Partial = run_on_rank0(world, lambda: Partial(result_folder(folder), header), barrier)
    outcomes = _outcomes(model, chosen, settings, checked, journal, label, barrier)
    drawn = drawn_together(world, outcomes, chosen.benchmark.metrics, settings.draws, label, barrier)

    def relative(message: object) -> str:
        """Make the paths in a message relative to the benchmarks folder, so that the message is the same on every machine."""
        return str(message).replace(f"{chosen.root.parent}/", "")

    left_out = [(name, relative(why)) for name, why in (*(("", problem) for problem in loaded.problems), *checked.left_out)]
    notes, prompt = [relative(note) for note in loaded.notes], prompt_of(checked.items[0], chosen.way, model.collator)
    result = result_of(chosen.name, chosen, model.name, header, outcomes, drawn, prompt, notes, left_out, loaded.in_files, loaded.own_files)
    run_on_rank0(world, lambda: write_result(folder, result))
    return result


def _outcomes(
    model: Asked, chosen: Chosen, settings: Settings, checked: Checked, journal: Partial, label: str, barrier: ProgressBarrier
) -> list[Outcome]:
    """Score the groups, or generate the texts, that ``journal`` does not contain yet. Return the outcomes of all items."""
    way, rows, world, items = chosen.way, journal.rows, model.world, checked.items
    if isinstance(way, Generate):
        items_of, turns = Counter(range(len(items))), _written(model, items, way, settings, rows, barrier)
    else:
        scoring_plan = plan(items, way)
        items_of = Counter(group for group, _ in scoring_plan.places)
        turns = _scored(model, scoring_plan, settings, checked.pictures, rows, label)
    total, on_disk = len(items), sum(items_of[k] for k in rows)
    if rows:
        world.say(f"{label}: {on_disk} of {total} items are on disk; only the others are computed")
    progress = Progress(world.say, label, total - on_disk, "items")
    for local in _with_problem(turns):
        barrier.meet()
        gathered: _Rows = {}
        for part, wrong in gather_objects(local, world):
            if wrong is not None:
                raise wrong
            gathered |= part
        run_on_rank0(world, partial(journal.add, gathered))
        rows |= gathered
        progress.advance(sum(items_of[k] for k in gathered))
    if isinstance(way, Generate):
        answered = [(item, rows[k]) for k, item in enumerate(items)]
        return [written(item, row["said"], row["blank"], chosen.read) for item, row in answered]
    scores = [taken(rows[k]) for k in range(len(scoring_plan.groups))]
    return scoring_plan.outcomes(scores, token_lengths(model.collator))


def _scored(model: Asked, scoring_plan: Plan, settings: Settings, pictures: PictureTable, known: _Rows, label: str) -> Iterator[_Rows]:
    """Yield the scores of this rank's groups, batch by batch. A batch is skipped if ``known`` contains scores for all its groups."""
    groups, size = scoring_plan.groups, settings.batch_size
    collator = model.collator.of_run("full", None, pictures)
    for pictured in (True, False):  # groups without pictures have no blank view
        every = [k for k, group in enumerate(groups) if bool(group.num_pictures) == pictured]
        batches = [every[start : start + size] for start in range(0, len(every), size)]
        unscored = [batch for batch in batches if not all(k in known for k in batch)]
        views = seen_as(groups) if pictured else [groups]
        for indices, scored in scored_batches(model.forward, collator, groups, views, unscored, model.world, settings, label):
            yield {k: kept(scores) for k, scores in matrices(groups, indices, scored).items()}


def _written(
    model: Asked, items: Sequence[Item], way: Generate, settings: Settings, known: _Rows, barrier: ProgressBarrier
) -> Iterator[_Rows]:
    """Generate the texts for this rank's items that are not in ``known``, and yield them batch by batch."""
    if model.say is None:
        raise ConfigError(
            f"the probe {way.name} needs a whole model on each rank, but this one is partitioned; omit --zero3, or choose another probe"
        )
    say, world, most = model.say, model.world, way.max_new_tokens
    say_blank = cache(say)  # all description items share a prompt
    unwritten, together = [k for k in range(len(items)) if k not in known], settings.batch_size * world.size
    for start in range(0, len(unwritten), together):
        texts: _Rows = {}
        for k in unwritten[start : start + together][world.rank :: world.size]:
            item, prompt = items[k], way.asked(items[k])
            blank = blank_view(len(item.images[0]))
            texts[k] = {"said": [say(image, prompt, most) for image in item.images], "blank": say_blank(blank, prompt, most)}
            barrier.alive()
        yield texts


def _with_problem(turns: Iterator[_Rows]) -> Iterator[tuple[_Rows, InputError | None]]:
    """Yield (rows, None) for each batch in ``turns``. If a batch raises an error, yield ({}, error) and stop, so that the caller can raise
    the error on all ranks.
    """
    try:
        for rows in turns:
            yield rows, None
    except InputError as error:
        yield {}, error
