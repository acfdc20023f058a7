"""Files that somebody else made: what would take all time or memory is refused by a sentence that says which bound, within seconds."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PROMPT, write_json, write_rows
from PIL import Image
from test_data import folder, manifest, pair, png, row
from tiny_llava import CHAT_TEMPLATE

from cfvlm_ds import engine
from cfvlm_ds.batching.collator import load_collator
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.groups import MAX_CELLS, MAX_COMPARISONS, MAX_EDITS, MAX_SIDE, Candidate, CounterfactualGroup
from cfvlm_ds.core.parsing import parse_config
from cfvlm_ds.core.reading import DuplicateKey, parse_json
from cfvlm_ds.data import check_manifest, image_size, lines, open_image, read_manifest
from cfvlm_ds.data import stored_scores as scores
from cfvlm_ds.data.containers import json_file
from cfvlm_ds.data.decoding import MAX_BYTES
from cfvlm_ds.data.identity import data_identity
from cfvlm_ds.data.picture_index import Picture, PictureTable
from cfvlm_ds.evaluation.comparisons import comparisons
from cfvlm_ds.objectives import OBJECTIVES

__all__ = ["folder"]


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail, rather than hang, where the block takes longer."""

    def late(*_: object) -> None:
        raise AssertionError(f"not over after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def problem(path: Path, **options: Any) -> str:
    with within(20):
        (found,) = check_manifest(path, **options).problems
        with pytest.raises(DataError) as raised:
            read_manifest(path, **options)
    assert found == str(raised.value) and found.isprintable()
    return found


# ---- files


def test_a_manifest_is_a_regular_file(folder):
    (folder / "zero.json").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "pipe.json"):
        os.mkfifo(folder / name)
    for path, kind in ((folder / "pipe.jsonl", "pipe"), (folder / "pipe.json", "pipe"), (folder / "zero.json", "device"),
                       (Path("/dev/zero"), "device")):  # fmt: skip
        assert re.match(f"{path}: .*{kind}, not a regular file", problem(path))


def test_lines_of_a_manifest_are_bounded(folder, monkeypatch):
    """A file of nothing but zeros, 64 GiB long and empty on disk, is one line: the reading ends at its bound."""
    path = manifest(folder, row("first"))
    os.truncate(path, 2**36)
    found = problem(path)
    assert found.startswith(f"{path}:2: the line has more than {lines.MAX_LINE} bytes, the limit for one row")
    (folder / "list.json").write_bytes(b"[")
    os.truncate(folder / "list.json", 2**36)
    assert f"list.json: it has more than {json_file.MAX_JSON} bytes" in problem(folder / "list.json")
    monkeypatch.setattr(lines, "MAX_LINE", 300)
    for spaces, fits in ((300, True), (301, False)):
        path.write_text(json.dumps(pair()).ljust(spaces))
        assert bool(check_manifest(path, format="pairs").problems) is not fits
    write_json(path, [pair(id=k) for k in range(9)])
    assert path.rename(folder / "one_line.json").stat().st_size > 300, "a list may be longer than a line"
    assert len(read_manifest(folder / "one_line.json", format="pairs")) == 9


def test_a_group_has_a_bounded_number_of_images_and_texts(folder):
    """100,000 images and as many texts fit in a few MB of a manifest; their truth table would not fit in any memory."""
    many = [{"id": f"{k}", "path": "a.png"} for k in range(MAX_SIDE + 1)]
    texts = [{"id": f"{k}", "text": f"{k}"} for k in range(MAX_SIDE + 1)]
    for change in ({"images": many, "match": [["0", "t0", 1]]}, {"texts": texts, "match": [["i0", "0", 1]]}):
        assert f"over the limit of {MAX_SIDE} for either; split the row" in problem(manifest(folder, row(edits=[]) | change))
    same = [{"id": f"{k}", "path": "a.png"} for k in range(MAX_SIDE)]
    with within(20):
        read_manifest(manifest(folder, row(images=same, match=[["0", "t0", 1]], edits=[])))
    square = {"images": many[:300], "texts": texts[:300], "match": [["0", "0", 1]]}
    assert f"has 300 x 300 pairs of images and texts, over the limit of {MAX_CELLS}; split" in problem(
        manifest(folder, row(edits=[]) | square)
    )
    endless = [{"type": f"{k}"} for k in range(MAX_EDITS + 1)]
    assert f"has {MAX_EDITS + 1} edits, over the limit of {MAX_EDITS}" in problem(manifest(folder, row(edits=endless)))
    with pytest.raises(DataError, match="over the limit"):
        CounterfactualGroup("g", ((Path("x"),),) * (MAX_SIDE + 1), (Candidate("", "a"),), ((1,),) * (MAX_SIDE + 1))


