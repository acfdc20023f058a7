"""The step ``propose``: every caption of a shard is shown to the back ends, and what they say is written down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.reading import read_yaml
from cfvlm_ds.core.sequences import side_by_side
from cfvlm_ds.core.strict import fitted
from cfvlm_ds.counterfactuals.options import ProposeOptions, named
from cfvlm_ds.counterfactuals.propose import PROPOSERS
from cfvlm_ds.counterfactuals.propose.base import Context, Found, Proposal, Rejected, Source, sources
from cfvlm_ds.counterfactuals.work_folder import ShardStep, WorkFolder, seed_of
from cfvlm_ds.data.store import GroupStore

STEP = "propose"
_LONGEST_ID = 1000  # characters: every record and every edit of a group has it

Say = Callable[[str], object]


def propose(store: GroupStore, out: Path, options: ProposeOptions, shard: int, say: Say, of: int = 1) -> dict[str, Any]:
    """Propose edits for a shard of so many; returns its completion. What an earlier call has done is not done again.

    Raises ConfigError for options that are unknown or differ from those of the work folder.
    """
    names = named(options.back_ends, PROPOSERS, "--with")
    if all(isinstance(entry, DataError) for _, entry in store.entries()):
        raise DataError(str(store.entry(0)) + f" (and so are all {len(store)} groups)" * (len(store) > 1))
    words = read_words(options.words)
    work = WorkFolder.begin(out, store, of)
    if (done := work.finished(STEP, shard, of, options, say)) is not None:
        return done
    context = Context(options, store, work, words, say)
    back_ends = {name: PROPOSERS[name](context) for name in names}
    work.settle(STEP, options, settings={name: dict(back_end.settings()) for name, back_end in back_ends.items()})
    places = range(shard, len(store), work.shards)
    threads = max(back_end.threads for back_end in back_ends.values())

    def asked(unit: Source | DataError) -> dict[str, Any]:
        return (
            {"problem": "unreadable", "detail": str(unit)}
            if isinstance(unit, DataError)
            else record_of(unit, [back_end.propose(unit) for back_end in back_ends.values()])
        )

    with ShardStep(work, STEP, shard) as step:
        units = step.remaining(_distinct(store, places), _named, say, len(places), "captions")
        for _, record in side_by_side(asked, units, threads, threads):
            step.add(record)
        return step.finish(counted, say)


def _named(unit: Source | DataError) -> dict[str, str]:
    return {"detail": str(unit)} if isinstance(unit, DataError) else {"source": unit.id, "caption": unit.caption}


def record_of(source: Source, answers: Iterable[Found]) -> dict[str, Any]:
    """What a journal has of a source: edits with ids of their own, and what was rejected with its reason."""
    said = [each for answer in answers for each in answer]
    edits: list[dict[str, Any]] = []
    rejected = [each.record() for each in said if isinstance(each, Rejected)]
    for each in said:
        if isinstance(each, Proposal):
            if any(each.text == other["text"] for other in edits):
                rejected.append(Rejected(each.back_end, "another back end proposed the same", each.type, each.text).record())
            else:
                edits.append(each.record(f"{source.id}/{len(edits)}"))
    found = {"source": source.id, "caption": source.caption, "picture": None if source.picture is None else str(source.picture.absolute())}
    return found | ({"license": source.license} if source.license else {}) | {"edits": edits, "rejected": rejected}


def counted(record: Mapping[str, Any], counts: Counter[str]) -> None:
    """Add what a record has: edits by type and back end, and what happened to the caption, which `select` tells too."""
    if "problem" in record:
        counts["rows that cannot be read"] += 1
        return
    counts["captions"] += 1
    counts["with a proposal"] += bool(record["edits"])
    for edit in record["edits"]:
        counts.update(["edits", f"edit: {edit['type']}", f"back end: {edit['back_end']}"])
    for each in record["rejected"]:
        counts["without a reply" if each.get("failed") else f"not proposed: {each['reason']}"] += 1


def _distinct(store: GroupStore, places: Sequence[int]) -> Iterator[Source | DataError]:
    """Yield the sources at some places, with what is wrong in place of one whose id was there before: histories are told apart by it."""
    seen = set[int]()
    for place in places:
        for source in sources(store, [place]):
            if not isinstance(source, DataError):
                if len(source.id) > _LONGEST_ID:
                    source = DataError(f"{store.where(place)}: an id of {len(source.id)} characters; shorten it to {_LONGEST_ID}")
                elif (number := seed_of(source.id)) in seen:
                    source = DataError(f"{store.where(place)}: id {source.id!r} is used by an earlier row; make ids unique")
                else:
                    seen.add(number)
            yield source


def read_words(file: str) -> dict[str, list[str]]:
    """A YAML of words by type. Raises ConfigError."""
    if not file:
        return {}
    try:
        found: dict[str, list[str]] = fitted(dict[str, list[str]], read_yaml(file), "words")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--words {file}: {error}; write YAML such as colour: [red, green]") from error
    return found
