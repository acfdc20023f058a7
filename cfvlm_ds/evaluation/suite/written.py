"""Results of a benchmark as files: results.json, items.jsonl and, while it is scored, scores.jsonl.

``results.json`` says what was asked of which model on which data, and the metrics; ``items.jsonl`` has a line for each item with its scores
and all that metrics need, so that they can be computed again, and models compared, without the model. Neither holds a time or the name of a
machine: the same evaluation gives the same bytes on any number of ranks, also after a kill. ``scores.jsonl`` is what is on disk until then:
a header that says of what, and a line for each group of items that was scored.

Somebody else may have made these files: sizes are bounded, and what they say is checked before it is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cfvlm_ds.core.errors import ConfigError, DataError, StorageError, unwritten
from cfvlm_ds.core.files import replace, whole_file
from cfvlm_ds.core.journal import Journal, records
from cfvlm_ds.core.reading import MIB, lines, open_regular, parse_json, read_json
from cfvlm_ds.core.text import quoted
from cfvlm_ds.core.untrusted import bare_name, refuse_link
from cfvlm_ds.evaluation.benchmarks import Item, Outcome, results, stored
from cfvlm_ds.evaluation.benchmarks.base import Benchmark, Values
from cfvlm_ds.evaluation.scoring import GroupScores
from cfvlm_ds.evaluation.suite.bootstrap import Bootstrap, intervals
from cfvlm_ds.evaluation.suite.record_form import check_record, is_number

SCHEMA, JOURNAL = "cfresults/1", "cfpartial/1"
RESULTS, ITEMS, SCORES = "results.json", "items.jsonl", "scores.jsonl"
MAX_RESULTS = 16 * MIB
MAX_LINE = 32 * MIB


@dataclass(frozen=True)
class Result:
    """The results of a benchmark that was asked in one way: what results.json has, and the outcomes of its items.

    ``called`` and ``label`` are the names of its folders: those of the benchmark, or of a run's evaluation set, and of the way.
    """

    called: str
    label: str
    record: Mapping[str, Any]
    outcomes: tuple[Outcome, ...]

    @property
    def name(self) -> str:
        """The benchmark's."""
        return str(self.record["benchmark"])

    @property
    def place(self) -> str:
        """Where it is, below a folder of results."""
        return f"{self.called}/{self.label}"

    @property
    def metrics(self) -> dict[str, Values]:
        """Table -> metric -> value."""
        found: dict[str, Values] = self.record["metrics"]
        return found


