"""Step ``propose``: back ends propose edits for every caption of a shard. All proposals and rejections are recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.progress import Say
from cfvlm_ds.core.reading import read_yaml
from cfvlm_ds.core.sequences import side_by_side
from cfvlm_ds.core.strict import fitted
from cfvlm_ds.counterfactuals.options import ProposeOptions, named
from cfvlm_ds.counterfactuals.propose import PROPOSERS
from cfvlm_ds.counterfactuals.propose.base import Context, Found, Proposal, Rejected, Source, sources
from cfvlm_ds.counterfactuals.work_folder import ShardStep, WorkFolder, seed_of
from cfvlm_ds.data.picture_file import picture_file
from cfvlm_ds.data.store import GroupStore

STEP = "propose"


def _refuse_without_pictures(store: GroupStore) -> None:
    sample = [group for _, group in store.entries(range(0, len(store), len(store) // 100 + 1)) if not isinstance(group, DataError)]
    pictures = [path for group in sample for path in group.images[0]]
    if pictures and not any(picture_file(path).is_file() for path in pictures):
        found = f"none of the pictures of {len(sample)} groups exists, for example {pictures[0]}"
        raise DataError(f"{store.path}: {found}; name the pictures' folder (--root), or correct the column with their names")


def propose(store: GroupStore, out: Path, options: ProposeOptions, shard: int, say: Say, of: int | None = 1) -> dict[str, Any]:
    """Propose edits for shard ``shard`` (0 to ``of`` - 1), and return its completion record. Work that an earlier call finished is not
    repeated.

    Raises ConfigError if a back end is unknown or options differ from those recorded in the work folder, and DataError if no row is usable
    or, in a new work folder, if none of a sample's pictures exists.
    """
    names = named(options.back_ends, PROPOSERS, "--with")
    if all(isinstance(entry, DataError) for _, entry in store.entries()):
        raise DataError(str(store.entry(0)) + f" (none of the {len(store)} groups is usable)" * (len(store) > 1))
    words = read_words(options.words)
    if not out.exists():
        _refuse_without_pictures(store)
    work = WorkFolder.begin(out, store, of)
    if (done := work.finished(STEP, shard, of, options, say)) is not None:
        return done
    context = Context(options, store, work, words, say)
    back_ends = {name: PROPOSERS[name](context) for name in names}
    work.settle(STEP, options, settings={name: dict(back_end.settings()) for name, back_end in back_ends.items()})
    places = range(shard, len(store), work.shards)
    threads = max(back_end.threads for back_end in back_ends.values())

    def propose_for(unit: Source | DataError) -> dict[str, Any]:
        return (
            {"problem": "unreadable", "detail": str(unit)}
            if isinstance(unit, DataError)
            else record_of(unit, [back_end.propose(unit) for back_end in back_ends.values()])
        )

    with ShardStep(work, STEP, shard) as step:
        units = step.remaining(_distinct(store, places), _named, say, len(places), "captions")
        for _, record in side_by_side(propose_for, units, threads, threads):
            step.add(record)
        return step.finish(counted, say)


def _named(unit: Source | DataError) -> dict[str, str]:
    return {"detail": str(unit)} if isinstance(unit, DataError) else {"source": unit.id, "caption": unit.caption}


def record_of(source: Source, answers: Iterable[Found]) -> dict[str, Any]:
    """Build the journal record of a source: edits with ids, and rejections with reasons."""
    results = [result for answer in answers for result in answer]
    edits: list[dict[str, Any]] = []
    rejected = [result.record() for result in results if isinstance(result, Rejected)]
    for result in results:
        if isinstance(result, Proposal):
            if any(result.text == other["text"] for other in edits):
                rejected.append(Rejected(result.back_end, "another back end proposed the same text", result.type, result.text).record())
            else:
                edits.append(result.record(f"{source.id}/{len(edits)}"))
    picture = None if source.picture is None else str(source.picture.absolute())
    record = {"source": source.id, "caption": source.caption, "picture": picture}
    return record | ({"license": source.license} if source.license else {}) | {"edits": edits, "rejected": rejected}


def counted(record: Mapping[str, Any], counts: Counter[str]) -> None:
    """Add a record to the counts: edits by type and back end, and rejections by reason."""
    if "problem" in record:
        counts["rows that cannot be read"] += 1
        return
    counts["captions"] += 1
    counts["with a proposal"] += bool(record["edits"])
    for edit in record["edits"]:
        counts.update(["edits", f"edit: {edit['type']}", f"back end: {edit['back_end']}"])
    for rejected in record["rejected"]:
        counts["without a reply" if rejected.get("failed") else f"not proposed: {rejected['reason']}"] += 1


def _distinct(store: GroupStore, places: Sequence[int]) -> Iterator[Source | DataError]:
    """Yield the sources of the rows with the indices ``places``. A source whose id has already occurred is replaced by an error, because
    later steps identify a source by its id.
    """
    seen = set[int]()
    for place in places:
        for source in sources(store, [place]):
            if not isinstance(source, DataError):
                if (number := seed_of(source.id)) in seen:
                    source = DataError(f"{store.where(place)}: id {source.id!r} is used by an earlier row; make ids unique")
                else:
                    seen.add(number)
            yield source


def read_words(file: str) -> dict[str, list[str]]:
    """Read a YAML file that maps edit types to words. Raises ConfigError if it is invalid."""
    if not file:
        return {}
    try:
        words: dict[str, list[str]] = fitted(dict[str, list[str]], read_yaml(file), "words")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--words {file}: {error}; write YAML such as colour: [red, green]") from error
    return words
