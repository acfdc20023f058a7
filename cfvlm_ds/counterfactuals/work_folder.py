"""The work folder: what each step has made of each shard, with everything that decides it.

    W/run.json                        the data, the number of shards
    W/STEP.json                       what decides a step: back ends, options, versions
    W/STEP/shard-00003.jsonl          a line a unit of work
    W/STEP/shard-00003.done.json      when the shard is through: its sha256, and that of the step before it that it was made of
    W/pictures/shard-00003.tar        edited pictures, named by their places in it
    W/prices.json                     how often each word of the data may come and go, of the back end rules
    W/mine/slots.bin                  captions with one word left open, of the back end mine

Of N shards each has every Nth row of the data. What a step makes of a source does not depend on them: one shard and many give the same
candidates.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.files import replace
from cfvlm_ds.core.journal import Journal, as_line, records
from cfvlm_ds.core.options import flat
from cfvlm_ds.core.progress import Progress
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
_FOLDERS = (*STEPS, "pictures", "mine")
MAX_SHARDS = 100_000
T = TypeVar("T")
OUTDATED = "was made of other records of the step before it than there are now"


def seed_of(*parts: object) -> int:
    """A seed of 63 bits from what it is for."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def sha256_of_file(path: Path) -> str:
    """Of all bytes of a file, as a completion file has it."""
    digest = hashlib.sha256()
    with open_regular(path) as handle:
        while block := handle.read(MIB):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class WorkFolder:
    """A work folder that is there; ``about`` is its run.json."""

    path: Path
    about: Mapping[str, Any]

    @property
    def shards(self) -> int:
        """In how many parts the work is cut."""
        return int(self.about["shards"])

    @property
    def roots(self) -> list[Path]:
        """The folders of the source pictures, without those that rows of a table were prepared in, which change with its date."""
        return [Path(each) for each in self.about["source"]["roots"]]

    @classmethod
    def begin(cls, path: Path, store: GroupStore, shards: int) -> WorkFolder:
        """The folder for this data in so many shards, made where it is not there. Raises ConfigError where it is for something else."""
        _refuse_links(path)
        if not 1 <= shards <= MAX_SHARDS:
            raise ConfigError(f"{shards} shards; cut the work in 1 to {MAX_SHARDS}")
        source = {
            "path": os.path.abspath(store.path),
            "format": store.format,
            "groups": len(store),
            "roots": [os.path.abspath(root) for root in store.roots if not root.name.endswith(ENDING)],
            "sha256": sha256_of_file(store.path) if store.path.is_file() else "",
        }
        about: dict[str, Any] = {"schema": SCHEMA, "shards": shards, "source": source}
        if path.exists() and not (path / "run.json").exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(f"{path} is there and no work folder; name another one")
        path.mkdir(parents=True, exist_ok=True)
        _settled(path / "run.json", about, path)
        return cls(path, about)

    @classmethod
    def open(cls, path: Path) -> WorkFolder:
        """The folder that `data propose` began. Raises ConfigError for anything else."""
        _refuse_links(path)
        about = _read(path / "run.json")
        if about.get("schema") != SCHEMA:
            raise ConfigError(f"{path} is no work folder; begin one with `cfvlm-ds data propose`")
        return cls(path, about)

    def settle(self, step: str, options: Any, **more: Any) -> None:
        """Write what decides a step, without secrets, or refuse what differs from an earlier shard or call. A secret may change."""
        _settled(self.path / f"{step}.json", masked({**meaning(options), **more, "cfvlm-ds": version("cfvlm-ds")}), self.path)

    def refuse_other(self, step: str, options: Any) -> None:
        """Refuse options that differ from those that a step was begun with, before anything is loaded for it."""
        if begun := self.settings(step):
            _settled(self.path / f"{step}.json", {**begun, **masked(meaning(options))}, self.path)

    def settings(self, step: str) -> dict[str, Any]:
        """What decides a step; empty where it was not begun."""
        return _read(self.path / f"{step}.json")

    def file(self, step: str, shard: int) -> Path:
        """The journal of a step and shard."""
        return self.path / step / f"shard-{shard:05d}.jsonl"

    def tar(self, shard: int) -> Path:
        """The edited pictures of a shard."""
        return self.path / "pictures" / f"shard-{shard:05d}.tar"

    def done(self, step: str, shard: int) -> dict[str, Any] | None:
        """The completion of a step of a shard: records, sha256, counts; None where it is not through, or its journal is gone."""
        found = _read(self.path / step / f"shard-{shard:05d}.done.json")
        return found if found and self.file(step, shard).is_file() else None

    def again(self, step: str, shard: int) -> str:
        """How a shard of a step, and of those after it, is made again."""
        return f"remove {' '.join(f'{self.path / each}/shard-{shard:05d}.*' for each in STEPS[STEPS.index(step) :])}, and run it again"

    def missing(self, step: str) -> list[int]:
        """Shards that a step is not through with."""
        return [shard for shard in range(self.shards) if self.done(step, shard) is None]

    def records(self, step: str, shard: int) -> Iterator[dict[str, Any]]:
        """The records of a step and shard. Raises DataError naming file and line for what is none."""
        return records(self.file(step, shard), self.again(step, shard))

    def picture(self, named: Mapping[str, Any]) -> Path:
        """The picture that an attempt names, a file or a part of a tar, as every reader of pictures takes it."""
        if "path" in named:
            return Path(named["path"])
        return self.path.absolute() / "pictures" / part_name(named["file"], named["start"], named["length"])

    def need(self, step: str, shard: int) -> None:
        """Raise ConfigError where a step is not through with a shard, DataError where it or one before it was made of other records."""
        if self.done(step, shard) is None:
            begun = f"{self.about['source']['path']} --out {self.path}" if step == STEPS[0] else self.path
            remedy = f"run `cfvlm-ds data {step} {begun} --shard {shard}/{self.shards}` first"
            raise ConfigError(f"{self.path}: {step} is not through with shard {shard}; {remedy}")
        for before, each in pairwise(STEPS[: STEPS.index(step) + 1]):
            made, now = self.done(each, shard) or {}, self.done(before, shard) or {}
            if made.get("of") != now.get("sha256"):
                raise DataError(f"{self.file(each, shard)} {OUTDATED}; {self.again(each, shard)}")

    def finished(
        self, step: str, shard: int, of: int | None, options: Any, say: Callable[[str], object] = lambda line: None
    ) -> dict[str, Any] | None:
        """Return the completion of a shard that a step is through with; None where the step is still to be done.

        Raises ConfigError for what can be refused before anything is loaded for it: a shard that is none of this folder's, a step before
        that is not through with it, and options that differ from those that the step was begun with. DataError for records of old ones.
        """
        of = self.shards if of is None else of
        if of != self.shards or not 0 <= shard < of:
            raise ConfigError(
                f"{self.path} is cut in {self.shards} shards, and --shard says {shard}/{of}; say 0 to {self.shards - 1} of them"
            )
        if step != STEPS[0]:
            self.need(STEPS[STEPS.index(step) - 1], shard)
        self.refuse_other(step, options)
        if (done := self.done(step, shard)) is not None:
            self.need(step, shard)
            say(f"{self.path}: {step} is through with shard {shard}")
        return done


