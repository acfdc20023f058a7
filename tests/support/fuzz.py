"""Mutated inputs by the thousand: [ROUNDS [SEED]] [--round N] (default 10000 0); part of ``make test-long``.

Every round damages one good input (a manifest and its images, data as others publish them, a packed store, an index of rows, a
configuration, a run folder with checkpoints, stored scores, the DeepSpeed JSON, a model folder, a chat template) and has the functions read
it that the commands and a training read it with. It must come to a value that is right by what is checked here, or to a ConfigError or
DataError of one printable line; within seconds, and without a change to the input or to anything outside. Anything else is a defect,
printed with the seed and the round that repeat it. Prints a row for docs/reliability.md.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.extend(str(Path(__file__).resolve().parent.parent / part) for part in ("", "unit"))

import torch
import torch.distributed as dist
import yaml
from conftest import REPO, build_test_model, write_manifest
from PIL import Image
from public_data import PUBLIC
from safetensors.torch import load_file, save_file
from test_checkpoint import ONE, Engine
from transformers import get_scheduler

from cfvlm_ds import checkpoint, engine
from cfvlm_ds.batching.collator import Collator, load_collator
from cfvlm_ds.checkpoint import TrainState
from cfvlm_ds.cluster.run_lock import RunLock
from cfvlm_ds.core.config import ModelConfig, RunConfig
from cfvlm_ds.core.errors import DataError, InputError
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.layout import GroupLayout
from cfvlm_ds.core.parsing import parse_config
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.data import FORMATS, GroupSampler, check_manifest, lines, open_groups, pack, read_manifest
from cfvlm_ds.data.formats.cfgroup import from_row, to_row
from cfvlm_ds.data.identity import data_identity
from cfvlm_ds.data.stored_scores import StoredScores, read_scores, write_scores
from cfvlm_ds.engine.configuration import warmup_steps
from cfvlm_ds.export import _copy_files
from cfvlm_ds.export.files import Files, write_index
from cfvlm_ds.export.folder import replaced
from cfvlm_ds.export.source import read_saved, skeleton
from cfvlm_ds.models import Scorer, family_of, load_config, load_model
from cfvlm_ds.objectives import OBJECTIVES, denominators, weighted_loss
from cfvlm_ds.tracking import open_tracker
from cfvlm_ds.training import read_data as preflight
from cfvlm_ds.training.resume import is_finished
from cfvlm_ds.training.run import _locked
from cfvlm_ds.training.self_check import refuse_unusable
from cfvlm_ds.training.token_counts import group_tokens

MEMORY = 6 << 30  # bytes
COMPUTING_S, WAITING_S = 20, 600
"""A round takes milliseconds. The first bounds a loop, the second a wait; a busy machine can hold a round up for minutes of the clock."""

Random = random.Random
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 1.5, -0.0, 1e-300, 1e300, math.inf, -math.inf, math.nan, 10**20, -(10**20), 10**400, 2**31, 2**63,
    "", " ", "0", "auto", "null", "x", "\0", "\ud800", "a\nb", "a\x1b[31mb", "\u2028", "\u202e", "é" * 300, "x" * 100_000, "<image>",
    "</s>", "../x.png", "/etc/passwd", "images", ".", "..", "~", "loop", "fifo", "outside.png", "images/../../x", "i0", "t0", "sham",
    [], [[]], [None], ["i0", "t0", 1], ["i0", "t0", 0], [["i0"], {"t": 0}, True], ["images/a-0-0.png"] * 2,
    {}, {"a": 1}, {"id": "i0"}, {"": None},
]  # fmt: skip
LAUGHS = "\n".join(["a0: &a0 [x, x]", *(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 12))])
TAGS = [
    '!!python/object/apply:os.system ["touch left_behind"]', "!!python/name:os.system", "!!binary aGVsbG8=", "!!set {a, b}", "&a [*a]",
    "!!timestamp 2001-01-01", "{<<: {a: 1}}", "? [1, 2]\n: 3", "---\na: 1\n---\nb: 2", "@x", "`x`", "%TAG", "*nothing", "[" * 3000,
    "- " * 3000, LAUGHS, "0x1_0", "1:30", "1e3", ".inf", ".nan",
]  # fmt: skip
PIECES = [b"\xff", b"\xef\xbb\xbf", b"\r\n", b"\0", b'"', b"{", b"[" * 100_000, b"9" * 5000, b"\xed\xa0\x80", b"\xc2\x85"]


# Mutations ------------------------------------------------------------------------------------------------------------------------------


def nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from nodes(value[key])


def mutated(value: Any, chance: Random) -> tuple[Any, str]:
    """A JSON value with one part of it changed, removed, doubled, exchanged or wrapped, and what was done."""
    value = json.loads(json.dumps(value))
    container, key = chance.choice(list(nodes(value)) or [([value], 0)])
    what = chance.choice(["odd", "odd", "odd", "remove", "extra", "exchange", "wrap", "text"])
    if what == "remove":
        del container[key]
    elif what == "extra" and isinstance(container, dict):
        container[chance.choice(["x", "", "id", "path", "files", key.upper() if isinstance(key, str) else "k"])] = chance.choice(ODD)
    elif what == "extra":
        container.append(chance.choice([container[key], *ODD]))
    elif what == "exchange":
        other, place = chance.choice(list(nodes(value)) or [(container, key)])
        container[key] = json.loads(json.dumps(other[place]))
    elif what == "wrap":
        container[key] = chance.choice([[container[key]], {"a": container[key]}, str(container[key])])
    elif what == "text" and isinstance(container[key], str):
        container[key] = damaged(container[key].encode(), chance)[0].decode("latin1")
    else:
        container[key] = chance.choice(ODD)
    return value, f"{what} {key!r}"


def damaged(data: bytes, chance: Random) -> tuple[bytes, str]:
    """Bytes with a few of them flipped, cut off, removed, repeated or put in."""
    what, at = chance.choice(["flip", "flip", "bit", "cut", "remove", "repeat", "insert", "zeros"]), chance.randrange(len(data) + 1)
    length = chance.choice((1, 1, 2, 8, 64))
    after = data[at + length :]
    if what == "bit" and at < len(data):
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :], f"bit of byte {at}"
    middle = {
        "flip": chance.randbytes(length), "remove": b"", "repeat": data[at : at + length] * 3, "zeros": bytes(length), "bit": b"",
        "insert": chance.choice(PIECES),
    }  # fmt: skip
    return (data[:at], f"cut at {at}") if what == "cut" else (data[:at] + middle[what] + after, f"{what} {length} at {at}")


def reformatted(text: bytes, chance: Random) -> tuple[bytes, str]:
    """The same text as other programs write it; what is UTF-16 or ends in a null byte is not."""
    forms = {
        "BOM": b"\xef\xbb\xbf" + text, "CRLF": text.replace(b"\n", b"\r\n"), "UTF-16": text.decode().encode("utf-16"), "empty": b"",
        "binary": chance.randbytes(300),
        "null bytes": text + bytes(9), "twice": text + text, "blank lines": text.replace(b"\n", b"\n \n\n"),
    }  # fmt: skip
    what = chance.choice(list(forms))
    return forms[what], what


def damage_file(path: Path, chance: Random, outside: Path) -> str:
    """Damage a file, or put something else in its place."""
    what = chance.choice(["bytes"] * 8 + ["missing", "empty", "folder", "fifo", "loop", "dangling", "outside"])
    if what == "bytes":
        data, what = damaged(path.read_bytes(), chance)
        path.write_bytes(data)
        return f"{path.name}: {what}"
    path.unlink()
    if what == "empty":
        path.touch()
    elif what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what != "missing":
        path.symlink_to({"loop": path, "dangling": path.with_name("nothing"), "outside": outside}[what])
    return f"{path.name}: {what}"


# The good inputs ------------------------------------------------------------------------------------------------------------------------


class Base:
    """Good inputs in a folder, made once, and what reads them: one processor, one process group."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        model = build_test_model(folder / "model")
        self.config = parse_config(["--config", "tests/support/train.yaml", "--model.name_or_path", str(model)], OBJECTIVES)
        collator = load_collator(self.config.model, "full")
        preflight.load_collator = lambda model, cells, max_pixels: collator  # type: ignore[assignment]
        self.collator: Collator = collator
        self.config_texts = [path.read_text() for path in sorted((REPO / "examples").glob("*.yaml"))]
        self.config_texts += [(REPO / "tests" / "support" / "train.yaml").read_text(), yaml.safe_dump(dict(self.config.resolved))]
        self.options = [
            f"{section}.{name}" for section, values in self.config.resolved.items() if isinstance(values, dict) for name in values
        ]
        self.options += [f"objective.{term}.{name}" for term, values in self.config.resolved["objective"].items() for name in values]
        self._write_shards(folder / "sharded")
        self._write_data(folder / "data")
        (folder / "outside.png").write_bytes((folder / "data" / "images" / "a-0-0.png").read_bytes())
        self.groups = read_manifest(folder / "data" / "a.jsonl")
        self.stored = {
            g.id: StoredScores(tuple(tuple(-1.5 - c for c in range(len(g.candidates))) for _ in g.images), (-2.5,) * len(g.candidates))
            for g in self.groups
        }
        self.data = data_identity(self.groups, [folder / "data"])
        pack.PICTURED, pack.ROWS = 2, 3
        pack.pack(open_groups(folder / "data" / "a.jsonl"), folder / "store", str, max_pixels=10**6)
        self.identity = {"weights": "w", "inputs": "i"}
        (folder / "scores").mkdir()
        write_scores(folder / "scores" / "a.scores.jsonl", self.groups, self.stored, "model", self.data, made_by=self.identity)
        self._write_run(folder / "run")

    def _write_shards(self, sharded: Path) -> None:
        shutil.copytree(self.folder / "model", sharded)
        weights = load_file(sharded / "model.safetensors")
        (sharded / "model.safetensors").unlink()
        placed = {name: f"model-{number % 2 + 1:05d}-of-00002.safetensors" for number, name in enumerate(sorted(weights))}
        for file in set(placed.values()):
            save_file({name: weights[name] for name, place in placed.items() if place == file}, sharded / file, {"format": "pt"})
        (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))

    def _write_data(self, data: Path) -> None:
        write_manifest(data / "a.jsonl", 4, seed=3)
        rows = [json.loads(line) for line in (data / "a.jsonl").read_text().splitlines()]
        one, other = (image["path"] for image in next(row for row in rows if len(row["images"]) > 1)["images"][:2])
        for suffix in ("jpg", "gif", "bmp", "tiff", "webp", "ppm"):
            Image.open(data / one).save(data / "images" / f"b.{suffix}")
        texts = [{"id": f"t{c}", "text": text, "prompt": "Which?"} for c, text in enumerate(("two dogs", "three dogs"))]
        cells = [["i0", "t0", 1], ["i0", "t1", 0]]
        rows += [
            {"id": "words", "images": [{"id": "i0", "path": None}], "texts": texts, "match": cells},
            {"id": "both", "images": [{"id": "i0", "path": ["images/b.jpg", "images/b.gif"]}], "texts": texts, "match": cells, "weight": 2},
            {"id": "tiff", "images": [{"id": "i0", "path": "images/b.tiff"}], "texts": texts, "match": cells},
            {"id": "webp", "images": [{"id": "i0", "path": "images/b.webp"}], "texts": texts, "match": cells},
        ]
        (data / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pair = {"image_0": one, "image_1": other, "caption_0": "a dog", "caption_1": "a cat", "prompt": "Describe.", "edit": "object"}
        (data / "a.pairs.jsonl").write_text("".join(json.dumps({**pair, "id": str(n)}) + "\n" for n in range(3)))
        samples = [{"cf_text": "a cat", "cf_image_path": other}, {"cf_text": "a hen", "cf_image_path": "images/b.ppm"}]
        published = {"orig_input": f"Yes: <|vision_start|>{one}<|vision_end|>", "orig_output": "a dog", "cf_samples": samples}
        (data / "a.cfvlm.json").write_text(json.dumps(published) + "\n" + json.dumps({**published, "orig_output": "an ox"}) + "\n")
        self.public: dict[str, tuple[Path, str]] = {}
        for name, (write, _) in PUBLIC.items():
            (place := self.folder / "public" / name).mkdir(parents=True)
            path, format = write(place, 4)
            self.public[name] = path.relative_to(place), format

    def _write_run(self, run: Path) -> None:
        run.mkdir()
        for step in (2, 4):
            checkpoint.save(Engine(), TrainState(step=step, run_id="a" * 32), run, ONE, keep=0)
        (run / "finished.json").write_text(json.dumps({"step": 4}))
        with open_tracker(True, run, "experiment", "run", {"a": 1}, {"b": "c"}, mlflow=False) as tracker:
            for step in range(1, 5):
                tracker.log(step, {"loss": 1.0 / step, "nan": math.nan})
        RunLock(run).__exit__(None, None, None)
        lock = {"host": "elsewhere", "pid": 1, "born": 0.0, "processes": "other", "job": None, "restart": "0", "started": "then"}
        (run / "run.lock").write_text(json.dumps(lock))
        os.utime(run / "run.lock", (0, 0))
        data = self.folder / "data" / "a.jsonl"
        preflight.read_data(self.reading(data, run, "full"), ONE)

    def reading(self, manifest: Path, run: Path, check: str, format: str = "cfgroup") -> RunConfig:
        """A configuration that trains on this manifest."""
        data = replace(self.config.data, train=str(manifest), check=check, format=format)
        return replace(self.config, data=data, train=replace(self.config.train, output_dir=str(run)))


Case = tuple[str, Callable[[], None]]
"""What was mutated, and the reading of it: returns when the value is right, raises ConfigError or DataError by name."""


# A manifest and its images --------------------------------------------------------------------------------------------------------------


def manifest_case(base: Base, chance: Random, folder: Path, out: Path) -> Case:
    shutil.copytree(base.folder / "data", folder, dirs_exist_ok=True)
    (folder / "loop").symlink_to("loop")
    (folder / "outside.png").symlink_to(base.folder / "outside.png")
    os.mkfifo(folder / "fifo")
    format, name = chance.choice([*[("cfgroup", "a.jsonl")] * 4, ("pairs", "a.pairs.jsonl"), ("cfvlm", "a.cfvlm.json")])
    path, done = folder / name, []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        what = chance.choice(["row", "row", "row", "bytes", "form", "image", "image", "list", "nothing"])
        done.append(what)
        if what in ("row", "list"):
            rows, change = mutated(rows, chance)
            done[-1] += f" {change}"
            path.write_text(
                json.dumps(rows) if what == "list" or not isinstance(rows, list) else "".join(json.dumps(r) + "\n" for r in rows)
            )
            if what == "list":
                path = path.rename(path.with_suffix(".json"))
        elif what == "image":
            files = [file for file in sorted((folder / "images").iterdir()) if file.is_file() and not file.is_symlink()]
            done[-1] = damage_file(chance.choice(files), chance, base.folder / "outside.png")
        elif what != "nothing":
            with contextlib.suppress(UnicodeDecodeError):  # what is no UTF-8 any more stays as it is
                data, change = (damaged if what == "bytes" else reformatted)(path.read_bytes(), chance)
                path.write_bytes(data)
                done[-1] = change
    check = chance.choice(("full", "full", "rows"))
    return f"{path.name} as {format}, check {check}: {'; '.join(done)}", functools.partial(read_groups, base, path, format, check, out)


def public_case(base: Base, chance: Random, folder: Path, out: Path) -> Case:
    """Data as other projects publish them: a row changed, or the bytes of any file, or one file in the place of another."""
    name = chance.choice(list(base.public))
    folder = out / "data"  # what containers are made into lies beside them
    shutil.copytree(base.folder / "public" / name, folder)
    (folder / "outside.png").symlink_to(base.folder / "outside.png")
    os.mkfifo(folder / "fifo")
    relative, format = base.public[name]
    path, done = folder / relative, []
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.is_symlink()]
        holding = [file for file in files if file == path or path in file.parents] or files
        what = chance.choice(["row", "row", "row", "bytes", "bytes", "form", "any", "nothing"])
        done.append(what)
        with contextlib.suppress(ValueError, IndexError, OSError):  # an earlier mutation left nothing to change, or no text
            if what == "row" and path.suffix in (".json", ".jsonl"):
                text = path.read_text()
                rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
                rows, change = mutated(rows, chance)
                done[-1] += f" {change}"
                is_list = path.suffix == ".json" or not isinstance(rows, list)
                path.write_text(json.dumps(rows) if is_list else "".join(json.dumps(row) + "\n" for row in rows))
            elif what == "any":
                done[-1] = damage_file(chance.choice(files), chance, base.folder / "outside.png")
            elif what != "nothing":
                data, change = (reformatted if what == "form" else damaged)((file := chance.choice(holding)).read_bytes(), chance)
                file.write_bytes(data)
                done[-1] = f"{file.name}: {change}"
    format = chance.choice([format] * 8 + ["auto", *FORMATS])
    check = chance.choice(("full", "full", "rows"))
    return f"{name} as {format}, check {check}: {'; '.join(done)}", functools.partial(read_public, base, path, format, check, out / "run")


