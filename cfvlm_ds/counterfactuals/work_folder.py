"""Work folder: the records of each step and shard, and the settings that determine them.

    W/run.json                        the data and the number of shards
    W/STEP.json                       settings of a step: back ends, options, versions
    W/STEP/shard-00003.jsonl          records, one line per unit of work
    W/STEP/shard-00003.done.json      completion record: sha256 of the shard's records and of the previous step's records
    W/pictures/shard-00003.tar        edited pictures; the records hold their offsets
    W/prices.json                     prices of words, for the back end rules (see propose/balance.py)
    W/mine/slots.bin                  index of captions that differ in one word, for the back end mine

The folder of ``data sample`` has only the step ``sample`` and its results, W/groups.jsonl and W/counts.json.

Shard k of N contains every Nth row of the data, starting at row k. A source's records do not depend on the number of shards.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.files import replace
from cfvlm_ds.core.journal import Journal, as_line, records
from cfvlm_ds.core.options import flat
from cfvlm_ds.core.progress import Progress, Say, no_op
from cfvlm_ds.core.reading import MIB, open_regular, read_json
from cfvlm_ds.core.secrets import masked
from cfvlm_ds.core.text import quoted
from cfvlm_ds.core.untrusted import refuse_link
from cfvlm_ds.core.versions import version
from cfvlm_ds.counterfactuals.options import meaning
from cfvlm_ds.data.containers.prepared import ENDING
from cfvlm_ds.data.picture_file import part_name
from cfvlm_ds.data.store import GroupStore

SCHEMA = "cfwork/3"
STEPS = ("propose", "edit", "verify")
SAMPLE = "sample"
_FOLDERS = (*STEPS, SAMPLE, "pictures", "mine")
MAX_SHARDS = 100_000
T = TypeVar("T")
OUTDATED = "is outdated, because the records of the previous step have changed"


def seed_of(*parts: object) -> int:
    """Derive a 63-bit seed from ``parts``, which identify its purpose."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def row_line(row: Mapping[str, Any]) -> bytes:
    """Encode a row as a line of JSON."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def sha256_of_file(path: Path) -> str:
    """Return a file's hexadecimal sha256."""
    digest = hashlib.sha256()
    with open_regular(path) as handle:
        while block := handle.read(MIB):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class WorkFolder:
    """An existing work folder. ``about`` is the content of its run.json."""

    path: Path
    about: Mapping[str, Any]

    @property
    def shards(self) -> int:
        """Number of shards."""
        return int(self.about["shards"])

    @property
    def steps(self) -> tuple[str, ...]:
        """Steps of this folder, in order."""
        return tuple(self.about.get("steps", STEPS))

    @property
    def roots(self) -> list[Path]:
        """Folders of the source pictures. Folders of pictures extracted from a table are left out, because their names change with the
        table.
        """
        return [Path(root) for root in self.about["source"]["roots"]]

    @classmethod
    def begin(cls, path: Path, store: GroupStore, shards: int | None, steps: Sequence[str] = STEPS) -> WorkFolder:
        """Open a work folder, or create it if it does not exist. If ``shards`` is None, the folder's number of shards is used, or 1 for a
        new folder. Raises ConfigError if the folder was created with different data or steps, or with another number of
        shards.
        """
        _refuse_links(path)
        shards = int(_read(path / "run.json").get("shards", 1)) if shards is None else shards
        if not 1 <= shards <= MAX_SHARDS:
            raise ConfigError(f"the number of shards must be from 1 to {MAX_SHARDS}, not {shards}")
        source = {
            "path": os.path.abspath(store.path),
            "format": store.format,
            "groups": len(store),
            "roots": [os.path.abspath(root) for root in store.roots if not root.name.endswith(ENDING)],
            "sha256": sha256_of_file(store.path) if store.path.is_file() else "",
        }
        about: dict[str, Any] = {"schema": SCHEMA, "shards": shards, "source": source}
        about |= {} if steps == STEPS else {"steps": list(steps)}
        if path.exists() and not (path / "run.json").exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(f"{path} exists and is not a work folder; name another folder")
        path.mkdir(parents=True, exist_ok=True)
        _settled(path / "run.json", about, path)
        return cls(path, about)

    @classmethod
    def open(cls, path: Path) -> WorkFolder:
        """Open an existing work folder. Raises ConfigError if ``path`` is not one."""
        _refuse_links(path)
        about = _read(path / "run.json")
        if about.get("schema") != SCHEMA:
            raise ConfigError(f"{path} is not a work folder; create one with `cfvlm-ds data propose`")
        return cls(path, about)

    def settle(self, step: str, options: Any, **more: Any) -> None:
        """Write a step's settings, with secrets masked. Raises ConfigError if the step already has different settings."""
        _settled(self.path / f"{step}.json", masked({**meaning(options), **more, "cfvlm-ds": version("cfvlm-ds")}), self.path)

    def refuse_other(self, step: str, options: Any) -> None:
        """Raise ConfigError if a step was started with options other than ``options``."""
        if begun := self.settings(step):
            _settled(self.path / f"{step}.json", {**begun, **masked(meaning(options))}, self.path)

    def settings(self, step: str) -> dict[str, Any]:
        """Read a step's settings. The result is empty if the step has not been started."""
        return _read(self.path / f"{step}.json")

    def file(self, step: str, shard: int) -> Path:
        """Return the path of a step's journal for a shard."""
        return self.path / step / f"shard-{shard:05d}.jsonl"

    def tar(self, shard: int) -> Path:
        """Return the path of the tar file with a shard's edited pictures."""
        return self.path / "pictures" / f"shard-{shard:05d}.tar"

    def done(self, step: str, shard: int) -> dict[str, Any] | None:
        """Read a step's completion record for a shard: number of records, sha256, counts. Return None if the shard is not finished or its
        journal is missing.
        """
        record = _read(self.file(step, shard).with_suffix(".done.json"))
        return record if record and self.file(step, shard).is_file() else None

    def again(self, step: str, shard: int) -> str:
        """Return instructions for repeating a step and the following steps on a shard."""
        files = " ".join(f"{self.path / name}/shard-{shard:05d}.*" for name in self.steps[self.steps.index(step) :])
        return f"remove {files}; then run these steps again"

    def missing(self, step: str) -> list[int]:
        """List the shards that a step has not finished."""
        return [shard for shard in range(self.shards) if self.done(step, shard) is None]

    def records(self, step: str, shard: int) -> Iterator[dict[str, Any]]:
        """Read a step's records for a shard. Raises DataError naming the file and line of an invalid record."""
        return records(self.file(step, shard), self.again(step, shard))

    def picture(self, named: Mapping[str, Any]) -> Path:
        """Return the path of an attempt's picture: a file or a part of a tar file."""
        if "path" in named:
            return Path(named["path"])
        return self.path.absolute() / "pictures" / part_name(named["file"], named["start"], named["length"])

    def need(self, step: str, shard: int) -> None:
        """Raise ConfigError if a step has not finished a shard, or DataError if records of this step or an earlier step are outdated."""
        if self.done(step, shard) is None:
            begun = f"{self.about['source']['path']} --out {self.path}" if step == self.steps[0] else self.path
            remedy = f"run `cfvlm-ds data {step} {begun} --shard {shard}/{self.shards}` first"
            raise ConfigError(f"{self.path}: {step} has not finished shard {shard}; {remedy}")
        for before, after in pairwise(self.steps[: self.steps.index(step) + 1]):
            made, now = self.done(after, shard) or {}, self.done(before, shard) or {}
            if made.get("of") != now.get("sha256"):
                raise DataError(f"{self.file(after, shard)} {OUTDATED}; {self.again(after, shard)}")

    def finished(self, step: str, shard: int, of: int | None, options: Any, say: Say = no_op) -> dict[str, Any] | None:
        """Return a step's completion record for a shard, or None if the shard is not finished.

        Raises ConfigError if the folder has no such step or shard, if the previous step is not finished, or if this step was started with
        different options. Raises DataError for outdated records. These checks do not load a model.
        """
        if step not in self.steps:
            raise ConfigError(f"{self.path} was begun by `cfvlm-ds data {self.steps[0]}` and has no step {step}; name another folder")
        of = self.shards if of is None else of
        if of != self.shards or not 0 <= shard < of:
            raise ConfigError(f"{self.path} has {self.shards} shards, but --shard is {shard}/{of}; use 0 to {self.shards - 1}")
        if step != self.steps[0]:
            self.need(self.steps[self.steps.index(step) - 1], shard)
        self.refuse_other(step, options)
        if (done := self.done(step, shard)) is not None:
            self.need(step, shard)
            say(f"{self.path}: {step} has finished shard {shard}")
        return done


