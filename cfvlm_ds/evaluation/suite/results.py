"""Result files of a benchmark: results.json, items.jsonl and, during scoring, scores.jsonl.

``results.json`` records the benchmark, the probe, the model, the data and the metrics. ``items.jsonl`` contains one line per item with its
scores and everything else that metrics need, so metrics can be recomputed and results compared without the model. Neither file contains a
timestamp or a host name, so the same evaluation writes the same bytes on any number of ranks, even after an interruption. ``scores.jsonl``
exists until the result is complete. It contains a header that identifies the evaluation, and a line for each scored group.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cfvlm_ds.core.errors import ConfigError, DataError, writing
from cfvlm_ds.core.files import replace, whole_file
from cfvlm_ds.core.journal import Journal, records
from cfvlm_ds.core.options import flat
from cfvlm_ds.core.reading import read_json
from cfvlm_ds.core.secrets import without_secrets
from cfvlm_ds.core.text import quoted
from cfvlm_ds.core.untrusted import refuse_link
from cfvlm_ds.evaluation.benchmarks import Item, Outcome, results
from cfvlm_ds.evaluation.benchmarks.base import Values, clusters_of
from cfvlm_ds.evaluation.scoring import GroupScores
from cfvlm_ds.evaluation.suite.bootstrap import SEED, intervals
from cfvlm_ds.evaluation.suite.selection import Chosen

SCHEMA, JOURNAL = "cfresults/1", "cfpartial/2"
RESULTS, ITEMS, SCORES = "results.json", "items.jsonl", "scores.jsonl"


@dataclass(frozen=True)
class Result:
    """Result of a benchmark with one probe: the contents of results.json, and the outcomes of the items.

    Its folder is NAME/LABEL, where NAME (``called``) is the name of the benchmark or of a run's evaluation set, and LABEL is the probe's
    label.
    """

    called: str
    label: str
    record: Mapping[str, Any]
    outcomes: tuple[Outcome, ...]

    @property
    def name(self) -> str:
        """Name of the benchmark."""
        return str(self.record["benchmark"])

    @property
    def place(self) -> str:
        """Path below the results folder."""
        return f"{self.called}/{self.label}"

    @property
    def headlines(self) -> tuple[str, ...]:
        """Metrics that an overview shows."""
        return tuple(filter(None, (self.record["headline"], self.record.get("beside"))))

    @property
    def metrics(self) -> dict[str, Values]:
        """Metrics as {table: {metric: value}}. An undefined metric is NaN; JSON stores it as null."""
        tables: dict[str, dict[str, float | None]] = self.record["metrics"]
        return {name: {key: math.nan if value is None else value for key, value in table.items()} for name, table in tables.items()}

    @property
    def shown(self) -> str:
        """Name shown in tables: the value of ``called``, followed by a note if the files differ from the published ones."""
        return f"{self.called} (own files)" if self.record.get("own_files") else self.called


def result_of(
    called: str,
    chosen: Chosen,
    model: str,
    header: Mapping[str, Any],
    outcomes: Sequence[Outcome],
    drawn: Sequence[Values],
    prompt: str,
    notes: Sequence[str] = (),
    left_out: Sequence[tuple[str, str]] = (),
    in_files: int | None = None,
    own_files: bool = False,
) -> Result:
    """Build the result of an evaluation.

    Its record contains the ``header`` (everything that the scores depend on), the name of the ``model``, the metrics of every table,
    intervals from the bootstrap draws (``drawn``), the ``prompt`` of one item, the items left out, notes, and ``own_files`` (True if the
    files differ from the published ones).
    """
    benchmark = chosen.benchmark
    counts = {"in files": len(outcomes) if in_files is None else in_files, "asked": len(outcomes), "left out": len(left_out)}
    record = {
        "schema": SCHEMA,
        **header,
        "model": {"name": without_secrets(model), **header["model"]},
        "title": f"Own files in the form of {benchmark.title}" if own_files else benchmark.title,
        "own_files": own_files,
        "prompt": prompt,
        "items": counts,
        "left_out": [list(each) for each in left_out],
        "not_finite": [each.item.id for each in outcomes if any(value != value for row in each.seen for value in row)],
        "notes": list(notes),
        "headline": benchmark.headline,
        "beside": benchmark.beside,
        "metrics": results(benchmark, outcomes),
        "intervals": {name: list(span) for name, span in intervals(drawn).items()},
        "bootstrap": {"draws": len(drawn), "clusters": len(clusters_of(outcome.item for outcome in outcomes)), "seed": SEED},
        "unofficial": benchmark.unofficial,
    }
    return Result(called, chosen.label, record, tuple(outcomes))


# Writing ------------------------------------------------------------------------------------------------------------------------------


def result_folder(folder: Path) -> Path:
    """Create the folder for a result if it is missing, and return it. Raises ConfigError if the folder or one of its files is a link."""
    for each in (folder.parent, folder, *(folder / name for name in (RESULTS, ITEMS, SCORES))):
        refuse_link(each, "name another folder with --out")
    with writing(folder, "name another folder with --out"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_result(folder: Path, result: Result) -> None:
    """Write the files of a result. results.json is written last and marks the result as complete. Raises StorageError if writing fails."""
    with writing(folder / RESULTS, "free some space, and the same command continues"):
        with whole_file(folder / ITEMS) as file:
            for outcome in result.outcomes:
                every = vars(outcome.item) | vars(outcome)
                # the pictures are named in the benchmark's own files
                row = {name: value for name, value in every.items() if name not in ("item", "images") and value is not None}
                file.write(json.dumps(_finite(row)).encode() + b"\n")
        replace(folder / RESULTS, (json.dumps(_finite(result.record), indent=1) + "\n").encode())
        (folder / SCORES).unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """Return a copy of a value in which None replaces NaN and infinite numbers, which JSON cannot represent."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