def read_public(base: Base, path: Path, format: str, check: str, run: Path) -> None:
    """As any manifest."""
    os.environ["XDG_CACHE_HOME"] = str(run.parent / "cache")
    read_groups(base, path, open_groups(path, format=format).format, check, run)


def read_groups(base: Base, path: Path, format: str, check: str, out: Path) -> None:
    """As ``cfvlm-ds data check`` and a training do; what one accepts the other must, and a batch must come of it."""
    report = check_manifest(path, None, format, lengths=base.collator, progress=str)
    str(report).encode()
    for problem in report.problems:
        one_line(problem)
    config = base.reading(path, out, check, format)
    groups = list(preflight.read_data(config, ONE).groups)
    assert report.ok or check == "rows", "the check of a training let pass what `data check` finds"
    assert groups == read_manifest(path, None, format) and len({group.id for group in groups}) == len(groups) == report.num_groups
    for group in groups:
        consistent(group, path.parent)
    data_identity(groups, [path.parent])
    try:
        tokens = list(group_tokens(groups, base.collator, config.data, ONE))
    except DataError:
        assert not report.ok, "headers can be read of images that open"
        raise
    kept, dropped = base.collator.readable(groups)
    assert not (report.ok and dropped), dropped
    for _, why in dropped:
        one_line(why)
    batch = base.collator.without_unreadable(groups)[0]
    assert batch.layout.ids == tuple(group.id for group in kept)
    for g, group in enumerate(kept):
        known = [[-1 if truth is None else truth for truth in line] for line in group.match]
        assert batch.layout.match[g, : len(group.images), : len(group.candidates)].tolist() == known
    assert all(torch.isfinite(value).all() for value in batch.model_inputs.values() if torch.is_tensor(value))
    if report.ok:
        assert tokens == [base.collator([group]).num_tokens for group in groups]


