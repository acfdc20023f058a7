"""The candidates of a shard with their history: caption, proposal, every attempt with its picture, measures and verdict.

Journals are read side by side, in the order in which they were written: memory holds a record of each, whatever the shard has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.counterfactuals.judge import GOOD, Thresholds, Verdict, read_thresholds, verdict
from cfvlm_ds.counterfactuals.options import MAX_ATTEMPTS
from cfvlm_ds.counterfactuals.work_folder import WorkFolder

NOT_TRIED = "not tried: the budget of a step was spent"


@dataclass(frozen=True)
class Attempt:
    """One attempt: the records of the steps edit and verify, and the verdict."""

    made: Mapping[str, Any]
    measured: Mapping[str, Any] | None
    verdict: Verdict
    picture: Path | None

    @property
    def number(self) -> int:
        """Its place among the attempts at its edit."""
        return int(self.made["attempt"])


@dataclass(frozen=True)
class Edited:
    """A proposal with its attempts, in their order."""

    proposal: Mapping[str, Any]
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def best(self) -> Attempt | None:
        """The attempt with the largest worst margin among the good ones, or else the one that came farthest; None without any."""
        return max(
            self.attempts,
            key=lambda each: (each.verdict.reason == GOOD, each.verdict.stage, each.verdict.worst, -each.number),
            default=None,
        )

    @property
    def reason(self) -> str:
        """Why it is not good; empty where it is."""
        return NOT_TRIED if self.best is None else self.best.verdict.reason


@dataclass(frozen=True)
class History:
    """A source: its record of the step propose, and its edits."""

    line: Mapping[str, Any]
    edits: list[Edited]

    @property
    def id(self) -> str:
        """The source's id."""
        return str(self.line["source"])

    @property
    def picture(self) -> Path | None:
        """The original."""
        found = self.line.get("picture")
        return None if found is None else Path(str(found))


def thresholds_of(work: WorkFolder, file: str = "", rule: str = "", margin: float | None = None) -> Thresholds:
    """The thresholds that are given, or those of W/thresholds.json; only pixels decide where nothing is given and no candidate scored."""
    own = work.path / "thresholds.json"
    given = file or (str(own) if own.is_file() else "")
    scored = work.settings("verify").get("scored") is True
    return read_thresholds(given, rule or ("" if given or scored else "checks"), margin)


def histories(work: WorkFolder, shard: int, thresholds: Thresholds) -> Iterator[History]:
    """The sources of a shard, those without edits too. Raises DataError for an attempt at no proposal, and for one out of order."""
    most = work.settings("edit").get("attempts", 1)
    numbers = range(most if type(most) is int and 1 <= most <= MAX_ATTEMPTS else 1)
    streams = [_judged(work, shard, number, numbers, thresholds) for number in numbers]
    heads = [next(stream, None) for stream in streams]
    for line in work.records("propose", shard):
        if "problem" in line:
            continue
        history = History(line, [Edited(each) for each in line["edits"]])
        for edited in history.edits:
            for k, head in enumerate(heads):
                if head is not None and head.made["edit"] == edited.proposal["id"]:
                    edited.attempts.append(head)
                    heads[k] = next(streams[k], None)
        yield history
    if left := next(filter(None, heads), None):
        _refuse(work, "edit", shard, left.made)


def _judged(work: WorkFolder, shard: int, number: int, numbers: range, thresholds: Thresholds) -> Iterator[Attempt]:
    """The attempts of one number, in the order of the proposals. The step verify has a record of each attempt, as far as it is."""
    for made, measured in zip_longest(work.records("edit", shard), work.records("verify", shard)):
        if made is None or (measured is not None and any(made[key] != measured[key] for key in ("edit", "attempt"))):
            _refuse(work, "verify", shard, measured)
        if made["attempt"] not in numbers:
            _refuse(work, "edit", shard, made)
        if made["attempt"] == number:
            said = verdict(measured, thresholds) if measured is not None else Verdict("not verified", -float("inf"), 0)
            yield Attempt(made, measured, said, work.picture(made["picture"]) if made.get("picture") else None)


def with_proposals(work: WorkFolder, shard: int) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]]:
    """The attempts of a shard in their order, each with its proposal and its source. First attempts at all edits come before the second
    ones, so the proposals are gone through once for each.

    Raises DataError for an attempt at no proposal.
    """
    records = work.records("edit", shard)
    record = next(records, None)
    while record is not None:
        first = record
        for line in work.records("propose", shard):
            for proposal in line.get("edits", ()):
                if record is not None and record.get("edit") == proposal["id"]:
                    yield record, proposal, line
                    record = next(records, None)
        if record is first:
            _refuse(work, "edit", shard, record)


def _refuse(work: WorkFolder, step: str, shard: int, record: Mapping[str, Any]) -> NoReturn:
    attempt = f"attempt {record.get('attempt')!r} at {record.get('edit')!r}"
    raise DataError(f"{work.file(step, shard)}: {attempt} is of no proposal or out of order; {work.again(step, shard)}")
