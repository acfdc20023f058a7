"""Mutated inputs by the thousand: [ROUNDS [SEED]] [--round N] (default 10000 0); part of ``make test-long``.

Every round damages one good input that is not trusted (a manifest and its images, data as others publish them, archives included) and has
the functions read it that the commands and a training read it with. It must come to a value that is right by what is checked here, or to a
ConfigError or DataError of one printable line; within seconds, and without a change to the input or to anything outside. Anything else is a
defect, printed with the seed and the round that repeat it.
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

sys.path.extend(str(Path(__file__).resolve().parent.parent / part) for part in ("", "unit"))

import torch
import torch.distributed as dist
from conftest import build_test_model, read_rows, write_manifest, write_rows
from PIL import Image
from public_data import PUBLIC
from test_checkpoint import ONE

from cfvlm_ds.batching.collator import Collator, load_collator
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.errors import DataError, InputError
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.parsing import parse_config
from cfvlm_ds.data import check_manifest, open_groups, read_manifest
from cfvlm_ds.data.cfgroup import from_row, to_row
from cfvlm_ds.data.formats import FORMATS
from cfvlm_ds.data.identity import data_identity
from cfvlm_ds.objectives import OBJECTIVES
from cfvlm_ds.training import read_data as preflight
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
        self._write_data(folder / "data")
        (folder / "outside.png").write_bytes((folder / "data" / "images" / "a-0-0.png").read_bytes())

    def _write_data(self, data: Path) -> None:
        write_manifest(data / "a.jsonl", 4, seed=3)
        rows = read_rows(data / "a.jsonl")
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
        write_rows(data / "a.jsonl", rows)
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
    rows = read_rows(path)
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
            if what == "row" and path.suffix in (".json", ".jsonl") and path.is_file():  # and no pipe by now
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
    batch = base.collator.without_unreadable(groups).forwards[0]
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


KINDS: dict[str, tuple[int, Callable[[Base, Random, Path, Path], Case]]] = {
    "manifests": (2, manifest_case),
    "public data": (1, public_case),
}
"""Share of the rounds, and the mutation."""


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
    """What is in a folder but for the rows of converted containers, links not followed."""
    found = {}
    for path in [folder, *(each for each in folder.rglob("*") if ".prepared" not in str(each))]:
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