def consistent(group: CounterfactualGroup, root: Path) -> None:
    """What a group must be, said again and naively."""
    truths = [truth for line in group.match for truth in line]
    assert len(truths) == len(group.images) * len(group.candidates) and truths[0] == 1
    assert all(truth is None or (type(truth) is int and truth in (0, 1)) for truth in truths), truths
    assert 0 < group.weight < math.inf and all(candidate.text.strip() for candidate in group.candidates)
    for picture in [picture for pictures in group.images for picture in pictures]:
        assert os.path.realpath(picture).startswith(f"{os.path.realpath(root)}/"), picture
    assert from_row(json.loads(json.dumps(to_row(group, root))), root) == group
    repr(group).encode()


# A packed store -------------------------------------------------------------------------------------------------------------------------


def store_case(base: Base, chance: Random, folder: Path, out: Path) -> Case:
    shutil.copytree(base.folder / "store", folder, dirs_exist_ok=True)
    done = []
    for _ in range(chance.choice((1, 1, 2))):
        what = chance.choice(["file", "file", "record", "exchange", "nothing"])
        files, change = sorted(path for path in folder.iterdir() if path.is_file() and not path.is_symlink()), ""
        record = folder / "store.json"
        if what == "file" and files:
            change = damage_file(chance.choice(files), chance, base.folder / "outside.png")
        elif what == "record" and record in files:
            with contextlib.suppress(ValueError):
                value, change = mutated(json.loads(record.read_bytes()), chance)
                record.write_text(json.dumps(value))
        elif what == "exchange":
            one, other = chance.sample(files, 2)
            one.rename(folder / "aside")
            other.rename(one)
            (folder / "aside").rename(other)
            change = f"{one.name} {other.name}"
        done.append(f"{what} {change}")
    return "; ".join(done), functools.partial(use_store, base, folder, out)


