"""The candidates of a shard with their history: caption, proposal, every attempt with its picture, measures and verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfvlm_ds.counterfactuals.attempts import ByAttempt
from cfvlm_ds.counterfactuals.judge import GOOD, Thresholds, Verdict, verdict
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


def histories(work: WorkFolder, shard: int, thresholds: Thresholds) -> Iterator[History]:
    """The sources of a shard, those without edits too."""
    made, measured = ByAttempt(work, "edit", shard), ByAttempt(work, "verify", shard)
    for line in work.records("propose", shard):
        if "problem" in line:
            continue
        edits = []
        for each in line["edits"]:
            found = Edited(each)
            seen = {record["attempt"]: record for record in measured.at(each["id"])}
            for tried in made.at(each["id"]):
                record = seen.get(tried["attempt"])
                said = verdict(record, thresholds) if record is not None else Verdict("not verified", -float("inf"), 0)
                found.attempts.append(Attempt(tried, record, said, work.picture(tried["picture"]) if tried.get("picture") else None))
            edits.append(found)
        yield History(line, edits)
    made.end()
    measured.end()
