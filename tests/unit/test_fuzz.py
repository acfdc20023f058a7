"""Damaged input: manifests, pictures, archives and files of other projects, changed by Hypothesis and read as a training reads them."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ONE, build_test_model, read_rows, write_manifest, write_rows
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from PIL import Image
from public_data import PUBLIC

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

COMPUTING_S = 20  # of the processor; a round takes milliseconds
DRAWN = settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))

# Damage ---------------------------------------------------------------------------------------------------------------------------------

HOSTILE: list[Any] = [
    math.nan, math.inf, -math.inf, -0.0, 10**400, 2**63, "\0", "\ud800", "a\nb", "a\x1b[31mb", "\u2028", "\u202e", "x" * 100_000, "auto",
    "<image>", "</s>", "../x.png", "/etc/passwd", "images", ".", "..", "~", "loop", "fifo", "outside.png", "images/../../x",
    "i0", "t0", "sham", ["i0", "t0", 1], ["i0", "t0", 0], [["i0"], {"t": 0}, True], ["images/a-0-0.png"] * 2, {"id": "i0"}, {"": None},
]  # fmt: skip
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.sampled_from(HOSTILE) | st.recursive(PLAIN, lambda of: st.lists(of, max_size=3) | st.dictionaries(st.text(), of, max_size=3))
NAMES = st.sampled_from(["x", "", "id", "path", "files", "images"]) | st.text(max_size=5)
PIECES = st.binary(max_size=64) | st.sampled_from([b"\xef\xbb\xbf", b"\r\n", b'"', b"{", b"[" * 100_000, b"9" * 5000, b"\xed\xa0\x80"])
FORMS: dict[str, Callable[[bytes], bytes]] = {
    "BOM": lambda text: b"\xef\xbb\xbf" + text, "CRLF": lambda text: text.replace(b"\n", b"\r\n"), "empty": lambda text: b"",
    "UTF-16": lambda text: text.decode("latin1").encode("utf-16"), "null bytes": lambda text: text + bytes(9),
    "twice": lambda text: text + text, "blank lines": lambda text: text.replace(b"\n", b"\n \n\n"),
}  # fmt: skip


def nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (container, key) of a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from nodes(value[key])


def spliced(draw: Any, value: Any, inserted: Any) -> Any:
    """Bytes or a string with a piece of it removed, replaced or repeated, or another piece inserted."""
    at = draw(st.integers(0, len(value)))
    removed = draw(st.sampled_from((0, 1, 1, 2, 8, 64, len(value))))
    middle = value[at : at + removed] * 3 if draw(st.integers(0, 5)) == 0 else inserted
    return value[:at] + middle + value[at + removed :]


def changed(draw: Any, value: Any) -> Any:
    """A JSON value with one part of it replaced, removed, added, exchanged, wrapped or misspelled."""
    value = copy.deepcopy(value)
    container, key = draw(st.sampled_from(list(nodes(value)) or [([value], 0)]))
    match draw(st.sampled_from(["replace", "replace", "remove", "add", "exchange", "wrap", "misspell"])):
        case "remove":
            del container[key]
        case "add" if isinstance(container, dict):
            container[draw(NAMES)] = draw(VALUES)
        case "add":
            container.insert(key, draw(st.just(container[key]) | VALUES))
        case "exchange":
            other, place = draw(st.sampled_from(list(nodes(value)) or [(container, key)]))
            container[key] = copy.deepcopy(other[place])
        case "wrap":
            container[key] = draw(st.sampled_from([[container[key]], {"a": container[key]}, str(container[key])]))
        case "misspell" if isinstance(container[key], str):
            container[key] = spliced(draw, container[key], draw(st.text(max_size=8)))
        case _:
            container[key] = draw(VALUES)
    return value


def damage_rows(draw: Any, path: Path) -> None:
    text = path.read_text()
    rows = changed(draw, json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()])
    whole = path.suffix == ".json" or not isinstance(rows, list)
    path.write_text(json.dumps(rows) if whole else "".join(json.dumps(row) + "\n" for row in rows))


def replace_file(draw: Any, path: Path, outside: Path) -> None:
    path.unlink()
    match draw(st.sampled_from(["missing", "folder", "fifo", "loop", "dangling", "outside"])):
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "missing":
            pass
        case link:
            path.symlink_to({"loop": path, "dangling": path.with_name("nothing"), "outside": outside}[link])


def damage(draw: Any, folder: Path, path: Path, outside: Path) -> None:
    """Damage the rows or their bytes, a picture or another file of the folder, one to four times, or nothing."""
    for what in draw(st.lists(st.sampled_from(["row", "row", "row", "bytes", "form", "any", "any", "file"]), max_size=4)):
        if not (files := [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.is_symlink()]):
            return
        holding = [file for file in files if file == path or path in file.parents] or files
        file = draw(st.sampled_from(files if what in ("any", "file") else holding))
        try:
            if what == "row":
                damage_rows(draw, path if path in files else file)  # a pipe in its place would block, and a link leads outside
            elif what == "file":
                replace_file(draw, file, outside)
            elif what == "form":
                file.write_bytes(FORMS[draw(st.sampled_from(sorted(FORMS)))](file.read_bytes()))
            else:
                file.write_bytes(spliced(draw, file.read_bytes(), draw(PIECES)))
        except (ValueError, IndexError, OSError, RecursionError):
            continue  # earlier damage left no rows, or no file


# The good input -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Folders of good input with the path and format of their rows, the configuration, and one collator for all rounds."""
    folder = tmp_path_factory.mktemp("fuzz")
    write_manifest(folder / "own" / "a.jsonl", 4, seed=3)
    rows = read_rows(folder / "own" / "a.jsonl")
    one, other = (image["path"] for image in next(row for row in rows if len(row["images"]) > 1)["images"][:2])
    for suffix in ("jpg", "gif", "bmp", "tiff", "webp", "ppm"):
        Image.open(folder / "own" / one).save(folder / "own" / "images" / f"b.{suffix}")
    texts = [{"id": f"t{c}", "text": text, "prompt": "Which?"} for c, text in enumerate(("two dogs", "three dogs"))]
    cells = [["i0", "t0", 1], ["i0", "t1", 0]]
    for paths in (None, ["images/b.jpg", "images/b.gif"], "images/b.tiff", "images/b.webp", "images/b.bmp"):
        rows.append({"id": f"r{len(rows)}", "images": [{"id": "i0", "path": paths}], "texts": texts, "match": cells, "weight": 2})
    write_rows(folder / "own" / "a.jsonl", rows)
    pair = {"image_0": one, "image_1": other, "caption_0": "a dog", "caption_1": "a cat", "prompt": "Describe.", "edit": "object"}
    write_rows(folder / "own" / "a.pairs.jsonl", [{**pair, "id": str(n)} for n in range(3)])
    samples = [{"cf_text": "a cat", "cf_image_path": other}, {"cf_text": "a hen", "cf_image_path": "images/b.ppm"}]
    published = {"orig_input": f"Yes: <|vision_start|>{one}<|vision_end|>", "cf_samples": samples}
    write_rows(folder / "own" / "a.cfvlm.json", [{**published, "orig_output": text} for text in ("a dog", "an ox")])
    formats = {"cfgroup": "a.jsonl", "pairs": "a.pairs.jsonl", "cfvlm": "a.cfvlm.json"}
    sources = [
        (folder / "own", Path(formats[name]), name) for name in ("cfgroup", "cfgroup", "cfgroup", "pairs", "cfvlm") for _ in range(4)
    ]
    for name, (write, _) in PUBLIC.items():
        (place := folder / name).mkdir()
        path, format = write(place, 4)
        sources.append((place, path.relative_to(place), format))
    config = parse_config(
        ["--config", "tests/support/train.yaml", "--model.name_or_path", str(build_test_model(folder / "model"))], OBJECTIVES
    )
    collator = load_collator(config.model)
    (folder / "outside.png").write_bytes((folder / "own" / one).read_bytes())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "load_collator", lambda *_: collator)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield folder, sources, config, collator
    dist.destroy_process_group()