def use_store(base: Base, folder: Path, out: Path) -> None:
    """What is found sound holds groups of the data set that was packed, and their pictures, and nothing else."""
    report = check_manifest(folder, lengths=base.collator, progress=str)
    for problem in report.problems:
        one_line(problem)
    known = {group.id: group for group in base.groups}
    groups = list(preflight.read_data(base.reading(folder, out, "full"), ONE).groups)
    left = [problem for problem in report.problems if "its sha256 is another" not in problem]  # of bytes that no picture has
    assert not left, "the check of a training let pass what `data check` finds"
    for group in groups:
        expected = known[group.id]
        assert replace(group, images=expected.images) == expected
        assert all(picture.parent == folder for image in group.images for picture in image)
    base.collator(groups)


# An index of rows -----------------------------------------------------------------------------------------------------------------------


def index_case(base: Base, chance: Random, folder: Path, out: Path) -> Case:
    """An index that does not fit its file: damaged, cut, of another file, or with rows hidden; the file itself is as it was."""
    folder = out / "data"  # where an index may be made again
    shutil.copytree(base.folder / "data", folder)
    path, index = folder / "a.jsonl", folder / "a.jsonl.idx"
    with patch.object(lines, "_WORTH", 0), patch.object(lines, "_NUMBERED", 2):
        open_groups(path)
    done = []
    for _ in range(chance.choice((1, 1, 2))):
        what = chance.choice(["bytes", "bytes", "number", "number", "file", "nothing"])
        if not index.is_file() or index.is_symlink():
            break
        data = index.read_bytes()
        if what == "number" and len(data) > lines._HEADER.itemsize + 8:  # any of them, in place of any other
            at, of = (lines._HEADER.itemsize + 4 * chance.randrange((len(data) - lines._HEADER.itemsize - 8) // 4) for _ in range(2))
            index.write_bytes(data[:at] + data[of : of + 8] + data[at + 8 :])
            what = f"number at {at} from {of}"
        elif what == "bytes":
            data, what = damaged(data, chance)
            index.write_bytes(data)
        elif what == "file":
            what = damage_file(index, chance, base.folder / "outside.png")
        done.append(what)
    return "; ".join(done), functools.partial(use_index, base, path)


def use_index(base: Base, path: Path) -> None:
    """The rows of the file, or an error that names one; whatever the index says."""
    with patch.object(lines, "_WORTH", 0), patch.object(lines, "_NUMBERED", 2):
        groups = list(open_groups(path))

    def said(found: list[CounterfactualGroup]) -> list[Any]:
        return [[getattr(group, part) for part in ("id", "candidates", "match", "edits", "weight", "source", "meta")] for group in found]

    assert said(groups) == said(base.groups)


# A configuration ------------------------------------------------------------------------------------------------------------------------


def config_case(base: Base, chance: Random, folder: Path, out: Path) -> Case:
    text, done, argv = chance.choice(base.config_texts), [], list[str]()
    for _ in range(chance.choice((0, 1, 1, 2))):
        what = chance.choice(["value", "value", "bytes", "form", "tag"])
        with contextlib.suppress(
            yaml.YAMLError, AttributeError, TypeError, ValueError, RecursionError
        ):  # an earlier mutation left nothing to change
            if what == "value":
                value, change = mutated(yaml.safe_load(text), chance)
                text = json.dumps(value) if chance.random() < 0.5 else yaml.safe_dump(value)
            elif what == "tag":
                lines = text.splitlines()
                at = chance.randrange(len(lines))
                change = chance.choice(TAGS)
                lines[at] = chance.choice([lines[at].partition(":")[0] + ": " + change, change])
                text = "\n".join(lines)
            else:
                data, change = (damaged if what == "bytes" else reformatted)(text.encode(), chance)
                text = data.decode("latin1")
            done.append(f"{what} {change[:60]!r}")
    path = folder / "run.yaml"
    path.write_bytes(text.encode("latin1", "surrogatepass") if text.isascii() or "\xff" in text else text.encode("utf-8", "surrogatepass"))
    for _ in range(chance.choice((0, 1, 1, 2))):
        option = chance.choice([*base.options, "deepspeed", "train", "data.evaluation.x", "build.scenes.num_train", "x", "config"])
        value = str(chance.choice([*ODD, *TAGS, *base.options]))[: 1 << 16].replace("\0", "")  # the system takes no null byte here
        argv += [f"--{option}={value}"] if chance.random() < 0.5 else [f"--{option}", value]
        done.append(f"--{option} {value[:60]!r}")
    argv = [*argv, "--config", str(path)] if chance.random() < 0.3 else ["--config", str(path), *argv]
    return f"{'; '.join(done)}", functools.partial(read_config, argv, folder, chance.random() < 0.2)


def read_config(argv: list[str], folder: Path, again: bool) -> None:
    """As train.py does; then everything that a run makes of the values before it loads a model."""
    config = parse_config(argv, OBJECTIVES, prog="train.py")
    numbers = [container[key] for container, key in nodes(json.loads(json.dumps(config.resolved))) if not isinstance(container[key], str)]
    assert all(math.isfinite(number) for number in numbers if isinstance(number, float))
    if again:
        (written := folder.parent / "config.yaml").write_text(yaml.safe_dump(dict(config.resolved)))
        assert parse_config(["--config", str(written)], OBJECTIVES).resolved == config.resolved
    train = config.train
    torch.manual_seed(train.seed)
    sampler = GroupSampler(
        num_groups=5, groups_per_micro_batch=train.micro_batch_size, seed=train.seed, rank=0, world_size=1,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
    )  # fmt: skip
    steps = train.max_steps if train.max_steps > 0 else sampler.num_steps(train.num_train_epochs)
    assert steps > 0
    raw = engine.read_json(config.deepspeed)
    resolved = engine.resolve(raw, config, 1, torch.device("cpu"), 32, steps)
    engine.validate(config, resolved)
    weight = torch.nn.Parameter(torch.zeros(2))
    decay, betas = train.weight_decay, (train.adam_beta1, train.adam_beta2)
    optimizer = torch.optim.AdamW([weight], train.learning_rate, betas, train.adam_epsilon, decay)
    get_scheduler(train.lr_scheduler_type, optimizer, warmup_steps(config, steps), steps).step()
    layout = GroupLayout(
        torch.ones(1, 2, 2, dtype=torch.bool),
        torch.eye(2, dtype=torch.int8)[None],
        *[torch.ones(1, 2, 2, dtype=torch.int64)] * 2,
        torch.ones(1),
    )
    logp = torch.tensor([[[-1.0, -2.0], [-3.0, -1.5]]])
    scores = Scores(layout, logp, logp / 9, logp, logp[:, 0])
    loss, _ = weighted_loss(config.objective, scores, denominators(config.objective, layout), 1, 0.5)
    assert torch.isfinite(loss), f"a loss of {loss}"


# A run folder with its checkpoints ------------------------------------------------------------------------------------------------------


def run_case(base: Base, chance: Random, folder: Path, out: Path) -> Case:
    shutil.copytree(base.folder / "run", folder, dirs_exist_ok=True)
    done, resume = [], chance.choice(["auto"] * 6 + ["never", *[str(folder / name) for name in ("checkpoint-4", "checkpoint-2", "x", "")]])
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
        what = chance.choice(["file", "file", "list", "list", "add", "rename", "state", "state"])
        points = sorted(path for path in folder.glob("checkpoint-*") if path.is_dir())
        if not points:
            break
        point, change = chance.choice(points), ""
        files = sorted(path for path in point.rglob("*") if path.is_file())
        if what == "file" and files:
            change = damage_file(chance.choice(files), chance, base.folder / "outside.png")
        elif what == "list" and (point / "complete.json").is_file():
            with contextlib.suppress(ValueError, RecursionError):
                value, change = mutated(json.loads((point / "complete.json").read_text()), chance)
                (point / "complete.json").write_text(json.dumps(value))
        elif what == "add":
            change = chance.choice(
                ["checkpoint-9", "checkpoint-" + "9" * 200, "checkpoint-4.partial", "checkpoint-", "checkpoint-٣", "latest"]
            )
            with contextlib.suppress(FileExistsError):
                (folder / change).touch() if chance.random() < 0.3 else (folder / change).mkdir()
        elif what == "rename":
            change = f"checkpoint-{chance.choice([0, 3, 7, '007', 4, 'best'])}"
            with contextlib.suppress(OSError):
                point.rename(folder / change)
        elif what == "state":
            states = ("finished.json", "metrics.jsonl", ".mlflow_delivery.json", "data_check.json", "run.lock")
            file = folder / chance.choice(states)
            if not file.is_file() or file.is_symlink():
                continue
            with contextlib.suppress(ValueError, RecursionError):
                if chance.random() < 0.3:
                    change = damage_file(file, chance, base.folder / "outside.png")
                elif chance.random() < 0.6 and file.name != "metrics.jsonl":
                    value, change = mutated(json.loads(file.read_text()), chance)
                    file.write_text(json.dumps(value))
                else:
                    data, change = damaged(file.read_bytes(), chance)
                    file.write_bytes(data)
            if file.name == "run.lock" and file.is_file():
                os.utime(file, (0, 0))
            change = f"{file.name}: {change}"
        done.append(f"{what} {point.name} {change}")
    return f"resume={resume}: {'; '.join(done)}", functools.partial(resume_run, base, folder, out, resume)


def resume_run(base: Base, folder: Path, out: Path, resume: str) -> None:
    """As a training does before it loads a model."""
    found = checkpoint.find(folder, resume, ONE)
    step, run_id = 0, None
    if found is not None:
        described = checkpoint.description(found)
        step, run_id = described["step"], described["run_id"]
        original = base.folder / "run" / f"checkpoint-{step}"
        assert original.is_dir() and run_id == "a" * 32 and described["world_size"] == 1 and found.name == original.name, described
        for file in original.rglob("*"):
            same = file.is_dir() or (found / file.relative_to(original)).read_bytes() == file.read_bytes()
            assert same or file.name == "complete.json", file
        state = TrainState()
        checkpoint.load(Engine(), found, state, ONE, out)
        assert (state.step, state.run_id) == (step, run_id)
    copied_run(folder, out)
    config = base.reading(base.folder / "data" / "a.jsonl", out, "full")
    with _locked(out, ONE):
        assert list(preflight.read_data(config, ONE).groups) == base.groups
        is_finished(config, 4, ONE)
        with open_tracker(True, out, "experiment", "run", {"a": 1}, {}, run_id=run_id, resume_step=step, mlflow=False) as tracker:
            tracker.log(step + 1, {"loss": 0.5})
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert all(row["step"] <= step for row in rows[:-1]) and rows[-1]["step"] == step + 1


def copied_run(folder: Path, out: Path) -> None:
    """A run folder without its checkpoints, with whatever else is in it."""
    for path in (path for path in folder.iterdir() if not path.name.startswith("checkpoint-")):
        if path.is_symlink():
            (out / path.name).symlink_to(os.readlink(path))
        elif path.is_fifo():
            os.mkfifo(out / path.name)
        elif path.is_file():
            shutil.copy2(path, out / path.name)
        else:
            shutil.copytree(path, out / path.name, symlinks=True)


# Stored scores, and the DeepSpeed JSON ---------------------------------------------------------------------------------------------------


def scores_case(base: Base, chance: Random, folder: Path, out: Path) -> Case:
    path = folder / "a.scores.jsonl"
    shutil.copy(base.folder / "scores" / path.name, path)
    if chance.random() < 0.6:
        rows, done = mutated([json.loads(line) for line in path.read_text().splitlines()], chance)
        path.write_text("".join(json.dumps(row) + "\n" for row in (rows if isinstance(rows, list) else [rows])))
    elif chance.random() < 0.5:
        done = damage_file(path, chance, base.folder / "outside.png")
    else:
        data, done = reformatted(path.read_bytes(), chance)
        path.write_bytes(data)
    return done, functools.partial(use_scores, base, path)


def use_scores(base: Base, path: Path) -> None:
    stored = read_scores(path, base.groups, base.data, made_by=base.identity)
    for group in base.groups:
        lines = [*stored[group.id].logp, stored[group.id].blank]
        assert [len(line) for line in lines] == [len(group.candidates)] * (len(group.images) + 1)
        assert all(math.isfinite(value) for line in lines for value in line)
    collator = load_once(base, path.name)
    collator.stored = stored
    batch = collator(base.groups)
    assert batch.reference is not None and torch.isfinite(batch.reference).all()


@functools.cache
def load_once(base: Base, _: str) -> Collator:
    return load_collator(base.config.model, "full")


def deepspeed_case(base: Base, chance: Random, folder: Path, out: Path) -> Case:
    source = chance.choice(sorted((REPO / "ds_configs").glob("*.json")))
    shutil.copy(source, path := folder / "ds.json")
    done = source.name
    for _ in range(chance.choice((0, 1, 1, 2))):
        if chance.random() < 0.7:
            with contextlib.suppress(ValueError):
                value, change = mutated(json.loads(path.read_bytes()), chance)
                path.write_text(json.dumps(value))
                done += f"; {change}"
        elif path.is_file() and not path.is_symlink():
            done += f"; {damage_file(path, chance, base.folder / 'outside.png')}"
            if not path.is_file():
                break
    return done, functools.partial(use_deepspeed, replace(base.config, deepspeed=str(path)))


def use_deepspeed(config: RunConfig) -> None:
    resolved = engine.resolve(engine.read_json(config.deepspeed), config, 1, torch.device("cpu"), 32, 10)
    engine.validate(config, resolved)
    train = config.train
    micro, accumulation = train.micro_batch_size, train.gradient_accumulation_steps
    assert resolved.config.get("train_batch_size", micro * accumulation) == micro * accumulation


# A model folder, and its chat template -------------------------------------------------------------------------------------------------

PIECES_OF_TEMPLATES = [
    "{{ 9**9**9 }}", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 'x' * 10**9 }}",
    "{{ missing.x }}",
    "{{ raise_exception('no') }}", "{% if", "{% endif %}", "{{ ''.__class__.__mro__ }}", "{% include '/etc/passwd' %}", "{{ 1 // 0 }}",
    "{{ strftime_now('%Y') }}", "{{ eos_token }}", "{{ bos_token }}", "<think>\n", "<image>", "\0", "\ud800", "{{ messages | length }}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "{{ messages }}", "{% set messages = [] %}", "{{ range(10**9) | list }}",
    "{{ tools[0] }}", "{% generation %}x{% endgeneration %}", "{{ messages[0]['content'][0]['type'] }}",
    "{{ cycler.__init__.__globals__ }}",
]  # fmt: skip