def recorded(
    benchmark: Benchmark,
    header: Mapping[str, Any],
    outcomes: Sequence[Outcome],
    drawn: Sequence[Values],
    left_out: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
    in_files: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    """What results.json says: a ``header`` with all that the scores depend on, metrics of every table, intervals of what was seen by the
    metrics that a bootstrap has ``drawn``, what was left out, and what is worth knowing of the benchmark."""
    clusters = bootstrap_of(outcomes).clusters
    return {
        "schema": SCHEMA,
        **header,
        "title": benchmark.title,
        **more,
        "items": {
            "in files": len(outcomes) + len(left_out) if in_files is None else in_files,
            "asked": len(outcomes),
            "left out": len(left_out),
        },
        "left_out": [list(each) for each in left_out],
        "not_finite": [each.item.id for each in outcomes if any(value != value for row in each.seen for value in row)],
        "notes": list(notes),
        "headline": benchmark.headline,
        "metrics": results(benchmark, outcomes),
        "intervals": {name: list(span) for name, span in intervals(drawn, clusters).items()},
        "bootstrap": {"draws": len(drawn), "clusters": clusters, "seed": 0},
        "published": [asdict(each) for each in benchmark.published],
        "traps": list(benchmark.traps),
        "unofficial": benchmark.unofficial,
    }


def bootstrap_of(outcomes: Sequence[Outcome], seed: int = 0) -> Bootstrap:
    """The bootstrap of some items: what shares a picture or a pair is drawn together."""
    return Bootstrap([each.item.cluster or each.item.id for each in outcomes], seed)


# Writing ------------------------------------------------------------------------------------------------------------------------------


def result_folder(folder: Path) -> Path:
    """A folder for the files of one result, made if it is not there. Raises ConfigError for what would end elsewhere."""
    for each in (folder.parent, folder, *(folder / name for name in (RESULTS, ITEMS, SCORES))):
        refuse_link(each, "name another folder with --out")
    if any(each.exists() and not each.is_dir() for each in (folder.parent, folder)):
        raise ConfigError(f"{folder} is no folder, and results would be written to it; name another one with --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{unwritten(folder, error)}; name another folder with --out") from error
    return folder


def write_result(folder: Path, result: Result) -> None:
    """Write the files of a result; results.json comes last, and says that the others are whole. Raises StorageError."""
    try:
        with whole_file(folder / ITEMS) as file:
            for outcome in result.outcomes:
                file.write(_line({**_item(outcome.item), **stored(outcome)}))
        replace(folder / RESULTS, (json.dumps(_finite(result.record), indent=1) + "\n").encode())
        (folder / SCORES).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{unwritten(folder / RESULTS, error)}; make room, and the same command goes on with what was scored") from error


def _item(item: Item) -> dict[str, Any]:
    """All of an item but its pictures, which the benchmark's own files name."""
    said = {"id": item.id, "texts": item.texts, "match": item.match, "prompt": item.prompt, "cluster": item.cluster}
    return said | ({"listed": True} if item.listed else {}) | {"tags": dict(item.tags)}


def _line(value: Any) -> bytes:
    return json.dumps(_finite(value)).encode() + b"\n"


def _finite(value: Any) -> Any:
    """JSON has no word for a number that is not finite: null stands for it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


# Reading ------------------------------------------------------------------------------------------------------------------------------


def read_results(folder: Path) -> list[Result]:
    """All results in a folder, in the order of their names. Raises DataError for files that are no results, or a folder without any."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of results; `cfvlm-ds evaluate MODEL --benchmarks ... --out FOLDER` writes one")
    found = [read_result(path.parent) for path in sorted(folder.glob(f"*/*/{RESULTS}"))]
    if not found:
        unfinished = next(folder.glob(f"*/*/{SCORES}"), None)
        why = f"{unfinished} is of an evaluation that has not ended; start it again" if unfinished else f"no */*/{RESULTS} in it"
        raise DataError(f"{folder}: no results ({why}); `cfvlm-ds evaluate MODEL --benchmarks ... --out FOLDER` writes them")
    return found