# What must hold -------------------------------------------------------------------------------------------------------------------------


def one_line(message: str) -> None:
    """A sentence that any terminal and any log takes."""
    assert message.isprintable() and message.strip(), f"not one printable line: {message!r}"[:3000]
    assert len(message) <= 4000, f"a sentence of {len(message)} characters: {message[:300]}"


def snapshot(folder: Path) -> dict[str, tuple[int, int, Any]]:
    """What is in a folder except the rows of converted containers; links are not followed."""
    found = {}
    for path in [each for each in folder.rglob("*") if ".prepared" not in str(each)]:
        stat = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = (stat.st_mode, 0 if path.is_dir() else stat.st_mtime_ns, content)
    return found


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


def read_groups(config: RunConfig, collator: Collator, path: Path, format: str, check: str) -> None:
    """Read as ``cfvlm-ds data check`` and a training do; what one accepts the other must, and a batch must come of it."""
    format = open_groups(path, format=format).format
    report = check_manifest(path, None, format, lengths=collator, progress=str)
    str(report).encode()
    for problem in report.problems:
        one_line(problem)
    data = replace(config.data, train=str(path), check=check, format=format)
    config = replace(config, data=data, train=replace(config.train, output_dir=str(path.parent.parent / "run")))
    groups = list(preflight.read_data(config, ONE).groups)
    assert report.ok or check == "rows", "the check of a training let pass what `data check` finds"
    assert groups == read_manifest(path, None, format) and len({group.id for group in groups}) == len(groups) == report.num_groups
    for group in groups:
        consistent(group, path.parent)
    data_identity(groups, [path.parent])
    try:
        tokens = list(group_tokens(groups, collator, config.data, ONE))
    except DataError:
        assert not report.ok, "headers can be read of images that open"
        raise
    kept, dropped = collator.readable(groups)
    assert not (report.ok and dropped), dropped
    for _, why in dropped:
        one_line(why)
    batch = collator.without_unreadable(groups).forwards[0]
    assert batch.layout.ids == tuple(group.id for group in kept)
    for g, group in enumerate(kept):
        known = [[-1 if truth is None else truth for truth in line] for line in group.match]
        assert batch.layout.match[g, : len(group.images), : len(group.candidates)].tolist() == known
    assert all(torch.isfinite(value).all() for value in batch.model_inputs.values() if torch.is_tensor(value))
    if report.ok:
        assert tokens == [collator([group]).num_tokens for group in groups]


