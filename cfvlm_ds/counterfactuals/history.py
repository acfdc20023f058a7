"""The history of a shard's candidates: caption, proposal, and every attempt with its picture, measurements and verdict."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from cfvlm_ds.counterfactuals.judge import GOOD, Thresholds, Verdict, read_thresholds, verdict
from cfvlm_ds.counterfactuals.options import Rule
from cfvlm_ds.counterfactuals.work_folder import WorkFolder


@dataclass(frozen=True)
class Attempt:
    """One attempt at an edit: its records from the steps ``edit`` and ``verify``, and the verdict."""

    made: Mapping[str, Any]
    measured: Mapping[str, Any]
    verdict: Verdict
    picture: Path | None


@dataclass(frozen=True)
class Edited:
    """A proposal and its attempts, in order. ``excluded`` is True if the user rejected the edit."""

    proposal: Mapping[str, Any]
    excluded: bool = False
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def best(self) -> Attempt:
        """The good attempt whose smallest margin is largest or, if none is good, the attempt that passed the most stages."""
        return max(self.attempts, key=lambda attempt: (attempt.verdict.reason == GOOD, attempt.verdict.stage, attempt.verdict.worst))

    @property
    def reason(self) -> str:
        """Reason for rejecting the best attempt, or "" if it is good."""
        return "excluded by --exclude" if self.excluded else self.best.verdict.reason


@dataclass(frozen=True)
class History:
    """A source (a caption and its picture, if any) and its edits. ``picture`` is the original, or None."""

    id: str
    caption: str
    picture: Path | None
    license: str
    edits: list[Edited]


def thresholds_of(work: WorkFolder, file: str = "", rule: Rule | None = None, margin: float | None = None) -> Thresholds:
    """Read thresholds from ``file``. If ``file`` is "", use thresholds.json in the work folder, if it exists. If there is no file and no
    candidate was scored, the rule defaults to ``checks`` (pixels only).
    """
    own = work.path / "thresholds.json"
    given = file or (str(own) if own.is_file() else "")
    scored = work.settings("verify").get("scored") is True
    return read_thresholds(given, rule or (None if given or scored else "checks"), margin)


def histories(work: WorkFolder, shard: int, thresholds: Thresholds, excluded: Container[str] = ()) -> Iterator[History]:
    """Yield a shard's histories, one per source with candidates. Only one history is in memory at a time. ``excluded`` holds the ids of
    edits that the user rejected.
    """
    for source, records in groupby(work.records("verify", shard), key=lambda record: str(record["source"])):
        edits: dict[str, Edited] = {}
        for record in records:
            made = record.pop("made")
            proposal, caption, original, license = (made.pop(key) for key in ("proposal", "caption", "original", "license"))
            picture = work.picture(made["picture"]) if made.get("picture") else None
            attempt = Attempt(made, record, verdict(record, thresholds), picture)
            edits.setdefault(record["edit"], Edited(proposal, record["edit"] in excluded)).attempts.append(attempt)
        yield History(source, caption, None if original is None else Path(original), license, [*edits.values()])