def model_case(base: Base, chance: Random, folder: Path, out: Path) -> Case:
    shutil.copytree(base.folder / chance.choice(("model", "model", "sharded")), folder, dirs_exist_ok=True)
    done = []
    for _ in range(chance.choice((1, 1, 1, 2))):
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.is_symlink())
        texts = [path for path in files if path.suffix == ".json"]
        weights = [path for path in files if path.suffix == ".safetensors"]
        what = chance.choice(["value", "value", "value", "value", "file", "header", "header", "index", "template", "link"])
        change = ""
        with contextlib.suppress(ValueError, OSError, IndexError):  # an earlier mutation left nothing to change
            if what == "value":
                path = chance.choice([*texts, *[path for path in texts if path.name == "config.json"] * 3])
                value, change = mutated(json.loads(path.read_bytes()), chance)
                path.write_text(json.dumps(value))
                change = f"{path.name} {change}"
            elif what == "file":
                change = damage_file(chance.choice(files), chance, base.folder / "outside.png")
            elif what == "header":
                data = (path := chance.choice(weights)).read_bytes()
                size = int.from_bytes(data[:8], "little")
                value, change = mutated(json.loads(data[8 : 8 + size]), chance)
                text = json.dumps(value).encode()
                path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
            elif what == "index":
                path = folder / "model.safetensors.index.json"
                index = json.loads(path.read_bytes())
                name = chance.choice([str(base.folder / "model" / "model.safetensors"), "../x.safetensors", "config.json", *ODD])
                index["weight_map"][chance.choice(sorted(index["weight_map"]))] = name
                path.write_text(json.dumps(index))
                change = str(name)[:60]
            elif what == "template":
                path = folder / "chat_template.jinja"
                path.write_bytes(template(path.read_bytes(), chance))
            else:
                link = folder / chance.choice(["NOTICE", "additional_chat_templates", "extra.json", "adapter_config.json", "config.json"])
                link.unlink(missing_ok=True)
                link.symlink_to(chance.choice([base.folder / "outside.png", base.folder, "nothing", link.name, "/dev/zero", "/etc/passwd"]))
                change = link.name
        done.append(f"{what} {change}")
    return "; ".join(done), functools.partial(use_model, base, folder, out)