class ShardStep:
    """One step of one shard under way: ``count`` units have their record, in their order. Records hold no times and no names of machines,
    so that work that was killed and continued gives the bytes of work that was not."""

    def __init__(self, work: WorkFolder, step: str, shard: int) -> None:
        self.work, self.step, self.shard = work, step, shard
        self._journal = Journal(work.file(step, shard))
        with open(self._journal.path, "rb") as file:
            self.count = sum(1 for _ in file)

    def add(self, record: Mapping[str, Any]) -> None:
        """The record of the next unit."""
        self._journal.append(as_line(record))
        self.count += 1

    def expect(self, record: Mapping[str, Any], **named: object) -> None:
        """Raise DataError where a record that is there is not of this unit: the folder is of other data."""
        if any(record.get(key) != value for key, value in named.items()):
            raise DataError(f"{self._journal.path}: it has a record of {quoted(record)[:120]} in place of {named}; start a new work folder")

    def remaining(
        self, units: Iterator[T], named: Callable[[T], Mapping[str, Any]], say: Callable[[str], object], total: float, unit: str
    ) -> Iterator[T]:
        """The units that have no record yet; each counts as done when the next one is asked for."""
        for record, each in zip(self.work.records(self.step, self.shard), units, strict=False):
            self.expect(record, **named(each))
        yield from Progress(say, self.step, max(total - self.count, 1), unit).over(units)

    def finish(self, counted: Callable[[Mapping[str, Any], Counter[str]], None], say: Callable[[str], object]) -> dict[str, Any]:
        """The shard is through. The first row or picture that cannot be used is named."""
        counts, unusable = Counter[str](), ""
        for record in self.work.records(self.step, self.shard):
            counted(record, counts)
            unusable = unusable or record.get("detail", "")
        if unusable:
            say(f"warning: {self.step}: some rows or pictures cannot be used, and are counted; the first: {unusable}")
        self._journal.close()
        done: dict[str, Any] = {"records": self.count, "sha256": sha256_of_file(self._journal.path), "counts": dict(sorted(counts.items()))}
        if self.step != STEPS[0] and (before := self.work.done(STEPS[STEPS.index(self.step) - 1], self.shard)) is not None:
            done["of"] = before["sha256"]
        replace(self.work.path / self.step / f"shard-{self.shard:05d}.done.json", json.dumps(done, indent=1).encode() + b"\n", shared=True)
        return done

    def __enter__(self) -> ShardStep:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Leave it. A step of which nothing is done leaves no settings behind: what is wrong with them can be put right."""
        self._journal.close()
        journals = self._journal.path.parent
        if kind is not None and self.count == 0 and list(journals.iterdir()) == [self._journal.path]:
            for path in (self._journal.path, self.work.path / f"{self.step}.json"):
                path.unlink(missing_ok=True)
            journals.rmdir()


def _refuse_links(path: Path) -> None:
    """Raise ConfigError where the folder, or one in it that steps write to, is a link."""
    refuse_link(path, "name the folder itself")
    for name in _FOLDERS:
        refuse_link(path / name, "put the folder itself there")


def _settled(path: Path, wanted: Mapping[str, Any], folder: Path) -> None:
    """Write a file of settings, or refuse settings that differ from those that are there."""
    refuse_link(path, "remove it")
    text = json.dumps(wanted, indent=1, sort_keys=True) + "\n"
    if not path.exists():
        replace(path, text.encode(), shared=True)
        return
    found, now = _read(path), json.loads(text)
    if found == now:
        return
    remedy = f"take the same ones, or another folder than {folder}"
    if path.stem in STEPS:
        remedy += f"; to do {path.stem} again, remove {path} and {path.with_suffix('')}, and those of the steps after it"
    then, new = flat(found), flat(now)
    differing = [(key, then.get(key), new.get(key)) for key in sorted({*then, *new}) if then.get(key) != new.get(key)]
    shown = "; ".join(f"{key}: {quoted(was, 160)} then, {quoted(value, 160)} now" for key, was, value in differing[:4])
    raise ConfigError(f"{path} was begun with other settings ({shown}); {remedy}")


def _read(path: Path) -> dict[str, Any]:
    """The values of a small JSON file; none where there is no such file. Raises ConfigError for any other."""
    try:
        return dict(read_json(path)) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is none that a step has written ({error}); remove it, or start a new work folder") from error
