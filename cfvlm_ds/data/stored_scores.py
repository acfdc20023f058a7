"""Stored scores: log-likelihoods of a manifest's texts under a fixed model, given each image and given a blank image. ``cfvlm-ds score``
writes them once; DPO and PMI runs read them.

The first line of a file is a header {"schema": "cfscores/3", "data": identity, "groups": n, "model": name, "weights": sha256, "inputs":
sha256, "dtype": "bfloat16"}. Each further line holds one group's scores: {"id": ..., "logp": [I][C] nats, "blank": [C] nats}. ``data``
identifies the scored groups (see cfvlm_ds.data.identity). ``weights`` and ``inputs`` identify the model (see cfvlm_ds.models.identity); a
run that records its own scores omits them and ``dtype``. A line is read when its group is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.files import whole_file
from cfvlm_ds.core.groups import CounterfactualGroup, Groups
from cfvlm_ds.core.progress import Progress, Say, no_op
from cfvlm_ds.core.reading import MALFORMED, lines, open_regular, parse_json
from cfvlm_ds.core.text import hashed, quoted
from cfvlm_ds.data.identity import Identity, changes
from cfvlm_ds.data.lines import MAX_LINE as MAX_LINE
from cfvlm_ds.data.lines import IndexedLines

SCHEMA = "cfscores/3"
_FLOAT32 = 3e38  # larger values become infinite in a float32 tensor


@dataclass(frozen=True)
class StoredScores:
    """Scores of one group under the reference model, in nats: ``logp[i][c]`` = log p(text c | image i), ``blank[c]`` = log p(text c |
    blank).
    """

    logp: tuple[tuple[float, ...], ...]
    blank: tuple[float, ...]


ScoresById = Mapping[str, StoredScores]
"""Group id -> scores."""


def write_scores(
    path: Path,
    groups: Groups,
    scores: ScoresById,
    model: str,
    data: Identity,
    *,
    made_by: Mapping[str, str] | None = None,
) -> None:
    """Write the scores of every group to ``path``. An existing file is replaced when the new one is complete. Raises KeyError for a group
    without scores.

    ``data`` is the groups' identity (data_identity). A reader compares it with the identity of its own groups. ``made_by`` is the model's
    fingerprint and dtype.
    """
    with whole_file(path) as handle:
        handle.writelines(score_lines(groups, scores, model, data, made_by=made_by))


def score_lines(
    groups: Groups,
    scores: ScoresById,
    model: str,
    data: Identity,
    *,
    made_by: Mapping[str, str] | None = None,
) -> Iterator[bytes]:
    """Yield the lines of a scores file: the header, and one line per group."""
    yield json.dumps({"schema": SCHEMA, "data": data, "groups": len(groups), "model": model, **(made_by or {})}).encode() + b"\n"
    for group in groups:
        stored = scores[group.id]
        yield json.dumps({"id": group.id, "logp": stored.logp, "blank": stored.blank}).encode() + b"\n"


def is_written(file: IO[bytes]) -> bool:
    """Return whether a file was written by ``cfvlm-ds score``, in this or an older schema, and not by a run's evaluation."""
    header = parse_json(next(lines(file, MAX_LINE)).decode())
    return str(header["schema"]).startswith(SCHEMA.partition("/")[0]) and "weights" in header


def dtype_of(path: Path) -> str | None:
    """Return the dtype in which a file's scores were computed, or None if the file does not name it."""
    with open_regular(path) as file:
        dtype: str | None = parse_json(next(lines(file, MAX_LINE)).decode()).get("dtype")
    return dtype


class ScoresFile(Mapping[str, StoredScores]):
    """Mapping from group ids to scores, which are read from a file on access. It takes 16 bytes of memory per group, plus the line index.

    Args:
        rows: lines of the file; the first line is the header.
        keys: hash of the id in each further line.
    """

    def __init__(self, rows: IndexedLines, keys: npt.NDArray[np.uint64]) -> None:
        self._rows, order = rows, np.argsort(keys, kind="stable")
        self._keys, self._places = keys[order], order + 1

    def __getitem__(self, group_id: str) -> StoredScores:
        if (place := self.row_of(group_id)) is None:
            raise KeyError(group_id)
        return _scores_of(_parsed(self._rows, place))

    def __iter__(self) -> Iterator[str]:
        return (_parsed(self._rows, place)["id"] for place in range(1, len(self._rows)))

    def __len__(self) -> int:
        return len(self._keys)

    def row_of(self, group_id: str) -> int | None:
        """Return the index of a group's line, or None if the file has no scores of the group. The header is line 0."""
        key = np.uint64(_key(group_id))
        for at in range(int(self._keys.searchsorted(key)), len(self._keys)):
            if self._keys[at] != key:
                break
            if _parsed(self._rows, place := int(self._places[at]))["id"] == group_id:
                return place
        return None


