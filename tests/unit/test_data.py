"""Manifests, images and their check: every bad input is refused by one sentence that names file, row and remedy."""

from __future__ import annotations

import json
import os
import re
import struct
import warnings
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import PICTURE, SHAM, Candidate, CounterfactualGroup, Edit, Turn
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.data import CheckReport, check_manifest, image_size, open_image, read_manifest
from cfvlm_ds.data.cfgroup import from_row, to_row
from cfvlm_ds.data.identity import changes, data_identity


def save(path: Path, color: object = (10, 20, 30), mode: str = "RGB", size: tuple[int, int] = (8, 6), **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)  # type: ignore[arg-type]
    return path


def row(name: str = "g", **changes: object) -> dict[str, object]:
    return {
        "id": name,
        "prompt": "Describe.",
        "images": [{"id": "i0", "path": "a.png"}, {"id": "i1", "path": "b.png"}],
        "texts": [{"id": "t0", "text": "two dogs"}, {"id": "t1", "text": "three dogs"}],
        "match": [["i0", "t0", 1], ["i0", "t1", 0], ["i1", "t1", 1]],
        "edits": [{"type": "count", "image": "i1", "text": "t1", "from": "two", "to": "three"}],
        **changes,
    }


def pair(**changes: object) -> dict[str, object]:
    return {"image_0": "a.png", "image_1": "b.png", "caption_0": "a dog bites a man", "caption_1": "a man bites a dog", **changes}


