"""Stored scores: reference and blind log-likelihoods of a manifest, written once by ``cfvlm-ds score`` and read by DPO and PMI runs.

One JSON object per line: a header {"schema": "cfscores/3", "data": identity, "groups": n, "model": name, "weights": sha256, "inputs":
sha256}, then one line per group {"id": ..., "logp": [I][C] nats, "blank": [C] nats}. ``data`` identifies the scored groups (see
cfvlm_ds.data.identity). ``weights`` and ``inputs`` identify the model (see cfvlm_ds.models.identity); a run that records its own scores
leaves them out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.files import whole_file
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.reading import MIB, lines, open_regular, parse_json
from cfvlm_ds.core.text import quoted
from cfvlm_ds.data.identity import Identity, changes

MAX_LINE = 32 * MIB
"""Bytes of a group's scores: 20 for each cell of a thousand images and a thousand texts, and as much again."""
SCHEMA = "cfscores/3"
_FLOAT32 = 3e38  # what is larger becomes infinite as a tensor


@dataclass(frozen=True)
class StoredScores:
    """One group under the reference model, in nats: ``logp[i][c]`` = log p(text c | image i), ``blank[c]`` = log p(text c | blank)."""

    logp: tuple[tuple[float, ...], ...]
    blank: tuple[float, ...]


def write_scores(
    path: Path,
    groups: Sequence[CounterfactualGroup],
    scores: Mapping[str, StoredScores],
    model: str,
    data: Identity,
    *,
    made_by: Mapping[str, str] | None = None,
) -> None:
    """Write the scores of every group; the file appears complete or not at all. Raises KeyError when a group has no scores.

    ``data`` is the groups' identity (data_identity), which a reader compares with that of its own groups; ``made_by`` is the model's
    (fingerprint).
    """
    with whole_file(path) as handle:
        header = {"schema": SCHEMA, "data": data, "groups": len(groups), "model": model, **(made_by or {})}
        handle.write(json.dumps(header).encode() + b"\n")
        for group in groups:
            stored = scores[group.id]
            handle.write(json.dumps({"id": group.id, "logp": stored.logp, "blank": stored.blank}).encode() + b"\n")


def read_scores(
    path: Path, groups: Sequence[CounterfactualGroup], data: Identity, *, made_by: Mapping[str, str] | None = None
) -> dict[str, StoredScores]:
    """Scores by group id. Raises DataError on a missing, incomplete or foreign file, or a value that is not finite.

    Foreign is a file of other ids, texts, prompts or pictures and, where ``made_by`` is given, of other weights or of another tokenizer,
    processor or template. Order, labels and weights of the groups may have changed: no score depends on them.

    ``data`` is the groups' identity, made with the roots that they were read with: paths count relative to these.
    """
    remedy = "write it again with `cfvlm-ds score`"
    if not os.path.exists(path):
        raise DataError(f"{path}: no such scores file; {remedy}")
    try:
        with open_regular(path) as handle:
            rows = (parse_json(line.decode()) for line in lines(handle, MAX_LINE))
            header = next(rows)
            if header["schema"] != SCHEMA:
                raise DataError(f"{path}: schema {quoted(header['schema'])} is not {SCHEMA!r}; {remedy}")
            if what := changes(header["data"], data, of_scores=True):
                raise DataError(f"{path}: these scores belong to another manifest, by {what}; {remedy}")
            for part, value in (made_by or {}).items():
                if header.get(part) != value:
                    what = {"weights": "other weights", "inputs": "another tokenizer, processor or chat template"}[part]
                    raise DataError(
                        f"{path}: these scores were made by {quoted(header['model'])} with {what} than this run's model; {remedy}"
                    )
            stored: dict[str, StoredScores] = {}
            for number, row in enumerate(rows, start=2):
                if row["id"] in stored or len(stored) == len(groups):
                    raise DataError(f"{path}:{number}: group {quoted(row['id'])} is one too many, or occurs twice; {remedy}")
                stored[row["id"]] = StoredScores(tuple(tuple(line) for line in row["logp"]), tuple(row["blank"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, StopIteration) as error:
        if isinstance(error, DataError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path}: not a scores file ({reason}); {remedy}") from error
    for number, group in enumerate(groups, start=2):
        if group.id not in stored:
            raise DataError(f"{path}: no scores for group {group.id!r}, the file is incomplete; {remedy}")
        rows_of = [*stored[group.id].logp, stored[group.id].blank]
        images, texts = len(group.images), len(group.candidates)
        finite = all(isinstance(value, float) and abs(value) < _FLOAT32 for line in rows_of for value in line)
        if [len(line) for line in rows_of] != [texts] * (images + 1) or not finite:
            raise DataError(f"{path}:{number}: group {group.id!r} needs {images}x{texts} finite scores and {texts} blind ones; {remedy}")
    return stored