class ShardStep:
    """A step in progress on a shard. The first ``count`` units already have a record.

    Records contain neither times nor machine names, so that resumed work produces the same bytes as uninterrupted work.
    """

    def __init__(self, work: WorkFolder, step: str, shard: int) -> None:
        self.work, self.step, self.shard = work, step, shard
        self._journal = Journal(work.file(step, shard))
        with open(self._journal.path, "rb") as file:
            self.count = sum(1 for _ in file)

    def add(self, record: Mapping[str, Any]) -> None:
        """Append the next unit's record."""
        self._journal.append(as_line(record))
        self.count += 1

    def expect(self, record: Mapping[str, Any], **named: object) -> None:
        """Raise DataError if a record's values differ from those of its unit (``named``), which means that the folder was made from
        different data.
        """
        if any(record.get(key) != value for key, value in named.items()):
            raise DataError(f"{self._journal.path} has the record {quoted(record)[:120]} instead of {named}; start a new work folder")

    def remaining(self, units: Iterator[T], named: Callable[[T], Mapping[str, Any]], say: Say, total: float, unit: str) -> Iterator[T]:
        """Yield the units that have no record yet. The progress display counts a unit when the next one is requested."""
        for record, item in zip(self.work.records(self.step, self.shard), units, strict=False):
            self.expect(record, **named(item))
        yield from Progress(say, self.step, max(total - self.count, 1), unit).over(units)

    def finish(self, counted: Callable[[Mapping[str, Any], Counter[str]], None], say: Say) -> dict[str, Any]:
        """Write and return the completion record, and warn about the first row, picture or text that could not be used."""
        counts, unusable, details = Counter[str](), "", 0
        for record in self.work.records(self.step, self.shard):
            counted(record, counts)
            unusable = unusable or record.get("detail", "")
            details += "detail" in record
        if unusable:
            remedy = f"to try them again, {self.work.again(self.step, self.shard)}"
            say(f"warning: {self.step}: {details} of {self.count} records have errors; {remedy}; the first: {unusable}")
        self._journal.close()
        done: dict[str, Any] = {"records": self.count, "sha256": sha256_of_file(self._journal.path), "counts": dict(sorted(counts.items()))}
        steps = self.work.steps
        if self.step != steps[0] and (before := self.work.done(steps[steps.index(self.step) - 1], self.shard)) is not None:
            done["of"] = before["sha256"]
        replace(self._journal.path.with_suffix(".done.json"), json.dumps(done, indent=1).encode() + b"\n", shared=True)
        return done

    def __enter__(self) -> ShardStep:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Close the journal. If the step failed before its first record, remove the step's settings, because they might be the cause."""
        self._journal.close()
        journals = self._journal.path.parent
        if kind is not None and self.count == 0 and list(journals.iterdir()) == [self._journal.path]:
            for path in (self._journal.path, self.work.path / f"{self.step}.json"):
                path.unlink(missing_ok=True)
            journals.rmdir()


