"""The candidates of a shard with their history: caption, proposal, every attempt with its picture, measures and verdict.

Journals are read side by side, in the order in which they were written: memory holds a record of each, whatever the shard has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.counterfactuals.judge import GOOD, Thresholds, Verdict, read_thresholds, verdict
from cfvlm_ds.counterfactuals.work_folder import WorkFolder


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
        return "not tried yet" if self.best is None else self.best.verdict.reason


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
    """Yield the sources of a shard, those without edits too. Raises DataError for an attempt at no proposal, and for one out of order."""
    records = work.records("verify", shard)
    for line, edits in attempts(work, shard):
        if "problem" not in line:
            history = History(line, [Edited(proposal) for proposal, _ in edits])
            for edited, (_, tried) in zip(history.edits, edits, strict=True):
                for made in tried:
                    measured = next(records, None)
                    if measured is not None and any(made[key] != measured[key] for key in ("edit", "attempt")):
                        _refuse(work, "verify", shard, measured)
                    said = Verdict("not verified", -float("inf"), 0) if measured is None else verdict(measured, thresholds)
                    edited.attempts.append(Attempt(made, measured, said, work.picture(made["picture"]) if made.get("picture") else None))
            yield history
    if (measured := next(records, None)) is not None:
        _refuse(work, "verify", shard, measured)


Record = Mapping[str, Any]


def attempts(work: WorkFolder, shard: int) -> Iterator[tuple[Record, list[tuple[Record, list[Record]]]]]:
    """Yield the records of the step propose in a shard, each with its proposals and the attempts at each of them.

    Raises DataError for an attempt at no proposal.
    """
    records = work.records("edit", shard)
    made = next(records, None)
    for line in work.records("propose", shard):
        edits: list[tuple[Record, list[Record]]] = [(proposal, []) for proposal in line.get("edits", ())]
        for proposal, tried in edits:
            while made is not None and made["edit"] == proposal["id"]:
                tried.append(made)
                made = next(records, None)
        yield line, edits
    if made is not None:
        _refuse(work, "edit", shard, made)


def _refuse(work: WorkFolder, step: str, shard: int, record: Mapping[str, Any]) -> NoReturn:
    attempt = f"attempt {record.get('attempt')!r} at {record.get('edit')!r}"
    raise DataError(f"{work.file(step, shard)}: {attempt} is of no proposal or out of order; {work.again(step, shard)}")
