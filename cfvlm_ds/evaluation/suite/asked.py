"""A model is asked benchmarks: each in its turn, with what is on disk already left as it is.

How items are cut into forwards follows from the items and the settings alone, never from the number of ranks or from where an evaluation
was killed. So the results are the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cfvlm_ds.batching.batch import BLANK
from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.cluster.run_lock import RunLock
from cfvlm_ds.core.distributed import Patience, World, agreed, gather_objects
from cfvlm_ds.core.errors import ConfigError, DataError, InputError, StorageError, unwritten
from cfvlm_ds.core.files import replace as write_whole
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup, Pictures
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.reading import open_regular
from cfvlm_ds.core.secrets import without_secrets
from cfvlm_ds.core.text import one_line
from cfvlm_ds.core.untrusted import refuse_link
from cfvlm_ds.core.versions import version
from cfvlm_ds.data.picture_index import Picture
from cfvlm_ds.evaluation.asking import Plan, Say, plan, written
from cfvlm_ds.evaluation.benchmarks import Item, Loaded, Outcome
from cfvlm_ds.evaluation.benchmarks.base import judged
from cfvlm_ds.evaluation.benchmarks.parsers import PARSERS, answer
from cfvlm_ds.evaluation.probes import Generate, Probe
from cfvlm_ds.evaluation.scoring import Forward, GroupScores, matrices, other_images, scored_batches, seen_as
from cfvlm_ds.evaluation.suite.bootstrap import drawn_together, draws_for
from cfvlm_ds.evaluation.suite.chosen import SKIP, Chosen
from cfvlm_ds.evaluation.suite.item_check import Checked, checked_items, example_of, fitting, token_lengths
from cfvlm_ds.evaluation.suite.tables import HEADING, markdown
from cfvlm_ds.evaluation.suite.written import (
    RESULTS,
    Partial,
    Result,
    bootstrap_of,
    kept,
    read_result,
    read_results,
    recorded,
    refuse_other,
    result_folder,
    taken,
    write_result,
)

MAX_TOKENS = 16_384
"""Tokens of a forward where nobody says: a hundred questions of a picture, whatever the model."""
_TABLES = "results.md"
_OF_MODEL = ("weights", "inputs", "adapter")


@dataclass(frozen=True)
class Asked:
    """A model that is asked: its forward, in evaluation mode on every rank, and what it is recognised by.

    ``identity`` has the hashes of its ``weights``, its ``inputs`` (see cfvlm_ds.models.identity) and, where it has adapters, its
    ``adapter``; where it writes, of its options of ``writing``. ``say`` writes greedily; None for a model that cannot, such as one in parts
    on several GPUs.
    """

    forward: Forward
    collator: Collator
    world: World
    name: str
    identity: Mapping[str, str]
    precision: Mapping[str, str]
    say: Callable[[int], Say] | None = None


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
        if (out / _TABLES).exists() and not _is_ours(out / _TABLES):
            raise ConfigError(f"{out / _TABLES} is not of an evaluation, and would be written over; name another folder with --out")
        try:
            out.mkdir(parents=True, exist_ok=True)
            held.append(RunLock(out, "folder with --out"))
        except OSError as error:
            raise StorageError(f"{unwritten(out, error)}; name another folder with --out") from error

    agreed(world, hold)
    try:
        with held[0] if held else contextlib.nullcontext():
            yield
    finally:
        if held:  # nothing is left of what was refused
            with contextlib.suppress(OSError):
                out.rmdir()


def _is_ours(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            return bool(file.read(len(HEADING)) == HEADING.encode())
    except (OSError, ValueError):
        return False


def evaluate_benchmarks(model: Asked, chosen: Sequence[tuple[Chosen, Loaded]], out: Path, settings: Settings) -> list[Result]:
    """Ask a model benchmarks whose items are loaded, and write the results below ``out``, one folder each, and ``results.md``.

    What is there already, of the same model on the same data, is not asked again. Every rank calls it; returns the results on all of them.

    Raises ConfigError for a folder with results of something else, DataError for an item that cannot be asked unless such are skipped.
    """
    world = model.world
    agreed(world, lambda: _refuse_another_model(out, model))
    if not model.collator.pictures_first:
        world.say(
            f"{model.name}: its chat template writes what is asked before the picture, so prompts of a picture share its encoding and no "
            "tokens; each is a tree of its own"
        )
    seen: dict[Path, Picture | str] = {}
    found = [_Evaluation(model, each, loaded, out, settings).result(seen) for each, loaded in chosen]

    def write() -> None:
        try:
            write_whole(out / _TABLES, (markdown(read_results(out)) + "\n").encode())
        except OSError as error:
            raise StorageError(f"{unwritten(out / _TABLES, error)}; make room, and start again: nothing is asked twice") from error

    agreed(world, write)
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
        self._patience = Patience(model.world)

    def result(self, seen: dict[Path, Picture | str]) -> Result:
        """What is on disk, or what the model says now; pictures that were ``seen`` are not opened again to be checked."""
        settings, world = self._settings, self._world
        checked = checked_items(self._loaded.items, self._chosen.way, self._model.collator, world, self._label, seen=seen)
        if checked.left_out and not (settings.skip and checked.items):
            more = f" ({len(checked.left_out) - 1} more)" if len(checked.left_out) > 1 else ""
            remedy = f"; {SKIP}" if checked.items else ""
            raise DataError(f"benchmark {self._chosen.name}: {checked.left_out[0][1]}{more}{remedy}")
        header = self._header(checked)
        found: Result | None = agreed(world, lambda: self._finished(header), self._patience)
        if found is not None:
            world.say(f"{self._label}: {len(found.outcomes)} items are in {self._folder} already")
            return found
        journal: Partial = agreed(world, lambda: Partial(result_folder(self._folder), header), self._patience)
        collator = self._model.collator.of_run("full", None, checked.pictures)
        outcomes = self._outcomes(checked, collator, journal)
        result = Result(self._chosen.name, self._chosen.label, self._record(header, checked, outcomes), tuple(outcomes))
        agreed(world, lambda: write_result(self._folder, result))
        return result

    def _header(self, checked: Checked) -> dict[str, Any]:
        """All that the scores depend on."""
        way, settings = self._chosen.way, self._settings
        return {
            "benchmark": self._chosen.name,
            "probe": {"name": way.name, **asdict(way)},  # type: ignore[arg-type]
            "model": {name: self._model.identity.get(name) for name in (*_OF_MODEL, *["writing"] * isinstance(way, Generate))},
            "data": checked.identity(),
            "settings": {
                "batch_size": settings.batch_size,
                "max_tokens_per_forward": settings.max_tokens,
                "shuffled": settings.shuffled,
                "limit": self._loaded.limit,
                **self._model.precision,
            },
            "versions": {name: version(name) for name in ("cfvlm-ds", "torch", "transformers")},
        }

    def _finished(self, header: Mapping[str, Any]) -> Result | None:
        if not (self._folder / RESULTS).is_file():
            return None
        found = read_result(self._folder)
        refuse_other(self._folder / RESULTS, found.record, header)
        return found

    def _record(self, header: Mapping[str, Any], checked: Checked, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """What results.json says."""
        draws = draws_for(len(outcomes)) if self._settings.draws is None else self._settings.draws
        left_out = [("", str(problem)) for problem in self._loaded.problems] + list(checked.left_out)

        def placed(said: str) -> str:
            """Without the place of the files on this machine."""
            return said.replace(f"{self._chosen.root.parent}/", "")

        return recorded(
            self._chosen.benchmark,
            {**header, "model": {"name": without_secrets(self._model.name), **header["model"]}},
            outcomes,
            drawn_together(
                self._world,
                bootstrap_of(outcomes),
                self._chosen.benchmark.metrics,
                judged(outcomes)["seen"],
                draws,
                self._label,
                self._patience,
            ),
            [(name, placed(why)) for name, why in left_out],
            [placed(note) for note in self._loaded.notes],
            in_files=self._loaded.in_files,
            **example_of(checked.items[0], self._chosen.way, self._model.collator),
        )

    # What the model says ---------------------------------------------------------------------------------------------------------------

    def _outcomes(self, checked: Checked, collator: Collator, journal: Partial) -> list[Outcome]:
        way = self._chosen.way
        if isinstance(way, Generate):
            return self._written(checked, way, journal)
        return self._scored(checked, way, collator, journal)

    def _scored(self, checked: Checked, probe: Probe, collator: Collator, journal: Partial) -> list[Outcome]:
        """Items by the likelihood of texts."""
        asked, settings = plan(checked.items, probe), self._settings
        donors = fitting(asked.groups, other_images(asked.groups), collator, checked.pictures) if settings.shuffled else None
        scores = {k: taken(row) for k, row in journal.rows.items()}
        progress = self._progress(len(asked.groups), len(scores), "groups")
        for pictured in (True, False):  # a text alone has no blank row of its own
            every = [k for k, group in enumerate(asked.groups) if bool(group.num_pictures) == pictured]
            views = seen_as(asked.groups, donors) if pictured else [asked.groups]
            batches = [every[start : start + settings.batch_size] for start in range(0, len(every), settings.batch_size)]
            left = [batch for batch in batches if not all(k in scores for k in batch)]
            for batch in self._batches(asked, views, left, donors, collator):
                agreed(self._world, partial(journal.add, {k: kept(each) for k, each in batch.items()}))
                scores |= batch
                progress.advance(len(batch))
        if broken := [asked.groups[k].id for k, found in scores.items() if not found.finite]:
            named = ", ".join(one_line(each, 60) for each in broken[:5])
            self._world.say(f"warning: {self._label}: scores of {len(broken)} groups are not finite, and count as wrong: {named}")
        lengths = token_lengths(collator) if probe.needs_lengths else None
        return asked.outcomes([scores[k] for k in range(len(asked.groups))], lengths)

    def _batches(
        self,
        asked: Plan,
        views: Sequence[Sequence[CounterfactualGroup]],
        batches: Sequence[list[int]],
        donors: Sequence[Pictures | None] | None,
        collator: Collator,
    ) -> Iterator[dict[int, GroupScores]]:
        """The scores of the groups of as many batches as there are ranks, on all of them, until there are no more."""
        world, settings = self._world, self._settings
        turns = -(-len(batches) // world.size)
        places = [turn * world.size + world.rank for turn in range(turns)]
        mine = [batches[place] if place < len(batches) else batches[-1][-1:] for place in places]  # ZeRO-3 waits for every rank
        options: dict[str, Any] = {"max_tokens": settings.max_tokens, "remedy": settings.remedy}
        scored = scored_batches(
            self._model.forward, collator, asked.groups, views, mine, world, settings.num_workers, self._label, **options
        )
        for place, (indices, found) in zip(places, scored, strict=True):
            own = matrices(asked.groups, indices, found, donors) if place < len(batches) else {}
            together: dict[int, GroupScores] = {}
            for part in gather_objects(own, world):
                together |= part
            yield together

    def _written(self, checked: Checked, way: Generate, journal: Partial) -> list[Outcome]:
        """Items by what the model writes about them; each rank writes about its own."""
        if self._model.say is None:
            raise ConfigError(
                "the probe generate needs a whole model on each rank, and this one is in parts; leave out --zero3, or name another probe"
            )
        say, world, settings = self._model.say(way.max_new_tokens), self._world, self._settings
        shown = [CounterfactualGroup(item.id, item.images, (Candidate("", "x"),), _first_true(item)) for item in checked.items]
        donors = other_images(shown) if settings.shuffled else [None] * len(shown)
        left = [k for k in range(len(checked.items)) if k not in journal.rows]
        progress = self._progress(len(checked.items), len(checked.items) - len(left), "items")
        for start in range(0, len(left), settings.batch_size * world.size):
            turn = left[start : start + settings.batch_size * world.size]
            own, problem = dict[int, dict[str, Any]](), None
            try:
                for k in turn[world.rank :: world.size]:
                    item, donor, asked = checked.items[k], donors[k], way.asked(checked.items[k])
                    own[k] = {"said": [say(image, asked) for image in item.images], "blank": say(_blank(item), asked)}
                    own[k] |= {} if donor is None else {"shuffled": say(donor, asked)}
                    self._patience.alive()
            except InputError as error:
                problem = error
            self._patience.meet()
            together: dict[int, dict[str, Any]] = {}
            for part, wrong in gather_objects((own, problem), world):
                if wrong is not None:
                    raise wrong
                together |= part
            agreed(world, partial(journal.add, together))
            journal.rows.update(together)
            progress.advance(len(turn))
        parse = PARSERS.get(self._chosen.name, answer)
        rows = [(item, journal.rows[k]) for k, item in enumerate(checked.items)]
        return [written(item, row["said"], row["blank"], row.get("shuffled"), parse) for item, row in rows]

    def _progress(self, total: int, done: int, unit: str) -> Progress:
        if done:
            self._world.say(f"{self._label}: {done} of {total} {unit} are on disk, and it goes on from there")
        return Progress(self._world.say, self._label, total - done, unit)


def _first_true(item: Item) -> tuple[tuple[int | None], ...]:
    return tuple((1 if i == 0 else None,) for i in range(len(item.images)))


def _blank(item: Item) -> Pictures:
    """As many blank pictures as the item shows."""
    return tuple(BLANK.with_suffix(f".{k}") for k in range(len(item.images[0])))