def use_model(base: Base, folder: Path, out: Path) -> None:
    """As scoring, training and the export do; nothing outside of ``out`` changes."""
    model = ModelConfig(str(folder))
    before = snapshot(base.folder / "model"), (base.folder / "outside.png").read_bytes()
    try:
        collator = load_collator(model, "full")
        scorer = Scorer(load_model(model, torch.float32), family_of(load_config(str(folder)))).eval()
        refuse_unusable(scorer, collator, str(folder), torch.device("cpu"))
        batch = collator(base.groups[:1])
        assert batch.scores(scorer(**batch.model_inputs)).logp.shape == batch.layout.valid.shape
        with replaced(out / "export", "config.json", [folder]) as partial:
            saved, metadata = read_saved(folder, skeleton(str(folder)))
            _copy_files(folder, partial)
            Files(partial, saved, str)
            write_index(partial, saved, metadata)
        assert not any(path.is_symlink() for path in out.rglob("*"))
        assert {path.name for path in (out / "export").glob("*.safetensors")} == {tensor.file for tensor in saved.values()}
    finally:
        assert before == (snapshot(base.folder / "model"), (base.folder / "outside.png").read_bytes()), "written elsewhere"


def template(text: bytes, chance: Random) -> bytes:
    """A chat template with a piece put in, one of its own pieces changed, or its bytes damaged."""
    if chance.random() < 0.25:
        return damaged(text, chance)[0]
    at = chance.choice([0, len(text), *(n + 2 for n in range(len(text)) if text[n : n + 2] == b"%}")])
    return text[:at] + chance.choice(PIECES_OF_TEMPLATES).encode("utf-8", "surrogatepass") + text[at:]