class ScoresOfSources(Mapping[str, StoredScores]):
    """Mapping from the ids of a mixture's groups (SOURCE/ID) to scores. Sources without scores are left out."""

    def __init__(self, sources: Mapping[str, ScoresById]) -> None:
        self._sources = sources

    def __getitem__(self, group_id: str) -> StoredScores:
        source, _, name = group_id.partition("/")
        return self._sources[source][name]

    def __iter__(self) -> Iterator[str]:
        return (f"{source}/{name}" for source, scores in self._sources.items() for name in scores)

    def __len__(self) -> int:
        return sum(map(len, self._sources.values()))


def read_scores(
    path: Path,
    groups: Groups,
    data: Identity,
    *,
    made_by: Mapping[str, str] | None = None,
    say: Say = no_op,
) -> ScoresById:
    """Open a scores file as a mapping from group ids to scores. Scores are read on access, so they are not kept in memory.

    Raises DataError for a missing or incomplete file, for a value that is not finite, and for scores of groups with different ids, texts,
    prompts or pictures. If ``made_by`` is given, DataError is also raised for scores from different weights or a different tokenizer,
    processor or template. The groups' order, labels and weights may have changed, because no score depends on them.

    ``data`` is the groups' identity, computed with the data roots of the groups. ``say`` receives progress lines.
    """
    if not os.path.exists(path):
        raise DataError(f"{path}: no such scores file; {_REMEDY}")
    try:
        rows = IndexedLines.scanned(path)
        if not len(rows):
            raise ValueError("it is empty")
        _check_header(path, _parsed(rows, 0), data, made_by)
        keys = (_key(_parsed(rows, place)["id"]) for place in range(1, len(rows)))
        scores = ScoresFile(rows, np.fromiter(keys, np.uint64, len(rows) - 1))
        if len(scores) > len(groups):
            raise ValueError(f"it has {len(scores)} groups instead of {len(groups)}")
        for group in Progress(say, f"{path}: scores", len(groups), "groups").over(groups):
            if (place := scores.row_of(group.id)) is None:
                raise DataError(f"{path}: no scores for group {group.id!r} (the file is incomplete, or contains a group twice); {_REMEDY}")
            _check_matrix(rows, place, group, _scores_of(_parsed(rows, place)))
        return scores
    except MALFORMED as error:
        if isinstance(error, DataError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path}: not a scores file ({reason}); {_REMEDY}") from error


_REMEDY = "write it again with `cfvlm-ds score`"


def _check_header(path: Path, header: Any, data: Identity, made_by: Mapping[str, str] | None) -> None:
    if header["schema"] != SCHEMA:
        raise DataError(f"{path}: schema {quoted(header['schema'])} is not {SCHEMA!r}; {_REMEDY}")
    if what := changes(header["data"], data, of_scores=True):
        raise DataError(f"{path}: these scores belong to another manifest, which differs in {what}; {_REMEDY}")
    for part, value in (made_by or {}).items():
        if header.get(part) != value:
            what = {"weights": "other weights", "inputs": "another tokenizer, processor or chat template"}[part]
            raise DataError(f"{path}: these scores were computed by {quoted(header['model'])} with {what} than this run's model; {_REMEDY}")


def _check_matrix(rows: IndexedLines, place: int, group: CounterfactualGroup, scores: StoredScores) -> None:
    rows_of = [*scores.logp, scores.blank]
    images, texts = len(group.images), len(group.candidates)
    finite = all(isinstance(value, float) and abs(value) < _FLOAT32 for line in rows_of for value in line)
    if [len(line) for line in rows_of] != [texts] * (images + 1) or not finite:
        raise DataError(f"{rows.where(place)}: group {group.id!r} needs {images}x{texts} finite scores and {texts} blind scores; {_REMEDY}")


def _parsed(rows: IndexedLines, place: int) -> Any:
    return parse_json(rows.line(place).decode())


def _scores_of(row: Any) -> StoredScores:
    return StoredScores(tuple(tuple(line) for line in row["logp"]), tuple(row["blank"]))


def _key(name: str) -> int:
    if not isinstance(name, str):
        raise TypeError(f"an id is a {type(name).__name__}")
    return hashed(name)