def play(good: Any, draw: Any) -> None:
    """Damage one good input and read it: groups, or one named error, in time, and the input is as before."""
    folder, sources, config, collator = good
    source, relative, format = draw(st.sampled_from(sources))
    shutil.rmtree(folder / "round", ignore_errors=True)
    data = Path(shutil.copytree(source, folder / "round" / "data"))
    (data / "loop").symlink_to("loop")
    (data / "outside.png").symlink_to(folder / "outside.png")
    os.mkfifo(data / "fifo")
    damage(draw, data, data / relative, folder / "outside.png")
    format = draw(st.sampled_from([format] * 8 + ["auto", *FORMATS]))
    check = draw(st.sampled_from(["full", "full", "rows"]))
    before, begun = snapshot(data), time.process_time()
    try:
        read_groups(config, collator, data / relative, format, check)
        event("groups")
    except InputError as error:
        event("error")
        one_line(str(error))
    assert time.process_time() - begun < COMPUTING_S
    assert snapshot(data) == before, "changed or left behind"
    assert {*os.listdir(folder / "round")} <= {"data", "run"}


@settings(DRAWN, max_examples=60)
@given(chance=st.data())
def test_damaged_input_ends_in_groups_or_one_clear_error(good, chance):
    play(good, chance.draw)


@pytest.mark.long
@settings(DRAWN, max_examples=3_000)
@given(chance=st.data())
def test_three_thousand_damaged_inputs_end_in_groups_or_one_clear_error(good, chance):
    play(good, chance.draw)
