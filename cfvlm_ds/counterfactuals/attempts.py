"""Journals read side by side, in the order in which they were written: memory holds a record of each, whatever the shard has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.counterfactuals.options import MAX_ATTEMPTS
from cfvlm_ds.counterfactuals.work_folder import WorkFolder

Record = Mapping[str, Any]


def proposals(work: WorkFolder, shard: int) -> Iterator[tuple[Record, Record]]:
    """The proposals of a shard in their order, each with the record of its source."""
    for line in work.records("propose", shard):
        for each in line.get("edits", ()):
            yield line, each


def with_proposals(work: WorkFolder, shard: int) -> Iterator[tuple[Record, Record, Record]]:
    """The attempts of a shard in their order, each with its proposal and its source. First attempts at all edits come before the second
    ones, so the proposals are gone through once for each.

    Raises DataError for an attempt at no proposal.
    """
    found = proposals(work, shard)
    for record in work.records("edit", shard):
        name = record.get("edit")
        for again in (False, True):
            match = next(((line, each) for line, each in found if each["id"] == name), None)
            if match is not None:
                break
            if not again:
                found = proposals(work, shard)
        if match is None:
            raise DataError(f"{work.file('edit', shard)}: no attempt at a proposal is {name!r}; make the shard again")
        yield record, match[1], match[0]


class ByAttempt:
    """The records of a step of a shard, asked for in the order of the proposals: the journal is read once for each attempt."""

    def __init__(self, work: WorkFolder, step: str, shard: int) -> None:
        self._file = work.file(step, shard)
        most = work.settings("edit").get("attempts", 1)
        self._most = most if type(most) is int and 1 <= most <= MAX_ATTEMPTS else 1
        self._streams = [self._of(work, step, shard, attempt) for attempt in range(self._most)]
        self._next = [next(stream, None) for stream in self._streams]

    def _of(self, work: WorkFolder, step: str, shard: int, attempt: int) -> Iterator[Record]:
        for record in work.records(step, shard):
            number = record["attempt"]
            if number >= self._most:
                raise DataError(f"{self._file}: attempt {number!r} of {self._most}; make the shard again")
            if number == attempt:
                yield record

    def at(self, name: str) -> list[Record]:
        """The records of a proposal by attempt; the proposals before it have had theirs."""
        found = []
        for k, record in enumerate(self._next):
            if record is not None and record["edit"] == name:
                found.append(record)
                self._next[k] = next(self._streams[k], None)
        return found

    def end(self) -> None:
        """Raise DataError where records are left: they are of no proposal, or in another order."""
        left = next((record for record in self._next if record is not None), None)
        if left is not None:
            raise DataError(f"{self._file}: a record of {left['edit']!r} is of no proposal or out of order; make the shard again")