def _refuse_links(path: Path) -> None:
    refuse_link(path, "name the folder itself")
    for name in _FOLDERS:
        refuse_link(path / name, "put the folder itself there")


def _settled(path: Path, wanted: Mapping[str, Any], folder: Path) -> None:
    """Write a settings file. If it already exists with different settings, raise ConfigError."""
    refuse_link(path, "remove it")
    text = json.dumps(wanted, indent=1, sort_keys=True) + "\n"
    if not path.exists():
        replace(path, text.encode(), shared=True)
        return
    current, wanted_now = _read(path), json.loads(text)
    if current == wanted_now:
        return
    remedy = f"use the same settings, or a folder other than {folder}"
    if path.stem == "run":
        remedy += f", or remove {folder}"
    else:
        remedy += f"; to repeat {path.stem}, remove {path} and {path.with_suffix('')}, and the same for the following steps"
    old, new = flat(current), flat(wanted_now)
    differing = [(key, old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    shown = "; ".join(f"{key}: {quoted(was, 160)} then, {quoted(value, 160)} now" for key, was, value in differing[:4])
    raise ConfigError(f"{path} was created with other settings ({shown}); {remedy}")


def _read(path: Path) -> dict[str, Any]:
    """Read a small JSON file, or return an empty dict if there is none. Raises ConfigError if the file is invalid."""
    try:
        return dict(read_json(path)) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} was not written by a step ({error}); remove it, or start a new work folder") from error