def template_case(base: Base, chance: Random, folder: Path, out: Path) -> Case:
    shutil.copytree(base.folder / "model", folder, dirs_exist_ok=True)
    path = folder / "chat_template.jinja"
    path.write_bytes(written := template(path.read_bytes(), chance))
    return repr(written[-300:]), functools.partial(use_template, base, folder)


def use_template(base: Base, folder: Path) -> None:
    collator = load_collator(ModelConfig(str(folder)), "full")
    kept, dropped = collator.readable(base.groups)
    for _, why in dropped:
        one_line(why)
    if kept:
        batch = collator(kept)
        assert batch.layout.ids == tuple(group.id for group in kept) and bool((batch.layout.num_tokens[batch.layout.valid] > 0).all())


KINDS: dict[str, tuple[int, Callable[[Base, Random, Path, Path], Case]]] = {
    "manifests": (24, manifest_case),
    "public data": (12, public_case),
    "packed stores": (8, store_case),
    "row indexes": (4, index_case),
    "configurations": (10, config_case),
    "run folders": (18, run_case),
    "stored scores": (8, scores_case),
    "DeepSpeed JSONs": (8, deepspeed_case),
    "model folders": (10, model_case),
    "chat templates": (6, template_case),
}
"""Share of the rounds in percent, and the mutation."""