def read_result(folder: Path) -> Result:
    """The result in a folder. Raises DataError for files that are none."""
    path = folder / RESULTS
    remedy = "write them again with `cfvlm-ds evaluate`"
    try:
        record = read_json(path)
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA!r}")
        check_record(record)
        called, label = (bare_name(part, path) for part in (folder.parent.name, folder.name))
        path = folder / ITEMS
        outcomes = tuple(_outcomes(path))
    except (OSError, ValueError, TypeError, KeyError, RecursionError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: not the results of a benchmark ({reason}); {remedy}") from error
    return Result(called, label, record, outcomes)


def _outcomes(path: Path) -> Iterator[Outcome]:
    seen: set[str] = set()
    with open_regular(path) as handle:
        for number, line in enumerate(lines(handle, MAX_LINE), 1):
            try:
                outcome = _outcome(parse_json(line.decode()))
                if outcome.item.id in seen:
                    raise ValueError(f"item {quoted(outcome.item.id, 60)} comes twice")
            except (ValueError, TypeError, KeyError, RecursionError, AttributeError) as error:
                raise DataError(
                    f"{path}:{number}: no scores of an item ({type(error).__name__}: {error}); write it again with `cfvlm-ds evaluate`"
                ) from error
            seen.add(outcome.item.id)
            yield outcome


def _outcome(row: Any) -> Outcome:
    """Raises ValueError, TypeError or KeyError for a row that is none."""
    texts = tuple(_text(each) for each in row["texts"])
    match = tuple(tuple(_truth(each) for each in truths) for truths in row["match"])
    tags = {_text(name): _text(value) for name, value in row["tags"].items()}
    item = Item(
        _text(row["id"]), ((),) * len(match), texts, match, _text(row["prompt"]), row.get("listed") is True, tags, _text(row["cluster"])
    )

    def scores(values: Any) -> tuple[float, ...]:
        found = tuple(math.nan if value is None else float(value) for value in values if value is None or is_number(value))
        if len(found) != len(values) or len(found) != len(texts):
            raise ValueError(f"{len(texts)} texts, and other than {len(texts)} numbers for them")
        return found

    seen = tuple(scores(values) for values in row["seen"])
    if len(seen) != len(match):
        raise ValueError(f"{len(match)} images, and scores for {len(seen)}")
    consistency, said = row.get("consistency"), row.get("said")
    if consistency is not None and not is_number(consistency):
        raise ValueError("its consistency is no number")
    return Outcome(
        item,
        seen,
        scores(row["blank"]),
        scores(row["shuffled"]) if "shuffled" in row else None,
        consistency,
        scores(row["prior"]) if "prior" in row else None,
        None if said is None else tuple(_text(each) for each in said),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{quoted(value, 60)} is no text")
    return value


def _truth(value: Any) -> int:
    if value not in (0, 1) or isinstance(value, bool):
        raise ValueError(f"{quoted(value, 60)} in match is neither 1 nor 0")
    return int(value)


# What is scored so far ------------------------------------------------------------------------------------------------------------------


class Partial:
    """Scores on disk before all are there: a line for each group, or for each item that was written about.

    Args:
        folder: of the result, which its evaluation has locked.
        header: what the scores are of; those of anything else are refused.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        path, header = folder / SCORES, {"schema": JOURNAL, **header}
        self.rows: dict[int, Any] = {}
        """What was found there, by the number of its group."""
        self._journal = Journal(path, alone=False)
        found = [record for _, record in records(path, "remove it")]
        if not found:
            self._journal.append(_exact(header))
        elif found[0].get("schema") != JOURNAL:
            raise DataError(f"{path}: not the scores of an evaluation that was ended (its schema is not {JOURNAL!r}); remove it")
        else:
            refuse_other(path, found[0], header)
            self.rows = {row.pop("group"): row for row in found[1:]}

    def add(self, rows: Mapping[int, Mapping[str, Any]]) -> None:
        """Keep the scores of more groups. Raises StorageError; what was kept before stays."""
        self._journal.append(b"".join(_exact({"group": number, **row}) for number, row in sorted(rows.items())))
        self.rows |= dict(rows)


def refuse_other(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError where a file is of another evaluation, naming what differs."""
    known, asked = _flat(before), _flat(now)
    for name in sorted(asked, key=lambda name: not name.startswith("settings.")):  # a limit rather than the items that come of it
        was, value = known.get(name), asked[name]
        if was != value:
            raise ConfigError(
                f"{path.parent} holds results of another evaluation: {name} was {quoted(was, 80)}, and is {quoted(value, 80)}; name "
                "another folder with --out, or remove that one"
            )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: json.loads(json.dumps(value))}
    return {key: each for part, inner in value.items() for key, each in _flat(inner, f"{name}.{part}" if name else str(part)).items()}


def _exact(value: Any) -> bytes:
    """Scores as they are: one that is not finite is written as Python writes it, and read again."""
    return json.dumps(value).encode() + b"\n"


def kept(scores: GroupScores) -> dict[str, Any]:
    """A group's scores as plain numbers."""
    rows: dict[str, Any] = {"logp": scores.logp.tolist(), "blank": scores.blank.tolist()}
    return rows if scores.shuffled is None else rows | {"shuffled": scores.shuffled.tolist()}


def taken(row: Mapping[str, Any], shape: tuple[int, int]) -> GroupScores | None:
    """What ``kept`` has written; None for scores of another shape."""
    try:
        logp, blank = torch.tensor(row["logp"], dtype=torch.float32), torch.tensor(row["blank"], dtype=torch.float32)
        shuffled = torch.tensor(row["shuffled"], dtype=torch.float32) if "shuffled" in row else None
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError):
        return None
    if tuple(logp.shape) != shape or tuple(blank.shape) != shape[1:] or (shuffled is not None and shuffled.shape not in ((0,), shape[1:])):
        return None
    return GroupScores(logp, blank, shuffled)
