"""The step ``propose``: every caption of a shard is shown to the back ends, and what they say is written down."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.reading import read_yaml
from cfvlm_ds.core.sequences import side_by_side
from cfvlm_ds.core.text import printable
from cfvlm_ds.counterfactuals.options import ProposeOptions
from cfvlm_ds.counterfactuals.propose import PROPOSERS
from cfvlm_ds.counterfactuals.propose.base import Context, Found, Proposal, Proposer, Rejected, Source, sources
from cfvlm_ds.counterfactuals.propose.places import places_of
from cfvlm_ds.counterfactuals.work_folder import ShardStep, WorkFolder, seed_of
from cfvlm_ds.data.store import GroupStore

STEP = "propose"
_NOT_MEANING = ("llm_calls", "llm_timeout_s", "llm_attempts", "words")
"""Options that may change when a step goes on."""
_LONGEST_ID = 1000  # characters: every record and every edit of a group has it

Say = Callable[[str], object]


def propose(store: GroupStore, out: Path, options: ProposeOptions, shard: int, say: Say, of: int = 1) -> dict[str, Any]:
    """Propose edits for a shard of so many; returns its completion. What an earlier call has done is not done again.

    Raises ConfigError for options that are unknown or differ from those of the work folder.
    """
    names = named(options.back_ends, PROPOSERS, "--with")
    if all(isinstance(entry, DataError) for k in range(len(store)) for entry in store.batch([k])):
        raise DataError(str(store.batch([0])[0]) + f" (and so are all {len(store)} groups)" * (len(store) > 1))
    words = read_words(options.words)
    said = settings_of(options)
    work = WorkFolder.begin(out, store, of)
    if (done := work.finished(STEP, shard, of, said)) is not None:
        say(f"{out}: propose is through with shard {shard}")
        return done
    context = Context(options, store, work, words, say)
    back_ends = {name: PROPOSERS[name](context) for name in names}
    own = {name: dict(back_end.settings()) for name, back_end in back_ends.items()}
    work.settle(STEP, {**said, "settings": own})
    places = places_of(store, work, shard, say)
    with ShardStep(work, STEP, shard) as step:
        _through(step, _distinct(store, places), back_ends, say, len(places))
        return step.finish(counted)


def settings_of(options: ProposeOptions) -> dict[str, Any]:
    """What of the options decides the proposals."""
    return {key: value for key, value in asdict(options).items() if key not in _NOT_MEANING} | {"types": ",".join(options.wanted)}


def _through(step: ShardStep, units: Iterator[Source | DataError], back_ends: Mapping[str, Proposer], say: Say, total: float) -> None:
    """Propose for every unit that has no record yet."""
    problems: list[str] = []
    for record, unit in zip(step.work.records(STEP, step.shard), units, strict=False):
        problems += [str(unit)] if isinstance(unit, DataError) and not problems else []
        step.expect(record, **({"problem": str(unit)} if isinstance(unit, DataError) else {"source": unit.id, "caption": unit.caption}))
    progress = Progress(say, STEP, max(total - step.count, 1), "captions")
    threads = max(back_end.threads for back_end in back_ends.values())
    made = 0
    for unit, answers in _asked(units, back_ends, threads):
        if isinstance(unit, DataError):
            problems += [str(unit)] if not problems else []
            step.add({"problem": str(unit)})
        else:
            record = record_of(unit, answers)
            made += len(record["edits"])
            step.add(record)
        progress.advance()
    say(f"{STEP}: shard {step.shard}: {made} edits proposed")
    if problems:
        say(f"warning: some rows cannot be used, and are counted as unreadable; the first: {problems[0]}")


def _asked(
    units: Iterator[Source | DataError], back_ends: Mapping[str, Proposer], threads: int
) -> Iterator[tuple[Source | DataError, list[Found]]]:
    """The units in their order with what each back end says of them; a bounded number of them is asked about side by side."""

    def ask(unit: Source | DataError) -> list[Found]:
        return [] if isinstance(unit, DataError) else [back_end.propose(unit) for back_end in back_ends.values()]

    return side_by_side(ask, units, threads, threads)


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
    """Add what a record has: edits by type and back end, reasons."""
    if "problem" in record:
        counts["unreadable rows"] += 1
        return
    counts["captions"] += 1
    for edit in record["edits"]:
        counts["edits"] += 1
        counts[f"edit: {edit['type']}"] += 1
        counts[f"back end: {edit['back_end']}"] += 1
    for each in record["rejected"]:
        counts["failed" if each.get("failed") else f"rejected: {each['back_end']}: {each['reason'][:80]}"] += 1


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


def named(listed: str, known: Mapping[str, Any], option: str) -> list[str]:
    """The back ends of a list. Raises ConfigError for one that is not known."""
    names = list(dict.fromkeys(name.strip() for name in listed.split(",") if name.strip()))
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"{option} {name}: no such back end; {hint}")
    if not names:
        raise ConfigError(f"{option} names none; there are {', '.join(known)}")
    return names


def read_words(file: str) -> dict[str, list[str]]:
    """A YAML of words by type. Raises ConfigError."""
    if not file:
        return {}
    try:
        value = read_yaml(file)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--words {file}: cannot be read ({error}); write YAML such as colour: [red, green]") from error
    right = isinstance(value, dict) and all(
        isinstance(kind, str) and isinstance(words, list) and all(isinstance(word, str) for word in words) for kind, words in value.items()
    )
    if not right:
        raise ConfigError(f"--words {file}: lists of words by type are wanted; write YAML such as colour: [red, green]")
    for kind, words in value.items():
        for word in words:
            if not word or printable(word.strip()) != word:
                raise ConfigError(f"--words {file}: {word!r} of {kind!r} is no word; write a word of one line")
    return {kind: list(words) for kind, words in value.items()}