def compared(num_images: int, num_texts: int, true: Callable[[int, int], bool], **more: Any) -> dict[str, Any]:
    """A row whose every cell is known."""
    images, texts = ([{"id": f"{k}", name: f"{k}.png"} for k in range(n)] for n, name in ((num_images, "path"), (num_texts, "text")))
    match = [[f"{i}", f"{c}", int(true(i, c))] for i in range(num_images) for c in range(num_texts)]
    return row(edits=[]) | {"images": images, "texts": texts, "match": match} | more


def test_a_group_has_a_bounded_number_of_comparisons(folder):
    """Of 65,536 cells, half of them true, there are 17 million, and an evaluation would make each of them. What people have is far below:
    one text an image, or many texts of which one is true."""
    half = compared(2, 1024, lambda i, c: (i + c) % 2 == 0)
    bad = folder / "bad.jsonl"
    write_rows(bad, (row(), half | {"id": "half"}))
    number = 2 * 512 * 512 + 1024
    with (
        within(20),
        pytest.raises(DataError, match=f"{bad}:2: group 'half' has {number} comparisons .*, over the limit of {MAX_COMPARISONS}"),
    ):
        read_manifest(bad)
    edits = [{"type": f"{k}", "image": "0", "from": "a", "to": "b"} for k in range(2048)]
    (group,) = read_manifest(manifest(folder, compared(1, 1024, lambda i, c: not c, edits=edits[:1023])))
    with within(20):
        assert sum(1 for _ in comparisons(group)) == 1023
    one_true = tuple(tuple(int(i == c) for c in range(256)) for i in range(256))
    half_true = tuple(tuple(int(c % 2 == 0) for c in range(512)) for _ in range(2))
    for match in (one_true, half_true):
        CounterfactualGroup("g", ((Path("x"),),) * len(match), tuple(Candidate("", f"{c}") for c in range(len(match[0]))), match)