def manifest(folder: Path, *lines: object, name: str = "m.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "a.png", (200, 0, 0))
    save(tmp_path / "b.png", (0, 200, 0))
    return tmp_path


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        read_manifest(path, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


EXPECTED = CounterfactualGroup(
    id="g",
    images=((Path("a.png"),), (Path("b.png"),)),
    candidates=(Candidate("Describe.", "two dogs"), Candidate("Describe.", "three dogs")),
    match=((1, 0), (None, 1)),
    edits=(Edit("count", 1, 1, "two", "three"),),
)


def under(folder: Path, group: CounterfactualGroup) -> dict[str, object]:
    return vars(group) | {"images": tuple(tuple(folder / picture for picture in image) for image in group.images)}


# ---- reading


@pytest.mark.parametrize("name", ["m.jsonl", "m.json"])
def test_native_rows(folder, name):
    path = manifest(folder, [row()], name=name) if name == "m.json" else manifest(folder, "\ufeff" + json.dumps(row()), "", row("h"))
    groups = read_manifest(str(path))
    assert vars(groups[0]) == under(folder, EXPECTED)
    assert [group.id for group in groups] == (["g"] if name == "m.json" else ["g", "h"])


def test_what_must_not_be_taken_for_false_is_read_and_written(folder):
    """Keys of texts, and keys or texts that are true of a picture; a change of either is a change of the labels."""
    texts = [{"id": "t0", "text": "two dogs", "key": "dogs:2"}, {"id": "t1", "text": "three dogs"}]
    paths = [manifest(folder, row(texts=texts, exclude=["animals", "dogs:2"]), name="a.jsonl"), manifest(folder, row(), name="b.jsonl")]
    (group,), (plain,) = map(read_manifest, paths)
    assert (group.keys, group.exclude) == (("dogs:2", ""), ("animals", "dogs:2")) and not plain.keys and not plain.exclude
    assert from_row(json.loads(json.dumps(to_row(group, folder))), folder) == group
    assert vars(group.with_images(group.images)) == vars(group)
    one, other = (data_identity([each], [folder]) for each in (group, plain))
    assert changes(one, other) == "labels (match)" and changes(one, other, of_scores=True) is None
    with pytest.raises(DataError, match="1 keys for 2 texts"):
        replace(group, keys=("dogs:2",))


def test_pairs(folder):
    path = manifest(folder, pair(id=7, prompt="Which?", edit="relation"), pair(), pair(caption_1="a man bites a cat"))
    first, second, third = read_manifest(path, format="pairs")
    assert vars(first) == under(
        folder,
        CounterfactualGroup(
            id="7",
            images=((Path("a.png"),), (Path("b.png"),)),
            candidates=(Candidate("Which?", "a dog bites a man"), Candidate("Which?", "a man bites a dog")),
            match=((1, 0), (0, 1)),
            edits=(Edit("relation", 1, 1),),
            source="pairs",
        ),
    )
    assert second.edits == () and second.candidates[0].prompt == "Describe the image."
    assert second.id != third.id
    # The name comes from the content: it does not change when rows move, and the same row twice is a duplicate.
    assert read_manifest(manifest(folder, pair()), format="pairs")[0].id == second.id
    message = refusal(manifest(folder, pair(), pair()), format="pairs")
    assert "m.jsonl:2:" in message and "repeats" in message and "m.jsonl:1;" in message


BAD_ROWS = {
    "not UTF-8": ("LATIN1", "byte 9"),
    "nested": ("[" * 100_000, "JSON"),
    "null byte": (row(images=[{"id": "i0", "path": "a\0.png"}, {"id": "i1", "path": "b.png"}]), "null"),
    "a key that is none": (row(texts=[{"id": "t0", "text": "two dogs", "key": None}, {"id": "t1", "text": "three"}]), "'key'"),
    "half a character": (row(prompt="\ud800"), "ud800"),
    "line break in an id": (row(images=[{"id": "i\n0", "path": "a.png"}], match=[["i0", "t0", 1]]), "i\\\\n0"),
    "terminal's commands": (row(edits=[{"type": "x", "image": "\x1b[2J"}]), "\\\\x1b"),
    "endless value": (row(match="x" * 10_000), "\\[\\.\\.\\.\\]"),
    "huge weight": (row(weight=10**400), "format"),
    "empty text": (row(texts=[{"id": "t0", "text": "x"}, {"id": "t1", "text": " "}]), "text 1"),
    "equal texts": (
        row(texts=[{"id": "t0", "text": "two caf\u00e9s"}, {"id": "t1", "text": " two  cafe\u0301s"}]),
        "text 1 equals text 0",
    ),
    "link": (
        row(images=[{"id": "i0", "path": "link.png"}, {"id": "i1", "path": "b.png"}]),
        "'link.png'.*secret.png",
    ),
    "empty path": (row(images=[{"id": "i0", "path": ""}, {"id": "i1", "path": "b.png"}]), "path is empty"),
    "same file": (
        row(images=[{"id": "i0", "path": "a.png"}, {"id": "i1", "path": "./a.png"}], match=[["i0", "t0", 1], ["i1", "t0", 0]]),
        "image 1 is the same file as image 0",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_names_file_line_and_remedy(folder, case):
    root = folder / "root"
    save(root / "a.png")
    save(root / "b.png", (0, 200, 0))
    secret = save(folder / "outside" / "secret.png")
    (root / "link.png").symlink_to(secret)
    bad, said = BAD_ROWS[case]
    path = manifest(root, row("first"), "", bad)
    if case == "not UTF-8":
        path.write_bytes(path.read_bytes().replace(b"LATIN1", '{"id": "é"}'.encode("latin-1")))
    message = refusal(path)
    assert message.startswith(f"{path}:3: ") and re.search(said, message), message
    # The check sees the same problem, and only it.
    assert check_manifest(path, progress=pytest.fail).problems == [message]


def test_several_roots_absolute_paths_and_links_into_them(folder):
    """What a cluster has: pictures of several collections, named absolutely or through a linked folder."""
    first, second, other = folder / "first", folder / "second", folder / "other"
    a, b = save(first / "x" / "a.png"), save(second / "b.png", (0, 200, 0))
    save(second / "x" / "a.png", (0, 0, 200))
    save(other / "c.png", (9, 9, 9))
    (first / "linked").symlink_to(second)
    (first / "away").symlink_to(other)

    def named(path):
        return row(path, images=[{"id": "i0", "path": path}, {"id": "i1", "path": str(b)}])

    accepted = {
        "x/a.png": a,  # of two roots that have it, the first
        str(a): a,
        "linked/x/a.png": first / "linked" / "x" / "a.png",
        f"{first}/linked/x/a.png": first / "linked" / "x" / "a.png",
        "x/../x/a.png": a,
        "linked/../second/x/a.png": second / "x" / "a.png",  # as the system follows it: beside where the link leads
        "none.png": first / "none.png",  # the check says that it is missing
    }
    path = manifest(folder, *map(named, accepted))
    for roots in ([first, second], [str(first), str(second)]):
        groups = read_manifest(path, roots)
        assert [group.images for group in groups] == [((full,), (b,)) for full in accepted.values()]
    (only_problem,) = check_manifest(path, [first, second], progress=pytest.fail).problems
    assert f"{path}:7: {first}/none.png: no such image file" in only_problem
    for bad in ("away/c.png", f"{other}/c.png", "../other/c.png", str(other / ".." / "other" / "c.png"), "x/../..", "/etc/passwd"):
        message = refusal(manifest(folder, named(bad), name="bad.jsonl"), root=[first, second])
        assert f"outside the data roots {first}, {second} (to " in message and "data.root" in message and "--root" in message
    assert "outside the data root" in refusal(path, root=first)  # b.png is in the second one
    assert read_manifest(manifest(first, row(images=[{"id": "i0", "path": str(a)}, {"id": "i1", "path": "x/b.png"}])))
    assert "empty list" in refusal(path, root=[]) and "nowhere is not a folder" in refusal(path, root=[first, folder / "nowhere"])


def test_texts_that_differ_in_case_are_two(folder):
    """What differs in white space only, or in how Unicode composes it, is one caption; case is a counterfactual as good as any."""
    texts = [{"id": "t0", "text": "a sign that says stop"}, {"id": "t1", "text": "a sign that says STOP"}]
    (group,) = read_manifest(manifest(folder, row(texts=texts)))
    assert [candidate.text for candidate in group.candidates] == ["a sign that says stop", "a sign that says STOP"]


def test_a_root_may_be_a_link_and_a_loop_is_named(folder):
    manifest(folder, row())
    # A root that is itself a link is the user's choice.
    root = folder.parent / (folder.name + "-link")
    root.symlink_to(folder)
    assert read_manifest(root / "m.jsonl")[0].images[0] == (root / "a.png",)
    (folder / "loop").symlink_to(folder / "loop")
    path = manifest(folder, row(images=[{"id": "i0", "path": "loop/x.png"}, {"id": "i1", "path": "b.png"}]))
    (problem,) = check_manifest(path).problems  # refused while reading or, from Python 3.13, while opening
    assert problem.startswith(f"{path}:1: ")


def cfvlm_row(**changes: object) -> dict[str, object]:
    """A row as CF-VLM's released code writes it."""
    samples = [{"cf_text": "three dogs", "cf_image_path": "b.png"}, {"cf_text": "two cats", "cf_image_path": "c.png"}]
    asked = "COCO Yes: <|vision_start|>a.png<|vision_end|>"
    return {"orig_input": asked, "orig_output": "two dogs", "cf_samples": samples} | changes


def test_cfvlm_rows(folder):
    """One object per line in a file named .json, as published; what two samples are to each other is unknown."""
    path = manifest(folder, cfvlm_row(), cfvlm_row(orig_output="2 dogs"), name="data.json")
    first, second = read_manifest(path, format="cfvlm")
    assert first.images == ((folder / "a.png",), (folder / "b.png",), (folder / "c.png",))
    assert [c.text for c in first.candidates] == ["two dogs", "three dogs", "two cats"]
    assert {c.prompt for c in first.candidates} == {"COCO Yes:"}
    assert first.match == ((1, 0, 0), (0, 1, None), (0, None, 1))
    assert [(edit.image, edit.text) for edit in first.edits] == [(1, 1), (2, 2)] and first.id != second.id


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"image_0": "a.png", "caption_0": "a"}, "'caption_1' is missing"),
        (pair(image_1=None), "'image_1' is missing"),
        (cfvlm_row(orig_input="COCO Yes: a.png"), "one image"),
        (cfvlm_row(cf_samples=None), "'cf_samples'"),
        (cfvlm_row(cf_samples=[{"cf_txt": "x"}]), "'cf_txt'.*'cf_text'"),
    ],
)
def test_a_bad_row_of_a_published_format_names_file_line_and_field(folder, bad, said):
    format, good = ("cfvlm", cfvlm_row()) if "orig_input" in bad else ("pairs", pair())
    message = refusal(manifest(folder, good, bad, name="data.json"), format=format)
    assert message.startswith(f"{folder}/data.json:2: ") and re.search(said, message), message