# Reading ------------------------------------------------------------------------------------------------------------------------------


def read_results(folder: Path) -> list[Result]:
    """Read all results in a folder, ordered by name. Raises DataError for an invalid file or a folder without results."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of results; `cfvlm-ds evaluate MODEL --benchmarks ... --out FOLDER` writes one")
    results = [read_result(path.parent) for path in sorted(folder.glob(f"*/*/{RESULTS}"))]
    if not results:
        unfinished = next(folder.glob(f"*/*/{SCORES}"), None)
        why = f"{unfinished} belongs to an evaluation that has not finished; start that again" if unfinished else f"no */*/{RESULTS} in it"
        raise DataError(f"{folder}: no results ({why}); `cfvlm-ds evaluate MODEL --benchmarks ... --out FOLDER` writes them")
    return results


def read_result(folder: Path) -> Result:
    """Read the result in a folder. Raises DataError if its files are not results."""
    path, remedy = folder / RESULTS, "write them again with `cfvlm-ds evaluate`"
    try:
        record = read_json(path)
        if record["schema"] != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA!r}")
        path = folder / ITEMS
        outcomes = tuple(map(_outcome, records(path, remedy)))
        if len(outcomes) != (num_items := record["items"]["asked"]):
            raise ValueError(f"it has only {len(outcomes)} of its {num_items} items")
    except (OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, DataError):
            raise
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: not the results of a benchmark ({reason}); {remedy}") from error
    return Result(folder.parent.name, folder.name, record, outcomes)


def _outcome(row: Mapping[str, Any]) -> Outcome:
    def scores(values: Sequence[float | None]) -> tuple[float, ...]:
        return tuple(math.nan if value is None else value for value in values)

    match = tuple(map(tuple, row["match"]))
    content = (tuple(row["texts"]), match, row["prompt"], row.get("listed", False), row["tags"], row["cluster"])
    return Outcome(
        Item(row["id"], ((),) * len(match), *content),
        tuple(map(scores, row["seen"])),
        scores(row["blank"]),
        row.get("consistency"),
        tuple(row["said"]) if row.get("said") is not None else None,
    )


# Scores of an unfinished evaluation ---------------------------------------------------------------------------------------------------


class Partial:
    """Stored scores of an unfinished evaluation: one line per group or, if texts are generated, one line per item.

    Args:
        folder: the result's folder; the results folder above it must be locked.
        header: everything that the scores depend on; a file with a different header raises ConfigError.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        path, header = folder / SCORES, {"schema": JOURNAL, **header}
        self.rows: dict[int, Any] = {}
        """Rows on disk, keyed by group (or item) index."""
        self._journal = Journal(path, alone=False)
        lines = list(records(path, "remove it"))
        if lines:
            refuse_other(path, lines[0], header)
            self.rows = {row.pop("group"): row for row in lines[1:]}
        else:
            self._journal.append(_exact(header))

    def add(self, rows: Mapping[int, Mapping[str, Any]]) -> None:
        """Append the scores of more groups. Raises StorageError if writing fails; earlier scores stay on disk."""
        self._journal.append(b"".join(_exact({"group": number, **row}) for number, row in sorted(rows.items())))


def refuse_other(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError if a file's header belongs to a different evaluation. The message names the first difference."""
    old, new = (flat(json.loads(json.dumps(header))) for header in (before, now))
    for name in sorted(
        new, key=lambda name: not name.startswith("settings.")
    ):  # settings first, to report a changed limit rather than its effect on the items
        was, value = old.get(name), new[name]
        if was != value:
            raise ConfigError(
                f"{path.parent} contains results of another evaluation: {name} was {quoted(was, 80)} and is now {quoted(value, 80)}; name "
                "another folder with --out, or remove that one"
            )


def _exact(value: Any) -> bytes:
    """Encode a value as a line of JSON. Non-finite numbers are written as NaN or Infinity, which Python's parser accepts."""
    return json.dumps(value).encode() + b"\n"


def kept(scores: GroupScores) -> dict[str, Any]:
    """Convert a group's scores to lists of numbers, keyed by field name."""
    return {name: part.tolist() for name, part in vars(scores).items()}


def taken(row: Mapping[str, Any]) -> GroupScores:
    """Convert the output of ``kept`` back to scores."""
    return GroupScores(**{name: torch.tensor(part, dtype=torch.float32) for name, part in row.items()})