def test_a_scores_file_is_a_regular_file_of_bounded_lines(folder):
    groups = read_manifest(manifest(folder, row()))
    path = folder / "scores.jsonl"
    stored = scores.StoredScores(((-1.0, -2.0), (-2.0, -1.0)), (-3.0, -3.0))
    scores.write_scores(path, groups, {"g": stored}, "m", data := data_identity(groups, [folder]))
    header, line = path.read_text().splitlines()
    cases = {
        f"{header}\n{line}\n{line}\n": "2 groups instead of 1",
        f'{header}\n{line[:-1]}, "id": "g"}}\n': "key 'id' occurs twice",
        f'{header[:-1]}, "model": "x"}}\n{line}\n': "key 'model' occurs twice",
    }
    for content, said in cases.items():
        path.write_text(content)
        with pytest.raises(DataError) as raised:
            scores.read_scores(path, groups, data)
        assert said in str(raised.value)
    path.write_text(f"{header}\n")
    os.truncate(path, 2**36)
    with within(20), pytest.raises(DataError, match=f"more than {scores.MAX_LINE} bytes"):
        scores.read_scores(path, groups, data)
    path.unlink()
    os.mkfifo(path)
    with within(20), pytest.raises(DataError, match="a named pipe, not a regular file"):
        scores.read_scores(path, groups, data)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {seed: 1}\ndata: {}\ntrain: {seed: 2}\n", "'train' occurs twice in one section (on line 3, after line 1)"),
        ("train:\n  seed: 1\n  max_steps: 2\n  seed: 1\n", "'seed' occurs twice in one section (on line 4, after line 2)"),
        ("data: {evaluation: {a: x, b: y, a: z}}", "'a' occurs twice"),
        ('{"train": {"seed": 1,\n"seed": 2}}', "'seed' occurs twice in one section (on line 2, after line 1)"),
        ("train.max_steps: 1\ntrain: {max_steps: 2}\n", "'max_steps' occurs twice"),
        ("model: &model {lora: *model}", "recursive"),
    ],
)
def test_a_key_given_twice_in_a_configuration_is_refused(text, said, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        parse_config(["--config", str(path)], OBJECTIVES)
    assert said in str(raised.value) and str(path) in str(raised.value)
    with pytest.raises(ConfigError, match="'a' occurs twice"):
        parse_config(["--data.evaluation", '{"a": "x", "a": "y"}'], OBJECTIVES)
    path.write_text("train.max_steps: 1\ntrain: {seed: 2}\nmodel: {lora: {rank: 4}, lora.alpha: 8}\n")
    found = parse_config([f"--config={path}"], OBJECTIVES)
    assert (found.train.max_steps, found.train.seed, found.model.lora.rank, found.model.lora.alpha) == (1, 2, 4, 8)
    # One key in several sections, or in the items of a list, is no repetition; nor is an option given twice, where the later one wins.
    path.write_text("train: {seed: 1}\ndata: {evaluation: {seed: x, train: y, train.hard: z}}\n")
    assert parse_config([f"--config={path}", "--train.seed", "3", "--train.seed", "4"], OBJECTIVES).train.seed == 4


def test_a_key_given_twice_in_json_is_refused(folder, tmp_path):
    twice = json.dumps(row())[:-1] + ', "prompt": "another"}'
    assert problem(manifest(folder, row("a"), twice)).startswith(f"{folder}/m.jsonl:2: key 'prompt' occurs twice")
    path = manifest(folder, json.dumps([row()], indent=1), name="list.json")
    path.write_text(path.read_text().replace('"edits": [', '"edits": [],\n  "edits": ['))
    assert "item 1: key 'edits' occurs twice" in problem(path)
    (ds := tmp_path / "ds.json").write_text('{"bf16": {"enabled": true},\n "zero_optimization": {"stage": 3,\n "stage": 2}}')
    with pytest.raises(ConfigError, match=r"ds\.json: .*key 'stage' occurs twice"):
        engine.read_json(str(ds))
    assert parse_json('[{"a": {"a": ["a", {"a": 1}]}, "b": "a:"}, {"a": "\\"a\\": {"}]') == [
        {"a": {"a": ["a", {"a": 1}]}, "b": "a:"},
        {"a": '"a": {'},
    ]
    with pytest.raises(DuplicateKey, match="key 'é' occurs twice"):
        parse_json('{"x": ["}", {"\\u00e9": 1, "é": 2}]}')


# ---- pictures


def test_the_sides_and_pixels_of_a_picture_are_bounded_by_its_header(tmp_path):
    """PIL decodes a PNG to find its orientation."""
    path = tmp_path / "line.png"
    for read in (open_image, image_size):
        for width, height in ((100_000, 1), (1, 100_000), (5_000_000, 1), (20_100, 100), (30_000, 30_000)):
            with pytest.raises(DataError, match=rf"^{path}: .*{width}x{height}"):
                read(png(path, width, height))
        for fits in ((200, 1), (3, 600)):
            Image.new("RGB", fits).save(path)
            found = read(path)
            assert (found if read is image_size else found.size) == fits
            with pytest.raises(DataError, match="over the limit of 3;"):
                read(path, 3)


def test_the_file_of_a_picture_is_regular_and_bounded(tmp_path, model_dir):
    """A small picture before a terabyte of zeros, and a pipe: neither is read for its digest."""
    png(tmp_path / "long.png", 9, 9)
    os.truncate(tmp_path / "long.png", 2**40)
    os.mkfifo(tmp_path / "pipe.png")
    collator = load_collator(ModelConfig(str(model_dir)))
    for name, said in (("long.png", f"has (more than {MAX_BYTES}|{2**40}) bytes"), ("pipe.png", "no such image|a named pipe, not")):
        path = tmp_path / name
        with within(20):
            for read in (open_image, lambda path: collator.files.content((path, False))):
                with pytest.raises(DataError, match=rf"{name}: .*({said})"):
                    read(path)
            assert len(PictureTable.of_files([path])) == 0
            known = PictureTable.of([(path, Picture(path.stat().st_size, 1, b"x" * 16, 9, 9))])
            known.verify(path)  # whoever opens it says what is wrong


def test_the_tiles_of_a_tiff_are_bounded(tmp_path):
    """A kilobyte that shows 16x16 pixels of one tile, which is decoded whole: gigabytes."""
    side, data = 40_000, 8 + 2 + 10 * 12 + 4
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: data, 325: 13}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    path = tmp_path / "tile.tif"
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + zlib.compress(bytes(256)))
    for read in (open_image, image_size):
        with pytest.raises(DataError, match=r"tile\.tif: .*40000x40000"):
            read(path)


