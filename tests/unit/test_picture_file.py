"""A picture in a real tar is what the same file outside of it is: opened, measured, digested, checked and confined alike."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import write_rows
from PIL import Image

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.reading import TooLarge, read_bytes
from cfvlm_ds.data import check_manifest, image_size, open_image, read_manifest
from cfvlm_ds.data.identity import changes, data_identity
from cfvlm_ds.data.picture_file import open_picture, part_name, picture_bytes, picture_file, picture_stat
from cfvlm_ds.data.picture_index import PictureTable, content_digest


def archived(tar: Path, *files: Path) -> list[Path]:
    """The names of files in a tar that Python's own module writes."""
    with tarfile.open(tar, "w") as archive:
        for file in files:
            archive.add(file, file.name)
    with tarfile.open(tar) as archive:
        return [tar.with_name(part_name(tar.name, member.offset_data, member.size)) for member in archive]


def pictures(folder: Path) -> list[Path]:
    """One of each decoder, and a compressed TIFF, which libtiff would read by a file's number if it had one."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 44, 3), np.uint8))
    kinds = {"png": {}, "jpg": {"exif": exif}, "webp": {}, "bmp": {}, "gif": {}, "tif": {"compression": "tiff_lzw"}, "ppm": {}}
    for kind, options in kinds.items():
        picture.save(folder / f"a.{kind}", **options)
    return sorted(folder.iterdir())


def test_a_part_is_the_file(tmp_path):
    (tmp_path / "files").mkdir()
    files = pictures(tmp_path / "files")
    for file, part in zip(files, parts := archived(tmp_path / "a.tar", *files), strict=True):
        assert np.array_equal(np.asarray(open_image(part)), np.asarray(open_image(file))), file
        assert image_size(part) == image_size(file) and content_digest(part) == content_digest(file)
        assert picture_bytes(part, 1 << 20) == file.read_bytes() and picture_stat(part)[0] == file.stat().st_size
        assert picture_stat(part)[1] == (tmp_path / "a.tar").stat().st_ctime_ns and picture_file(part) == tmp_path / "a.tar"
        assert picture_file(file) == file and picture_stat(file) == (file.stat().st_size, file.stat().st_ctime_ns)
    with open_picture(parts[0]) as handle:
        size = picture_stat(parts[0])[0]
        assert handle.seek(-3, os.SEEK_END) == size - 3 and handle.read() == files[0].read_bytes()[-3:] and not handle.read()
        assert handle.seek(size + 9) and not handle.read(), "behind it nothing is read, though the container goes on"
        with pytest.raises(OSError, match="fileno"):
            handle.fileno()


@pytest.fixture
def rows(tmp_path):
    """Two manifests with the same pictures: files, and parts of a tar in a folder below."""
    files = []
    for k in range(3):
        Image.new("RGB", (8 + k, 6), (k, 9, 9)).save(file := tmp_path / f"{k}.png")
        files.append(file)
    (tmp_path / "shards").mkdir()
    parts = archived(tmp_path / "shards" / "images-00000.tar", *files)
    written = []
    for name, named in (("files", files), ("parts", parts)):
        lines = [
            {
                "image_0": str(named[k].relative_to(tmp_path)), "image_1": str(named[(k + 1) % 3].relative_to(tmp_path)),
                "caption_0": f"text {k}", "caption_1": "another", "id": str(k),
            }
            for k in range(3)
        ]  # fmt: skip
        written.append(tmp_path / f"{name}.jsonl")
        write_rows(written[-1], lines)
    return written[0], written[1]


def test_a_check_and_an_identity_are_the_same(rows, tmp_path):
    outside, inside = (check_manifest(path, format="pairs", progress=pytest.fail) for path in rows)
    assert inside.ok and vars(inside) | {"manifest": "", "longest_text_where": ""} == vars(outside) | {
        "manifest": "", "longest_text_where": "",
    }  # fmt: skip
    found = []
    for path in rows:
        groups = read_manifest(path, format="pairs")
        shown = [picture for group in groups for image in group.images for picture in image]
        found.append(data_identity(groups, [tmp_path], PictureTable.of_files(shown)))
    assert changes(found[0], found[1]) is None and found[0]["pictures"] == found[1]["pictures"]


def test_a_part_that_is_not_there_is_named(rows, tmp_path):
    tar = tmp_path / "shards" / "images-00000.tar"
    table = PictureTable.of_files([part := read_manifest(rows[1], format="pairs")[2].images[0][0]])
    os.truncate(tar, 2000)
    for bad, reason in (
        (part, f"its file has 2000 bytes; get a complete {tar.name}"),
        (Path(f"{tar}#0+999999999999999999"), "ends at byte 999999999999999999"),
        (Path(f"{tar}#9999999999999999999+1"), "no such image file"),
        (Path(f"{tar}#00+10"), "no such image file"),
        (Path(f"{tar}#-1+10"), "no such image file"),
        (Path(f"{tar}#\u0661+10"), "no such image file"),
        (Path(f"{tar}#0+10/x.png"), "no such image file"),
        (Path(f"{tmp_path}/none.tar#0+10"), "no such image file"),
        (Path(f"{tar}#0+0"), "it contains no image"),
        (Path(f"{tar}#100+9"), "it contains no image"),
    ):
        for read in (open_image, image_size):
            with pytest.raises(DataError, match=reason) as error:
                read(bad)
            assert str(error.value).count(str(bad)) == 1 and "\n" not in str(error.value)
    table.verify(part)  # opening it says what is wrong
    problems = check_manifest(rows[1], format="pairs").problems
    assert any(problem.startswith(f"{rows[1]}:") and tar.name in problem for problem in problems)
    with pytest.raises(TooLarge):
        picture_bytes(Path(f"{tar}#0+11"), 10)
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(DataError, match="no such image file"):
        open_image(Path(f"{tmp_path}/pipe.tar#0+1"))
    with pytest.raises(ValueError, match="named pipe"):
        picture_bytes(Path(f"{tmp_path}/pipe.tar#0+0"), 1)


def test_a_small_file_takes_little_memory(tmp_path):
    """However much it may have: a bound of 4 GiB is not asked of the system for every picture."""
    (file := tmp_path / "a.bin").write_bytes(b"x" * 5000)
    tracemalloc.start()
    assert picture_bytes(file, 1 << 32) == read_bytes(file, 1 << 32) == picture_bytes(Path(f"{file}#0+5000"), 1 << 32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_container_is_confined_as_a_file_is(rows, tmp_path):
    """A part of a tar in the second root is found there; one that leads out, through a link too, is refused."""
    text = rows[1].read_text()
    (lists := tmp_path / "lists").mkdir()
    (lists / "m.jsonl").write_text(text)
    groups = read_manifest(lists / "m.jsonl", [lists, tmp_path], "pairs")
    assert groups == read_manifest(rows[1], format="pairs")
    shutil.move(tmp_path / "shards", tmp_path.parent / f"{tmp_path.name}-away")
    (tmp_path / "shards").symlink_to(tmp_path.parent / f"{tmp_path.name}-away")
    for path in (rows[1], lists / "m.jsonl"):
        with pytest.raises(DataError, match=r"images-00000.tar#1536\+\d+' leads outside the data root"):
            read_manifest(path, [lists, tmp_path] if path.parent == lists else None, "pairs")
    (tmp_path / "shards").unlink()
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "images-00000.tar").symlink_to(tmp_path.parent / f"{tmp_path.name}-away" / "images-00000.tar")
    with pytest.raises(DataError, match="leads outside the data root"):
        read_manifest(rows[1], format="pairs")


def test_a_container_that_was_put_in_its_place_is_read_anew(tmp_path):
    """A process keeps containers open; one that is written again is another, and contents are compared with those that were checked."""
    for k, colour in enumerate(("red", "blue")):
        Image.new("RGB", (8, 6), colour).save(tmp_path / f"{k}.bmp")
    (part,) = archived(tmp_path / "a.tar", tmp_path / "0.bmp")
    table = PictureTable.of_files([part])
    assert open_image(part).getpixel((0, 0)) == (255, 0, 0)
    (tmp_path / "1.bmp").replace(tmp_path / "0.bmp")
    archived(tmp_path / "b.tar", tmp_path / "0.bmp")
    (tmp_path / "b.tar").replace(tmp_path / "a.tar")
    assert open_image(part).getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(DataError, match=r"a.tar#1536\+\d+: the picture has changed since"):
        table.verify(part)
    assert hashlib.blake2b(picture_bytes(part, 1 << 20), digest_size=16).digest() == content_digest(part)
