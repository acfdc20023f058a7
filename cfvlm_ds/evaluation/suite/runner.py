"""A model is asked benchmarks: each in its turn, with what is on disk already left as it is.

How items are cut into forwards follows from the items and the settings alone, never from the number of ranks or from where an evaluation
was killed. So the results are the same bytes.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cfvlm_ds.batching.batch import BLANK
from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.cluster.run_lock import RunLock
from cfvlm_ds.core.distributed import ProgressBarrier, World, gather_objects, run_on_rank0
from cfvlm_ds.core.errors import ConfigError, InputError
from cfvlm_ds.core.files import replace as write_whole
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup, Pictures
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.secrets import without_secrets
from cfvlm_ds.core.untrusted import own_output, refuse_link
from cfvlm_ds.data.picture_index import Picture, PictureTable
from cfvlm_ds.evaluation.asking import Plan, plan, written
from cfvlm_ds.evaluation.benchmarks import Item, Loaded, Outcome
from cfvlm_ds.evaluation.benchmarks.parsers import PARSERS, answer
from cfvlm_ds.evaluation.probes import Generate
from cfvlm_ds.evaluation.scoring import Forward, matrices, other_images, scored_batches, seen_as, warn_of_nonfinite
from cfvlm_ds.evaluation.suite.bootstrap import drawn_together
from cfvlm_ds.evaluation.suite.item_check import Checked, checked_items, example_of, token_lengths
from cfvlm_ds.evaluation.suite.results import (
    RESULTS,
    Partial,
    Result,
    kept,
    read_result,
    read_results,
    recorded,
    refuse_other,
    result_folder,
    taken,
    write_result,
)
from cfvlm_ds.evaluation.suite.selection import Chosen, refuse_problems
from cfvlm_ds.evaluation.suite.tables import HEADING, markdown

_Rows = dict[int, dict[str, Any]]
"""What is kept of groups or items, by their numbers."""
MAX_TOKENS = 16_384
"""Tokens of a forward where nobody says: a hundred questions of a picture, whatever the model."""
_TABLES = "results.md"
_OF_MODEL = ("weights", "inputs", "adapter")


@dataclass(frozen=True)
class Asked:
    """A model that is asked: its forward, in evaluation mode on every rank, and what it is recognised by.

    ``identity`` has the hashes of its ``weights``, its ``inputs`` (see cfvlm_ds.models.identity) and, where it has adapters, its
    ``adapter``; where it writes, of its options of ``writing``. ``say`` writes so many tokens at most about pictures, when it is asked a
    prompt; None for a model that cannot, such as one in parts on several GPUs.
    """

    forward: Forward
    collator: Collator
    world: World
    name: str
    identity: Mapping[str, str]
    precision: Mapping[str, str]
    say: Callable[[Pictures, str, int], str] | None = None


@dataclass(frozen=True)
class Settings:
    """How benchmarks are asked.

    Args:
        batch_size: groups of items in a batch.
        max_tokens: tokens of a forward at most; a larger batch is scored in several. None: one forward per batch.
        num_workers: processes that prepare batches, per rank.
        shuffled: also show each item another one's picture.
        skip: leave out items that cannot be asked, counted and named; otherwise the first of them is an error.
        draws: of the bootstrap; by the number of items where not given.
        remedy: what to lower where memory runs out.
    """

    batch_size: int = 16
    max_tokens: int | None = MAX_TOKENS
    num_workers: int = 0
    shuffled: bool = True
    skip: bool = False
    draws: int | None = None
    remedy: str = "lower the batch size"


@contextlib.contextmanager
def results_held(out: Path, world: World) -> Iterator[None]:
    """The folder of results is this evaluation's alone. Raises ConfigError on all ranks where it is another's, or cannot be one."""
    held: list[RunLock] = []

    def hold() -> None:
        refuse_link(out, "name the folder itself with --out")
        if out.exists() and not out.is_dir():
            raise ConfigError(f"{out} is a file, and results are a folder; name another one with --out")
        if (out / "config.yaml").exists():
            raise ConfigError(f"{out} is a training's folder, whose own results would be written over; name another one with --out")
        own_output(out / _TABLES, lambda file: file.read(len(HEADING)) == HEADING.encode(), "evaluate")
        held.append(RunLock(out, "folder with --out"))

    run_on_rank0(world, hold)
    try:
        with held[0] if held else contextlib.nullcontext():
            yield
    finally:
        if held:  # nothing is left of what was refused
            with contextlib.suppress(OSError):
                out.rmdir()


def evaluate_benchmarks(model: Asked, chosen: Sequence[tuple[Chosen, Loaded]], out: Path, settings: Settings) -> list[Result]:
    """Ask a model benchmarks whose items are loaded, and write the results below ``out``, one folder each, and ``results.md``.

    What is there already, of the same model on the same data, is not asked again. Every rank calls it; returns the results on all of them.

    Raises ConfigError for a folder with results of something else, DataError for an item that cannot be asked unless such are skipped.
    """
    world = model.world
    run_on_rank0(world, lambda: _refuse_another_model(out, model))
    if not model.collator.pictures_first:
        world.say(
            f"{model.name}: its chat template writes what is asked before the picture, so prompts of a picture share its encoding and no "
            "tokens; each is a tree of its own"
        )
    seen: dict[Path, Picture | str] = {}
    found = [_Evaluation(model, each, loaded, out, settings).result(seen) for each, loaded in chosen]
    run_on_rank0(world, lambda: write_whole(out / _TABLES, (markdown(read_results(out)) + "\n").encode()))
    return found


def _refuse_another_model(out: Path, model: Asked) -> None:
    now = {name: model.identity.get(name) for name in _OF_MODEL}
    for path in sorted(out.glob(f"*/*/{RESULTS}")):
        before = read_result(path.parent).record["model"]
        refuse_other(path, {"model": {name: before.get(name) for name in _OF_MODEL}}, {"model": now})


class _Evaluation:
    """One benchmark asked in one way."""

    def __init__(self, model: Asked, chosen: Chosen, loaded: Loaded, out: Path, settings: Settings) -> None:
        self._model, self._chosen, self._loaded, self._settings = model, chosen, loaded, settings
        self._world, self._label = model.world, f"{chosen.name} ({chosen.label})"
        self._folder = out / chosen.name / chosen.label
        self._barrier = ProgressBarrier(model.world)

    def result(self, seen: dict[Path, Picture | str]) -> Result:
        """What is on disk, or what the model says now; pictures that were ``seen`` are not opened again to be checked."""
        settings, world = self._settings, self._world
        checked = checked_items(self._loaded.items, self._chosen.way, self._model.collator, world, self._label, seen=seen)
        refuse_problems(self._chosen.name, [why for _, why in checked.left_out], len(checked.items), settings.skip)
        header = self._header(checked)
        found: Result | None = run_on_rank0(world, lambda: self._finished(header), self._barrier)
        if found is not None:
            world.say(f"{self._label}: {len(found.outcomes)} items are in {self._folder} already")
            return found
        journal: Partial = run_on_rank0(world, lambda: Partial(result_folder(self._folder), header), self._barrier)
        outcomes = self._outcomes(checked, journal)
        result = Result(self._chosen.name, self._chosen.label, self._record(header, checked, outcomes), tuple(outcomes))
        run_on_rank0(world, lambda: write_result(self._folder, result))
        return result

    def _header(self, checked: Checked) -> dict[str, Any]:
        """All that the scores depend on."""
        settings = self._settings
        of_model = (*_OF_MODEL, *["writing"] * isinstance(self._chosen.way, Generate))
        said = {
            "batch_size": settings.batch_size,
            "max_tokens_per_forward": settings.max_tokens,
            "shuffled": settings.shuffled,
            "limit": self._loaded.limit,
            **self._model.precision,
        }
        return self._chosen.header({name: self._model.identity.get(name) for name in of_model}, checked.identity(), said)

    def _finished(self, header: Mapping[str, Any]) -> Result | None:
        if not (self._folder / RESULTS).is_file():
            return None
        found = read_result(self._folder)
        refuse_other(self._folder / RESULTS, found.record, header)
        return found

    def _record(self, header: Mapping[str, Any], checked: Checked, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """What results.json says."""
        left_out = [("", str(problem)) for problem in self._loaded.problems] + list(checked.left_out)

        def placed(said: str) -> str:
            """Without the place of the files on this machine."""
            return said.replace(f"{self._chosen.root.parent}/", "")

        return recorded(
            self._chosen.benchmark,
            {**header, "model": {"name": without_secrets(self._model.name), **header["model"]}},
            outcomes,
            drawn_together(self._world, outcomes, self._chosen.benchmark.metrics, self._settings.draws, self._label, self._barrier),
            [(name, placed(why)) for name, why in left_out],
            [placed(note) for note in self._loaded.notes],
            in_files=self._loaded.in_files,
            **example_of(checked.items[0], self._chosen.way, self._model.collator),
        )

    # What the model says ---------------------------------------------------------------------------------------------------------------

    def _outcomes(self, checked: Checked, journal: Partial) -> list[Outcome]:
        way, rows, world = self._chosen.way, journal.rows, self._world
        if isinstance(way, Generate):
            held, turns = Counter(range(len(checked.items))), self._written(checked.items, way, rows)
        else:
            asked = plan(checked.items, way)
            held, turns = Counter(group for group, _ in asked.places), self._scored(asked, checked.pictures, rows)
        total, on_disk = len(checked.items), sum(held[k] for k in rows)
        if rows:
            world.say(f"{self._label}: {on_disk} of {total} items are on disk, and it goes on from there")
        progress = Progress(world.say, self._label, total - on_disk, "items")
        for own in _with_problem(turns):
            self._barrier.meet()
            together: _Rows = {}
            for part, wrong in gather_objects(own, world):
                if wrong is not None:
                    raise wrong
                together |= part
            run_on_rank0(world, partial(journal.add, together))
            rows |= together
            progress.advance(sum(held[k] for k in together))
        if isinstance(way, Generate):
            parse = PARSERS.get(self._chosen.name, answer)
            found = [(item, rows[k]) for k, item in enumerate(checked.items)]
            return [written(item, row["said"], row["blank"], row.get("shuffled"), parse) for item, row in found]
        scores = [taken(rows[k]) for k in range(len(asked.groups))]
        warn_of_nonfinite(asked.groups, scores, world, self._label)
        return asked.outcomes(scores, token_lengths(self._model.collator))

    def _scored(self, asked: Plan, pictures: PictureTable, known: _Rows) -> Iterator[_Rows]:
        """The scores of this rank's groups, a batch at a time; those that are ``known`` are not scored again."""
        groups, settings = asked.groups, self._settings
        collator = self._model.collator.of_run("full", None, pictures)
        donors = other_images(groups) if settings.shuffled else None
        options: dict[str, Any] = {"max_tokens": settings.max_tokens, "remedy": settings.remedy}
        for pictured in (True, False):  # a text alone has no blank row of its own
            every = [k for k, group in enumerate(groups) if bool(group.num_pictures) == pictured]
            batches = [every[start : start + settings.batch_size] for start in range(0, len(every), settings.batch_size)]
            left = [batch for batch in batches if not all(k in known for k in batch)]
            views = seen_as(groups, donors) if pictured else [groups]
            turns = scored_batches(
                self._model.forward, collator, groups, views, left, self._world, settings.num_workers, self._label, **options
            )
            for indices, scored in turns:
                yield {k: kept(scores) for k, scores in matrices(groups, indices, scored, donors).items()}

    def _written(self, items: Sequence[Item], way: Generate, known: _Rows) -> Iterator[_Rows]:
        """What the model writes about this rank's items, a batch at a time."""
        say, world, settings, most = self._model.say, self._world, self._settings, way.max_new_tokens
        if say is None:
            raise ConfigError(
                "the probe generate needs a whole model on each rank, and this one is in parts; leave out --zero3, or name another probe"
            )
        shown = [
            CounterfactualGroup(each.id, each.images, (Candidate("", "x"),), ((1,), *[(None,)] * (len(each.images) - 1))) for each in items
        ]
        donors = other_images(shown) if settings.shuffled else [None] * len(shown)
        left = [k for k in range(len(items)) if k not in known]
        for start in range(0, len(left), settings.batch_size * world.size):
            own: _Rows = {}
            for k in left[start : start + settings.batch_size * world.size][world.rank :: world.size]:
                item, donor, asked = items[k], donors[k], way.asked(items[k])
                blank = tuple(BLANK.with_suffix(f".{number}") for number in range(len(item.images[0])))
                own[k] = {"said": [say(image, asked, most) for image in item.images], "blank": say(blank, asked, most)}
                own[k] |= {} if donor is None else {"shuffled": say(donor, asked, most)}
                self._barrier.alive()
            yield own


def _with_problem(turns: Iterator[_Rows]) -> Iterator[tuple[_Rows, InputError | None]]:
    """The turns of a rank, and what ended them, which all ranks have to know."""
    try:
        for own in turns:
            yield own, None
    except InputError as error:
        yield {}, error