def test_bad_files(folder):
    manifest(folder, row(), name="train.jsonl")
    cases = [
        (folder / "trian.jsonl", {}, r"train\.jsonl'"),
        (folder / "none" / "m.jsonl", {}, "its folder"),
        (folder, {}, "name the data file"),
        (manifest(folder, "", " ", name="empty.jsonl"), {}, "no rows"),
        (manifest(folder, "[]", name="empty.json"), {}, "no rows"),
        (manifest(folder, "{", json.dumps(row())[1:], name="object.json"), {}, "dict.*[.]jsonl"),
        (manifest(folder, "[1,", "2", name="broken.json"), {}, "line 3, column 1"),
        (manifest(folder, [row(), row(weight=-1)], name="list.json"), {}, ": item 2: .*weight"),
        (folder / "train.jsonl", {"root": folder / "nowhere"}, "nowhere"),
        (folder / "train.jsonl", {"format": "cfgruop"}, "'cfgruop'.*'cfgroup'"),
    ]
    for path, options, said in cases:
        message = refusal(path, **options)
        assert re.search(said, message) and check_manifest(path, **options).problems == [message], message  # type: ignore[arg-type]


# ---- images


def png(path: Path, width: int, height: int) -> Path:
    """A PNG by hand: its header may claim any size; the pixel data are those of one pixel."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(4))) + chunk(b"IEND", b""))
    return path


def image_refusal(path: Path, **options: int) -> str:
    with warnings.catch_warnings(), pytest.raises(DataError) as caught:
        warnings.simplefilter("error")
        open_image(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


@pytest.mark.parametrize("size", [(30_000, 30_000), (10_000, 10_000), (2**31 - 1, 2**31 - 1)])
def test_bomb_is_refused_by_its_header(tmp_path, monkeypatch, size):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    limit = Image.MAX_IMAGE_PIXELS
    message = image_refusal(png(tmp_path / "bomb.png", *size))
    assert f"{size[0]}x{size[1]}" in message and "limit of 50000000" in message and "shrink it" in message
    assert limit == Image.MAX_IMAGE_PIXELS


def test_limit_above_that_of_pil(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(save(tmp_path / "a.png", size=(8, 6))).size == (8, 6)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_a_prompt_may_be_a_conversation(folder):
    """As written in a row, and as written again; several questions of one group have conversations of their own."""
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    ]
    later = [*asked, {"role": "assistant", "content": "dogs"}, {"role": "user", "content": "How many?"}]
    texts = [{"id": "t0", "text": "two dogs"}, {"id": "t1", "text": "three dogs", "prompt": later}]
    path = manifest(folder, row(prompt=asked), row("h", prompt=later), row("j", prompt=asked, texts=texts), row("k", prompt="What?"))
    groups = read_manifest(path)
    system, user = Turn("system", ("Be brief.",)), Turn("user", (PICTURE, "What?"))
    long = (system, user, Turn("assistant", ("dogs",)), Turn("user", ("How many?",)))
    prompts = [[candidate.prompt for candidate in group.candidates] for group in groups]
    assert prompts == [[(system, user)] * 2, [long] * 2, [(system, user), long], ["What?"] * 2]
    assert [group.prompt_ids for group in groups] == [(0, 0), (0, 0), (0, 1), (0, 0)]
    for group in groups:
        written = json.loads(json.dumps(to_row(group, folder)))
        assert from_row(written, folder) == group
    assert to_row(groups[1], folder)["prompt"] == later
    assert len({data_identity([group], [folder])["texts"] for group in groups}) == 4
    for bad, said in (
        ([{"role": "user"}], "'content'"),
        ([{"role": "user", "contnet": "x"}], "'contnet'"),
        ([{"role": "user", "content": [{"type": "image", "path": "a.png"}]}], "'images'"),
        ([{"role": "user", "content": 3}], "part"),
        (7, "'prompt'"),
    ):
        assert said in refusal(manifest(folder, row(prompt=bad))), said


def test_what_a_native_row_has_beside_is_kept_and_counted(folder):
    parts = row("a", split="val", license="CC0", meta={"split": "mine", "tag": 1}, edits=[{"type": "count", "image": "i1", "meta": 7}])
    parts["images"][1] |= {"sha256": "ab", "role": "edited"}
    parts["texts"][0]["meta"] = {"by": "hand"}
    path = manifest(folder, parts, row("b"), row("c", split="train"), row("d", meta="a note", license="MIT"))
    groups = read_manifest(path)
    kept = {
        "split": "mine", "tag": 1, "row.split": "val", "license": "CC0", "images.role": [None, "edited"], "images.sha256": [None, "ab"],
        "texts.meta": [{"by": "hand"}, None], "edits.meta": [7],
    }  # fmt: skip
    assert [json.loads(group.meta or "null") for group in groups] == [kept, None, {"split": "train"}, {"meta": "a note", "license": "MIT"}]
    for group in groups:
        assert from_row(to_row(group, folder), folder) == group, "and is there after it is written again"
    report = check_manifest(path)
    assert report.ok and report.metadata["'images.sha256'"] == 1 and report.metadata["'license'"] == 2 and report.metadata["'split'"] == 2
    assert "'images.sha256': 1" in str(report) and "(kept, not used)" in str(report)


def test_bad_images(tmp_path):
    whole = save(tmp_path / "whole.jpg", size=(64, 64))
    Image.effect_noise((64, 64), 90).save(whole)
    truncated = tmp_path / "truncated.jpg"
    truncated.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    script = tmp_path / "script.png"  # PIL would hand this one to Ghostscript
    script.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("script.png", "text.png", "empty.png"):
        assert "it contains no image" in (message := image_refusal(tmp_path / name)) and "replace or convert" in message
    for width, height in ((0, 0), (0, 5), (5, 0)):
        assert "0 pixels wide or high" in image_refusal(png(tmp_path / "zero.png", width, height))
    for path in (truncated, png(tmp_path / "short.png", 100, 100)):
        assert "truncated or corrupt" in (message := image_refusal(path)) and "copy or download it again" in message
    for name in ("missing.png", "pipe.png", "."):
        assert "no such image file" in (message := image_refusal(tmp_path / name)) and "restore it" in message
    with pytest.raises(DataError, match="no such image file"):
        image_size(tmp_path / "pipe.png")  # a header is not waited for either
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "float.tif")
    assert "save it as 8 or 16 bit" in image_refusal(tmp_path / "float.tif")
    for value in (-1, 65_536):
        Image.fromarray(np.full((2, 2), value, np.int32)).save(tmp_path / "integer.tif")
        assert "save it as 8 or 16 bit" in image_refusal(tmp_path / "integer.tif")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_modes_become_rgb(tmp_path):
    cases = [
        (save(tmp_path / "grey.png", 77, "L"), (77, 77, 77)),
        (save(tmp_path / "bit.png", 1, "1"), (255, 255, 255)),
        (save(tmp_path / "clear.png", (0, 0, 0, 0), "RGBA"), (255, 255, 255)),
        (save(tmp_path / "grey_clear.png", (0, 0), "LA"), (255, 255, 255)),
        (save(tmp_path / "half.png", (0, 0, 0, 51), "RGBA"), (204, 204, 204)),  # 255 * (1 - 51/255)
        (save(tmp_path / "key.png", (1, 2, 3), transparency=(1, 2, 3)), (255, 255, 255)),
        (save(tmp_path / "cmyk.tif", (0, 255, 255, 0), "CMYK"), (255, 0, 0)),
    ]
    Image.fromarray(np.full((4, 4), 65_535, np.int32)).save(tmp_path / "white.tif")
    cases += [(tmp_path / "white.tif", (255, 255, 255))]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 40, 50, 60])
    palette.save(tmp_path / "palette.png")
    palette.save(tmp_path / "palette_clear.png", transparency=bytes([255, 0]))
    cases += [
        (tmp_path / "palette.png", (40, 50, 60)),
        (tmp_path / "palette_clear.png", (255, 255, 255)),
    ]
    for path, color in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            image = open_image(path)
        assert (image.mode, image.getpixel((0, 0))) == ("RGB", color), path


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 128, 129, 255, 256], [257, 20_000, 32_768, 65_000, 65_535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    expected = np.floor(values / 257 + 0.5).astype(np.uint8)
    assert np.array_equal(np.asarray(open_image(tmp_path / f"deep.{suffix}")), np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(10))
def test_the_size_is_that_of_the_opened_picture(tmp_path, kind, orientation):
    """Whatever the orientation, those included that no camera writes; a TIFF is turned by PIL itself, and only once."""
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :16] = 255  # one corner tells all turns and reflections apart
    path = tmp_path / f"turned.{kind}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(path, exif=exif, **({"quality": 95} if kind in ("jpg", "webp") else {}))  # type: ignore[arg-type]
    opened = open_image(path)
    turns = {2: (0, True), 3: (2, False), 4: (2, True), 5: (1, True), 6: (3, False), 7: (3, True), 8: (1, False)}
    quarters, mirrored = turns.get(orientation, (0, False))
    upright = np.rot90(stored[:, ::-1] if mirrored else stored, quarters)
    assert image_size(path) == opened.size == upright.shape[1::-1]
    assert np.abs(np.asarray(opened).astype(int) - upright).mean() < 10


# ---- the check


def test_report_counts(folder):
    save(folder / "c.png", (0, 0, 200))
    save(folder / "sham.png", (200, 0, 0))  # the same bytes as a.png, and rightly so
    sham = row(
        "s",
        images=[{"id": "i0", "path": "a.png"}, {"id": "i1", "path": "sham.png"}, {"id": "i2", "path": "c.png"}],
        match=[["i0", "t0", 1], ["i1", "t0", 1], ["i2", "t0", 0]],
        edits=[{"type": SHAM, "image": "i1"}, {"type": "count", "image": "i2", "text": "t1"}],
    )
    single = row("one", images=[{"id": "i0", "path": "a.png"}], texts=[{"id": "t0", "text": "a"}], match=[["i0", "t0", 1]], edits=[])
    two = row("two", images=single["images"], match=[["i0", "t0", 1], ["i0", "t1", 1]], edits=[])  # captions, of which none is false
    path = manifest(folder, row(), sham, single, two)
    report = check_manifest(path, progress=pytest.fail)
    assert report == CheckReport(
        manifest=str(path),
        num_groups=4,
        num_images=4,
        num_texts=7,
        num_cells=4 + 6 + 1 + 2,
        num_unknown_cells=1 + 3,
        num_false_cells=1 + 1,
        prompts={"others": 4},  # type: ignore[arg-type]
        shapes={"2 x 2": 1, "3 x 2": 1, "1 x 1": 1, "1 x 2": 1},  # type: ignore[arg-type]
        sources={"(none)": 4},  # type: ignore[arg-type]
        text_lengths={8: 3, 10: 3, 1: 1},  # type: ignore[arg-type]
        sides=report.sides,
        num_repeated_pictures=1,
        edit_types={"count": 2, SHAM: 1},  # type: ignore[arg-type]
        num_counterfactuals={1: 2, 0: 2},  # type: ignore[arg-type]
        longest_text=len("three dogs"),
        longest_text_where=f"{path}:1, text 1",
    )
    assert report.ok and "count: 2, sham: 1" in str(report) and "4 distinct files, min 8, median 8, max 8 pixels" in str(report)


@pytest.mark.parametrize(("lengths", "shown"), [({7: 1, 3: 1}, (3, 3, 7)), ({9: 2, 4: 2, 6: 1}, (4, 6, 9)), ({5: 10**13, 2: 1}, (2, 5, 5))])
def test_the_spread_of_lengths_takes_no_memory_for_each_text(lengths, shown):
    report = CheckReport("m", num_groups=1, text_lengths=Counter(lengths), longest_text_where="m:1")
    assert "min {}, median {}, max {} characters".format(*shown) in str(report)


def test_all_problems_are_collected(folder):
    def images(first, second):
        return [{"id": "i0", "path": first}, {"id": "i1", "path": second}]

    png(folder / "bomb.png", 30_000, 30_000)
    png(folder / "zero.png", 0, 0)
    save(folder / "copy.png", (200, 0, 0))
    truth = [["i0", "t0", 1], ["i1", "t0", 0]]
    path = manifest(
        folder,
        row("a"),
        "{",
        row("bomb", images=images("a.png", "bomb.png")),
        row("zero", images=images("a.png", "zero.png")),
        row("missing", images=images("a.png", "gone.png")),
        row("missing again", images=images("a.png", "gone.png")),
        row("copy", images=images("a.png", "copy.png"), match=truth),
        row("copy, not known to differ", images=images("a.png", "copy.png"), match=[["i0", "t0", 1], ["i1", "t1", 1]]),
        row("a"),
        row("long", prompt="one two", texts=[{"id": "t0", "text": "x"}, {"id": "t1", "text": "a b c d e f"}]),
    )
    report = check_manifest(path, lengths=Words())
    expected = {
        2: "column 2", 3: "bomb.png: .*30000x30000", 4: "zero.png: .*0 pixels", 5: "gone.png", 7: "image 1 is byte-identical to image 0", 9:
        f"{path}:1;", 10: "text 1 is 11 tokens .* 10",
    }  # fmt: skip
    assert not report.ok and len(report.problems) == len(expected), "a missing file is named once, by the first row that shows it"
    for line, said in expected.items():
        (problem,) = [problem for problem in report.problems if problem.startswith(f"{path}:{line}: ")]
        assert re.search(said, problem) and problem in str(report), problem
    assert (report.num_groups, report.longest_text, report.longest_text_unit) == (9, 11, "tokens of prompt, pictures and text"), (
        "one of an id that is taken is a group"
    )
    assert report.longest_text_where == f"{path}:10, text 1"


def test_progress_has_rate_and_remaining_time(monkeypatch):
    clock = iter(range(0, 1000, 4))  # each step of work takes 4 seconds; the first line comes after 2, others 5 after the last
    monkeypatch.setattr("cfvlm_ds.core.progress.time.monotonic", lambda: next(clock))
    lines = []
    assert list(Progress(lines.append, "check of images", 5, "images").over("abcde")) == list("abcde")
    assert lines == [
        "check of images: 1 of 5 images, 0.25 images/s, 0:00:16 left",
        "check of images: 3 of 5 images, 0.25 images/s, 0:00:08 left",
        "check of images: 5 of 5 images, 0.25 images/s, 0:00:00 left",
    ]
    lines.clear()
    written = Progress(lines.append, "export", 3000, "GB")
    written.advance(750.25)  # 4 s after the start: 187.6 a second
    written.advance(1.0)
    assert lines == ["export: 750.2 of 3000 GB, 188 GB/s, 0:00:12 left"]


class Words:
    """A model whose tokens are words, with one visual token for every 8 pixels of width, and two more."""

    max_length = 10

    def row_length(self, prompt: str, text: str, sizes: tuple[tuple[int, int], ...]) -> int:
        return self.visual_tokens(sizes) + len(f"{prompt} {text}".split())

    def visual_tokens(self, sizes: tuple[tuple[int, int], ...]) -> int:
        return sum(2 + size[0] // 8 for size in sizes)


def test_rows_are_measured_with_their_largest_image_and_visual_tokens_counted(folder):
    for name, width in (("narrow.png", 16), ("wide.png", 64), ("middle.png", 24)):
        Image.new("RGB", (width, 16)).save(folder / name)

    def measured(name, prompt, text, *files):
        images = [{"id": f"i{k}", "path": file} for k, file in enumerate(files)] or [{"id": "i0", "path": None}]
        return row(name, prompt=prompt, images=images, texts=[{"id": "t0", "text": text}], match=[["i0", "t0", 1]], edits=[])

    report = check_manifest(
        manifest(
            folder,
            measured("fits", "", "a b c d", "narrow.png", "middle.png"),
            measured("long", "", "a b c", "narrow.png", "wide.png"),
            measured("no image", "one", "a b c d e f g h i"),
            measured("together", "", "a", ["narrow.png", "middle.png"], ["middle.png", "narrow.png"]),
        ),
        lengths=Words(),
    )
    (problem,) = report.problems
    assert ":2: " in problem and "text 0 is 13 tokens" in problem
    assert report.num_images == 3 and sorted(report.visual_tokens.elements()) == [4, 5, 9, 9, 10]
    assert "min 4, median 9, max 10" in str(report)


class Careful(Words):
    """A model that has no tokens for some texts, and no use for wide pictures."""

    max_length = 100

    def row_length(self, prompt: str, text: str, sizes: tuple[tuple[int, int], ...]) -> int:
        if "<" in text:
            raise DataError(f"text ({text!r}) contains a control token; reword it")
        return super().row_length(prompt, text, sizes)

    def visual_tokens(self, sizes: tuple[tuple[int, int], ...]) -> int:
        if sizes[0][0] > 60:
            raise DataError("the processor refuses it; crop it")
        return super().visual_tokens(sizes)


def test_whatever_a_model_cannot_take_is_reported_by_file_row_and_group(folder):
    """Not only the first of it, and each once, though a text is measured after images of several sizes."""
    for name, width in (("narrow.png", 16), ("wide.png", 64)):
        Image.new("RGB", (width, 16)).save(folder / name)
    bad = [{"id": "t0", "text": "x"}, {"id": "t1", "text": "a <b>"}]
    swapped = [{"id": "t0", "text": "a <b>"}, {"id": "t1", "text": "x"}]
    narrow = [{"id": "i0", "path": "narrow.png"}, {"id": "i1", "path": "a.png"}]
    wide = [{"id": "i0", "path": "a.png"}, {"id": "i1", "path": "wide.png"}]
    path = manifest(
        folder, row("one", texts=bad, images=narrow), row("sound"), row("wide", images=wide), row("two", texts=swapped, images=wide)
    )
    report = check_manifest(path, lengths=Careful(), progress=pytest.fail)
    assert report.problems == [
        f"{path}:1: group 'one': text 1: text ('a <b>') contains a control token; reword it",
        f"{path}:3: group 'wide': {folder}/wide.png: the processor refuses it; crop it",
        f"{path}:4: group 'two': {folder}/wide.png: the processor refuses it; crop it",
        f"{path}:4: group 'two': text 0: text ('a <b>') contains a control token; reword it",
    ]
    assert sorted(report.visual_tokens.elements()) == [3, 3, 4], "a.png, b.png and narrow.png"