# The campaign ---------------------------------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """Not an Exception: what is caught as one on the way must not swallow it."""


@dataclass
class Defect(Exception):
    """A round that ended as none may."""

    seed: int
    number: int
    mutation: str
    found: str

    def __str__(self) -> str:
        again = f"python tests/support/fuzz.py 1 {self.seed} --round {self.number}"
        return f"round {self.number} of seed {self.seed}: {self.mutation}\n{self.found}\nagain: {again}"


def one_line(message: str) -> None:
    """A sentence that any terminal and any log takes."""
    assert message.isprintable() and message.strip(), f"not one printable line: {message!r}"[:3000]
    assert len(message) <= 4000, f"a sentence of {len(message)} characters: {message[:300]}"


def snapshot(folder: Path) -> dict[str, tuple[int, int, str | int]]:
    """What is in a folder, links not followed."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        stat = path.lstat()
        content = os.readlink(path) if path.is_symlink() else zlib.crc32(path.read_bytes()) if path.is_file() else 0
        found[str(path.relative_to(folder))] = (stat.st_mode, 0 if path.is_dir() else stat.st_mtime_ns, content)
    return found


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def ended(*_: object) -> None:
        raise Hang(f"still running after {COMPUTING_S} s of the processor, or {WAITING_S} s of the clock")

    signal.signal(signal.SIGPROF, ended)
    signal.signal(signal.SIGALRM, ended)
    signal.setitimer(signal.ITIMER_PROF, COMPUTING_S)
    signal.alarm(WAITING_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)


def play(base: Base, seed: int, number: int) -> tuple[str, str]:
    """One round: its kind, and "a correct run" or the name of the error. Raises Defect."""
    chance = random.Random(f"{seed}/{number}")
    kind = chance.choices(list(KINDS), [share for share, _ in KINDS.values()])[0]
    with tempfile.TemporaryDirectory(dir=base.folder) as name:
        folder, out, here = Path(name) / "in", Path(name) / "out", Path.cwd()
        folder.mkdir(), out.mkdir()
        try:
            mutation, attempt = KINDS[kind][1](base, chance, folder, out)
        except Exception:  # the campaign's own fault, and no reason to end it
            raise Defect(seed, number, kind, traceback.format_exc()) from None
        before, ended = snapshot(folder), "a correct run"
        try:
            with limited(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                attempt()
        except InputError as error:
            ended = type(error).__name__
            try:
                one_line(str(error))
            except AssertionError as wrong:
                raise Defect(seed, number, f"{kind}: {mutation}", str(wrong)) from error
        except (Exception, Hang, SystemExit):
            raise Defect(seed, number, f"{kind}: {mutation}", traceback.format_exc()) from None
        after = snapshot(folder)
        if changed := {path: (before.get(path), after.get(path)) for path in before | after if before.get(path) != after.get(path)}:
            raise Defect(seed, number, f"{kind}: {mutation}", f"changed or left behind: {changed}")
        if (left := set(os.listdir(name)) - {"in", "out", "config.yaml"}) or Path.cwd() != here:
            raise Defect(seed, number, f"{kind}: {mutation}", f"left behind: {left}")
    return kind, ended


@contextlib.contextmanager
def prepared() -> Iterator[Base]:
    """The good inputs, with a process group of one."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
            yield Base(Path(name))
    finally:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", type=int, nargs="?", default=10_000)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--round", type=int, help="play this one only")
    given = parser.parse_args()
    ended: Counter[tuple[str, str]] = Counter()
    defects, started, say = 0, time.monotonic(), functools.partial(print, file=sys.__stdout__, flush=True)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))  # a defect is a MemoryError, not the end of the machine
    with prepared() as base:
        for number in range(given.rounds) if given.round is None else [given.round]:
            try:
                ended[play(base, given.seed, number)] += 1
            except Defect as defect:
                defects += 1
                say(defect)
            if number % 1000 == 999:
                say(f"{number + 1} rounds, {defects} defects, {time.monotonic() - started:.0f} s")
    for kind in KINDS:
        results = {what: count for (each, what), count in sorted(ended.items()) if each == kind}
        named = sum(results.values()) - (correct := results.get("a correct run", 0))
        say(f"| {kind} | {sum(results.values())} | {named} | {correct} |")
    say(f"{sum(ended.values()) + defects} rounds of seed {given.seed}, {defects} defects, {time.monotonic() - started:.0f} s")
    sys.exit(bool(defects))


if __name__ == "__main__":
    main()