# ---- chat templates and texts


def test_a_chat_template_that_raises_is_one_sentence_with_its_folder(model_dir, tmp_path):
    copy = shutil.copytree(model_dir, tmp_path / "model")
    for template, raised in (
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ raise_exception('no pictures, please') }}", r"TemplateError \(no pictures, please\)"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
    ):
        (copy / "chat_template.jinja").write_text(template + CHAT_TEMPLATE)
        with pytest.raises(ConfigError, match=f"^model '{copy}': .*{raised}"):
            load_collator(ModelConfig(str(copy)))


def test_the_characters_of_a_text_are_bounded_by_the_window(model_dir):
    collator = load_collator(ModelConfig(str(model_dir)))
    limit = 16 * collator.max_length
    long = "a" * 10_000_000
    with within(20):
        for prompt, text, said in (
            (PROMPT, long, "has 10000000 characters"),
            (long, "a", "has 10000000 characters in its prompt"),
        ):
            with pytest.raises(DataError, match=said) as raised:
                collator.row_length(prompt, text, ((48, 48),))
            assert str(limit) in str(raised.value)
        with pytest.raises(DataError, match="window"):
            collator.row_length(PROMPT, "a", ((48, 48),) * 100_000)
    at_limit = "a " * (limit // 2 - 1) + "aa"
    assert len(at_limit) == limit and collator.row_length(PROMPT, at_limit, ((48, 48),)) > collator.max_length  # told by its tokens
    with pytest.raises(DataError, match=f"has {limit + 1} characters"):
        collator.row_length(PROMPT, at_limit + "a", ((48, 48),))


@pytest.mark.parametrize(
    "row",
    [
        {"image": "a.png", "caption": "x", "note": "a" * 10**6},
        {"image": "a.png", "caption": "x", "note": "#1+" * 300_000},
        {"image": "a.png", "caption": "x", "note": "['a'" + ", 'a'" * 150_000},
        {"image": "a.png", "conversations": [{"from": "human", "value": "x" + "\n" * 10**6 + "y"}, {"from": "gpt", "value": "z"}]},
        {"orig_input": "<|vision_start|>a.png" * 40_000, "orig_output": "x", "cf_samples": [{"cf_text": "y", "cf_image_path": "a.png"}]},
    ],
    ids=["letters", "parts", "list", "lines", "pictures"],
)  # fmt: skip
def test_a_text_of_a_megabyte_is_read_in_a_pass(row, folder):
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with within(10), contextlib.suppress(DataError):
        check_manifest(folder / "rows.jsonl", progress=str)
