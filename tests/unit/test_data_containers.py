"""Files of rows that are not JSON lines: the same rows, once, with pictures in their places; and what is wrong with such files."""

from __future__ import annotations

import base64
import contextlib
import csv
import http.server
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pyarrow
import pytest
from conftest import read_json, read_rows
from PIL import Image
from public_data import PUBLIC, lines, member, picture, write_pictures
from pyarrow import parquet

from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.files import file_lock
from cfvlm_ds.data import check_manifest, open_groups, open_image, read_manifest
from cfvlm_ds.data import download as downloading
from cfvlm_ds.data.containers import json_file
from cfvlm_ds.data.containers.kinds import CONTAINERS, sources_of
from cfvlm_ds.data.containers.prepared import prepare
from cfvlm_ds.data.convert import convert

CAPTION = {"image": "images/000.png", "caption": "a dog"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    write_pictures(tmp_path / "data")
    return tmp_path / "data"


def refusal(path: Path, format: str = "captions") -> str:
    """What reading and the check say, which is the same sentence."""
    with pytest.raises(DataError) as raised:
        read_manifest(path, format=format)
    message = str(raised.value)
    assert message.startswith(str(path)) and message.isprintable() and len(message) < 1000
    assert check_manifest(path, format=format, progress=str).problems[0] == message
    return message


# ---- the rows


@pytest.mark.parametrize("name", PUBLIC)
def test_the_check_opens_the_pictures_of_every_container(name, tmp_path):
    """A second start finds what the first has prepared, and what was converted is the same data."""
    (data := tmp_path / "data").mkdir()
    path, format = PUBLIC[name][0](data, 9)
    report = check_manifest(path, format=format, progress=str)
    assert report.ok and report.num_groups == 9 and report.num_images >= 9
    before = {each: each.stat().st_mtime_ns for each in data.rglob("*") if each.is_file()}
    groups = read_manifest(path, format=format)
    assert before == {each: each.stat().st_mtime_ns for each in data.rglob("*") if each.is_file()}
    done = convert(path, None, "auto" if ":" not in format else format, out := data / "out" / "groups.jsonl")
    again = read_manifest(out, done.root)
    shown = [[[open_image(each).tobytes() for each in image] for image in group.images] for group in again]
    assert shown == [[[open_image(each).tobytes() for each in image] for image in group.images] for group in groups]
    assert [(g.id, g.candidates, g.match, g.meta) for g in again] == [(g.id, g.candidates, g.match, g.meta) for g in groups]


def test_what_is_prepared_is_made_once_and_again_when_the_source_changed(folder):
    path = folder / "rows.csv"
    path.write_text("image,caption\nimages/000.png,a dog\n")
    read_manifest(path, format="captions")
    (first,) = folder.glob("*.prepared")
    stamp = (first / "rows.jsonl").stat().st_mtime_ns
    read_manifest(path, format="captions")
    assert (first / "rows.jsonl").stat().st_mtime_ns == stamp
    written = path.stat().st_mtime_ns
    path.write_text("image,caption\nimages/000.png,a cat\n")
    os.utime(path, ns=(written, written))  # as archives unpack and copies keep it
    assert read_manifest(path, format="captions")[0].candidates[0].text == "a cat" and len(list(folder.glob("*.prepared"))) == 2
    assert not list(folder.glob("*.lock")) and not list(folder.glob("*.partial"))


def test_where_the_folder_of_the_data_must_not_be_written(folder, cache):
    path = folder / "rows.csv"
    path.write_text("image,caption\nimages/000.png,a dog\n")
    (blocked := folder / "blocked").write_text("a file where a folder should be")
    made = prepare(path, "csv", [blocked, cache])
    assert made.lines.is_relative_to(cache) and read_json(made.lines) == CAPTION
    with pytest.raises(DataError, match=r"rows.csv: its rows cannot be prepared in .*blocked .*; free some space there, or set XDG"):
        prepare(path, "csv", [blocked])


def test_a_preparation_that_ends_early_leaves_nothing(folder, cache):
    path = folder / "rows.csv"
    path.write_text('image,caption\nimages/000.png,a dog\nimages/000.png,"a cat\n')
    for _ in range(2):
        with pytest.raises(DataError, match=r"rows\.csv:3: not a table"):
            prepare(path, "csv", [cache])
        assert not any(cache.iterdir())

    def interrupted():
        raise KeyboardInterrupt

    path.write_text("image,caption\nimages/000.png,a dog\n")
    with pytest.raises(KeyboardInterrupt):
        prepare(path, "csv", [cache], alive=interrupted)
    assert not any(cache.iterdir())


def test_another_process_that_prepares_is_waited_for_alive(folder, cache):
    """Other ranks hear from this one meanwhile, and whoever looks at it knows why."""
    said, seen = list[str](), list[int]()
    with file_lock(folder / "x.lock"):

        def alive():
            seen.append(1)
            if len(seen) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), file_lock(folder / "x.lock", lambda: said.append("waiting"), alive):
            pass
    assert said == ["waiting"] and len(seen) == 2


def test_a_json_file_is_gone_through_as_json_reads_it(tmp_path):
    """Documents of every form."""
    chance = random.Random(0)

    def value(depth):
        kinds = [lambda: chance.choice([None, True, -1.5e-3, 10**20, 0, 1234567, "", "é\u2028\U0001f600", 'q"\\', "ab"])]
        kinds += [lambda: [value(depth - 1) for _ in range(chance.randrange(4))]] * (depth > 0)
        kinds += [lambda: {f"k{k}": value(depth - 1) for k in range(chance.randrange(4))}] * (depth > 0)
        return chance.choice(kinds)()

    path = tmp_path / "a.json"
    for round in range(80):
        rows = [{"a": value(3), "b": value(2)} for _ in range(chance.randrange(1, 5))]
        path.write_text(json.dumps(rows, ensure_ascii=bool(round % 2), indent=chance.choice([None, 0, 3])), encoding="utf-8")
        assert [row for _, row in json_file.json_rows(path)] == rows, path.read_text()
        numbered = {str(k): row for k, row in enumerate(rows)}
        path.write_text(json.dumps(numbered, indent=round % 3), encoding="utf-8-sig")
        assert [row for _, row in json_file.json_rows(path)] == rows


def test_pictures_of_arrow_stay_and_those_of_parquet_are_copied_once(tmp_path):
    (tmp_path / "arrow").mkdir()
    path, format = PUBLIC["saved data set"][0](tmp_path / "arrow", 50)
    groups = read_manifest(path, format=format)
    assert {each.name.partition("#")[0] for g in groups for (each,) in g.images} == {
        "data-00000-of-00002.arrow",
        "data-00001-of-00002.arrow",
    }
    assert not list(tmp_path.rglob("pictures.tar"))
    (tmp_path / "parquet").mkdir()
    path, format = PUBLIC["Winoground Parquet"][0](tmp_path / "parquet", 50)
    groups = read_manifest(path, format=format)
    (tar,) = tmp_path.rglob("pictures.tar")
    with tarfile.open(tar) as members:
        assert sorted(members.extractfile(each).read() for each in members) == sorted(picture(k) for k in range(12))  # type: ignore[union-attr]
    assert len({each for g in groups for image in g.images for each in image}) == 12


def test_columns_of_every_type_that_arrow_has(tmp_path):
    """Slices, nulls, lists of pictures, dictionaries, dates; against pyarrow's own values."""
    shots = [{"bytes": picture(k), "path": f"{k}.png"} for k in range(3)]
    rows = [
        {
            "images": shots[:2],
            "one": shots[2],
            "text": "a",
            "when": __import__("datetime").date(2024, 1, 2),
            "nested": {"x": [1, None]},
            "no": None,
        },
        {"images": [], "one": None, "text": None, "when": None, "nested": None, "no": None},
        {"images": None, "one": {"bytes": None, "path": "c.png"}, "text": "c", "when": None, "nested": {"x": None}, "no": None},
    ]
    table = pyarrow.Table.from_pylist(rows)
    table = table.set_column(2, "text", table["text"].dictionary_encode())
    table = table.append_column("box", pyarrow.array([[1, 2], [5, 6], [3, 4]], pyarrow.list_(pyarrow.int8(), 2)))
    expected = [
        {"images": [picture(0), picture(1)], "one": picture(2), "text": "a", "when": "2024-01-02", "nested": {"x": [1, None]}, "no": None},
        {"images": [], "one": None, "text": None, "when": None, "nested": None, "no": None},
        {"images": None, "one": "c.png", "text": "c", "when": None, "nested": {"x": None}, "no": None},
    ]
    for row, box in zip(expected, ([1, 2], [5, 6], [3, 4]), strict=True):
        row["box"] = box

    def at_places(value):
        if isinstance(value, str) and "#" in value:
            start, length = map(int, value.partition("#")[2].split("+"))
            return (tmp_path / value.partition("#")[0]).read_bytes()[start : start + length]
        return [at_places(each) for each in value] if isinstance(value, list) else value

    parquet.write_table(table, tmp_path / "a.parquet")
    assert [row for _, row in CONTAINERS["parquet"](tmp_path / "a.parquet")] == expected
    for name, new in (("stream", pyarrow.ipc.new_stream), ("file", pyarrow.ipc.new_file)):
        with pyarrow.OSFile(str(path := tmp_path / f"{name}.arrow"), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table.slice(1))
            writer.write_table(table)
        found = [row for _, row in CONTAINERS["arrow"](path)]
        assert [{key: at_places(value) for key, value in row.items()} for row in found] == [*expected[1:], *expected]
        assert isinstance(found[2]["one"], str), "named, not copied"


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_few_bytes_that_become_many_are_bounded(name, folder):
    """Sixty-four texts of 6 MB, each of which is said once in Arrow's dictionary, or compressed in Parquet."""
    text, most = "x" * (6 << 20), 560 << 20
    if name == "a.parquet":
        schema = pyarrow.schema([("image", pyarrow.string()), ("caption", pyarrow.string())])
        with parquet.ParquetWriter(folder / name, schema, compression="zstd", use_dictionary=False, write_statistics=False) as writer:
            for _ in range(4):
                writer.write_table(pyarrow.table({"image": ["images/000.png"] * 16, "caption": [text] * 16}, schema))
        assert (folder / name).stat().st_size < 1 << 20
    else:
        captions = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 64, pyarrow.int32()), pyarrow.array([text]))
        source = pyarrow.table({"image": ["images/000.png"] * 64, "caption": captions})
        with pyarrow.OSFile(str(folder / name), "wb") as sink, pyarrow.ipc.new_file(sink, source.schema) as writer:
            writer.write_table(source)
    program = (
        "import resource, sys; from pathlib import Path; from cfvlm_ds.data.containers.kinds import CONTAINERS, container_of\n"
        "path, before = Path(sys.argv[1]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "rows = [row['caption'] for _, row in CONTAINERS[container_of(path)](path)]\n"
        "print(len(rows), rows[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder / name)], capture_output=True, text=True, check=True)
    count, *said, grown = done.stdout.split()
    assert count == "64" and f"has a text of {len(text)} bytes" in " ".join(said) and int(grown) << 10 < most


def test_several_files_are_one_source(folder):
    for k in range(3):
        (folder / f"part-{k}.csv").write_text(f"image,caption\nimages/000.png,dog {k}\n" + "x\n" * (k == 1))
    (folder / "other.jsonl").touch()
    for number, text in enumerate(("image;caption\na.png;a dog\n", "a.png,a dog\nb.png,a cat\n")):
        (path := folder / f"bad{number}.csv").write_text(text)
        with pytest.raises(DataError, match="columns in the first line, separated by commas"):
            open_groups(path)
    assert sources_of(folder / "part-*.csv") == [folder / f"part-{k}.csv" for k in range(3)]
    groups = [item for item in check_manifest(folder / "part-*.csv", format="captions", progress=str).problems]
    assert groups == [
        f"{folder}/part-*.csv: part-1.csv, item 2: the row (line 3) has 1 fields, but the first line names 2 columns; " + QUOTES
    ]
    (folder / "part-2.csv").write_text("image,caption\nimages/000.png,\n")
    with pytest.raises(DataError, match=r"part-\*.csv: part-2.csv, item 1: row: column 'caption' has no text"):
        open_groups(folder / "part-*.csv", format="captions")[3]
    assert "no such manifest" in refusal(folder / "none-*.csv") and "one kind" in refusal(folder / "*.*")


def test_an_image_folder_has_captions_beside_its_pictures_or_in_a_table(tmp_path):
    """The same groups by folder, by pattern and by table; a picture without a caption is named, and a changed caption is read again."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (32, 32), ("red", "blue")[name == "b"]).save(pictures / f"{name}.png")
    assert "captions in .txt files, and not a store; name the data file" in refusal(pictures)
    for name in ("a", "b"):
        (pictures / f"{name}.txt").write_text(f"a picture called {name}\n")

    def read(path):
        return [(group.images[0][0].name, group.candidates[0].text) for group in read_manifest(path)]

    expected = [("a.png", "a picture called a"), ("b.png", "a picture called b")]
    assert read(pictures) == read(pictures / "*.png") == expected
    (pictures / "a.txt").write_bytes(b"another\r\ncaption\r\n")
    assert read(pictures) == [("a.png", "another\ncaption"), expected[1]]
    for name in ("c.txt", "B.TXT", "metadata.csv"):
        (pictures / name).write_text("a caption of nothing")
        assert f"{name} would be ignored" in refusal(pictures) and len(read(pictures / "*.png")) == 2
        (pictures / name).unlink()
    (pictures / "a.jpg").write_bytes((pictures / "a.png").read_bytes())
    assert "a.txt is the caption of several pictures" in refusal(pictures)
    (pictures / "a.jpg").unlink()
    (tmp_path / "secret.txt").write_text("of somebody else")
    (pictures / "c.png").write_bytes((pictures / "a.png").read_bytes())
    (pictures / "c.txt").symlink_to(tmp_path / "secret.txt")
    (problem,) = check_manifest(pictures).problems
    assert "c.txt cannot be read (it is a link to outside the folder)" in problem
    for name in ("c.txt", "c.png"):
        (pictures / name).unlink()
    (pictures / "b.txt").unlink()
    (problem,) = check_manifest(pictures).problems
    assert problem.startswith(f"{pictures}: b.png, item 1: b.txt cannot be read (No such file or directory); ")
    (pictures / "a.txt").unlink()
    (pictures / "metadata.csv").write_text("file_name,text\na.png,a picture called a\nb.png,a picture called b\n")
    assert "name the data file" in refusal(pictures) and read(pictures / "metadata.csv") == expected


QUOTES = "put fields with separators in quotes"


# ---- bad files


def table(text: bytes | str, name: str = "a.csv") -> Callable[[Path], Path]:
    def write(folder):
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return folder / name

    return write


def packed(*members: tuple[str, bytes], cut: int = 0, mode: str = "w", name: str = "a.tar") -> Callable[[Path], Path]:
    def write(folder):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode=mode) as tar:  # type: ignore[call-overload]
            for each in members:
                member(tar, *each)
        (folder / name).write_bytes(file.getvalue()[: len(file.getvalue()) - cut])
        return folder / name

    return write


def chained(folder: Path) -> Path:
    """Two samples, and headers that each say a long name for the next one."""
    path = packed(SHOT, ("a.txt", b"a dog"), ("b.png", picture(1)), ("b.txt", b"a cat"))(folder)
    header = tarfile.TarInfo("././@LongLink")
    header.size, header.type = 2, tarfile.GNUTYPE_LONGNAME
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b"a cat") + 512] + (header.tobuf(tarfile.USTAR_FORMAT) + b"c\0".ljust(512, b"\0")) * 5000)
    return path


def fields(*rows: list[str], delimiter: str = ",") -> str:
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows(rows)
    return file.getvalue()


ROW = json.dumps(CAPTION)
HEAD, SHOT = "image,caption\n", ("a.png", picture(0))
COCO = {"images": [{"id": 1, "file_name": "images/000.png"}], "annotations": [{"image_id": 1, "id": 2, "caption": "a dog"}]}
BAD = {
    "table in UTF-16": (table((HEAD + "images/000.png,é\n").encode("utf-16")), "UTF-16"),
    "table in Latin-1": (table((HEAD + "images/000.png,é\n").encode("latin-1")), "0xe9"),
    "columns of one name": (table("image,caption,image\na,b,c\n"), "'image'"),
    "tabs in a CSV": (table("image\tcaption\na\tb\n"), r"the row has 'image.tcaption'"),
    "empty table": (table(""), "empty"),
    "header alone": (table(HEAD), "no rows"),
    "spreadsheet": (table("PK", "a.XLSX"), "spreadsheet"),
    "column without a name": (table("image,,caption\na,b,c\n"), "column 2"),
    "long row": (table(HEAD + "images/000.png,a dog, a cat\n"), "item 1: .*line 2.* 3 fields"),
    "short row behind others": (table(HEAD + '\nimages/000.png,"a\ndog"\n\nimages/000.png\n'), "item 2: .*line 6.* 1 fields"),
    "quote that never ends": (table(HEAD + 'images/000.png,"a dog\n' + "x,y\n" * 9), "a.csv:11:"),
    "quote within a field": (table(HEAD + 'images/000.png,"a "big" dog"\n'), "twice"),
    "list with a comma too few": (table(f"[{ROW},\n{ROW}\n{ROW}]", "a.json"), "line 3, column 1"),
    "list in Latin-1": (table('[{"caption": "é"}]'.encode("latin-1"), "a.json"), "byte 15"),
    "half a character": (table(json.dumps([CAPTION | {"x": "\ud800"}]), "a.json"), "item 1: .*ud800"),
    "another object": (table(json.dumps({"data": [CAPTION], "x": 1}, indent=1), "a.json"), "dict, not a list of rows"),
    "instances of COCO": (table(json.dumps(COCO | {"annotations": [{"image_id": 1}]}), "a.json"), "annotations, item 1: key 'caption'"),
    "caption of no image": (
        table(json.dumps(COCO | {"annotations": [*COCO["annotations"], {"image_id": 7, "caption": "x"}]}), "a.json"), "image id 7",
    ),
    "image twice": (table(json.dumps(COCO | {"images": COCO["images"] * 2}), "a.json"), "images, item 2: .* 1"),
    "tar cut between members": (packed(SHOT, ("a.txt", b"a dog"), cut=8192), "^[^(]*truncated"),
    "cut tar": (packed(SHOT, ("a.txt", b"a dog"), ("b.png", picture(1)), ("b.txt", b"x" * 600), cut=6200), "truncated"),
    "no tar": (table(b"x" * 2000, "a.tar"), "complete copy|no rows"),
    "tar of headers without end": (chained, "sample 'a' .*recursion"),
    "compressed tar": (packed(SHOT, ("a.txt", b"x"), mode="w:gz"), "compressed"),
    "compressed in capitals": (table("PK", "a.ZIP"), "unzip a.ZIP"),
    "member twice": (packed(SHOT, ("a.txt", b"x"), SHOT), "item 1: .*'a.png'"),
    "text in Latin-1": (packed(SHOT, ("a.txt", "é".encode("latin-1"))), "item 1: .*'a.txt': byte 1"),
    }  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_sentence(case, folder):
    write, said = BAD[case]
    path = write(folder)
    message = refusal(path, "webdataset" if path.suffix == ".tar" else "captions")
    assert re.search(said, message), message


def test_a_folder_says_what_it_lacks(folder):
    (folder / "empty").mkdir()
    assert "name the data file" in refusal(folder / "empty")
    (folder / "splits" / "train").mkdir(parents=True)
    (folder / "splits" / "dataset_dict.json").write_text("{}")
    assert "contains several splits (train); name one of its folders" in refusal(folder / "splits")
    (folder / "saved").mkdir()
    for state, said in (('{"_data_files": []}', "has no files"), ('{"_data_files": [{"filename": "../a"}]}', "a")):
        (folder / "saved" / "state.json").write_text(state)
        with pytest.raises(ValueError, match=said):
            read_manifest(folder / "saved", format="hf")


def test_the_splits_of_a_downloaded_data_set_are_not_one_data_set(folder):
    """A folder as the hub has it: training and test files side by side, in a folder below."""
    (data := folder / "mine" / "data").mkdir(parents=True)
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        (data / f"{name}.parquet").touch()
    assert "name the data file" in refusal(folder / "mine")
    assert f"contains several splits (test, train); name the files of one split, such as {data}/test-*.parquet" in refusal(data)
    (data / "test-00000-of-00001.parquet").unlink()
    assert [file.name[:11] for file in sources_of(data)] == ["train-00000", "train-00001"]
    (data / "more.tar").touch()
    assert f"{data}: contains files of several kinds (*.parquet, *.tar); name those of one kind, such as {data}/*.parquet" in refusal(data)


def test_without_pyarrow(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("a.parquet", "a.arrow"):
        (folder / name).touch()
        assert "reading it needs pyarrow" in (said := refusal(folder / name)) and "pip install 'cfvlm-ds[data]'" in said


def test_no_container_is_waited_for(folder):
    for name in ("a.csv", "a.tar", "a.json", "a.parquet", "a.arrow"):
        os.mkfifo(folder / name)
        assert "a named pipe, not a regular file" in refusal(folder / name)


def test_members_of_a_tar_lead_nowhere(folder):
    """Links and files that claim to be larger than the tar; only the bytes of members are ever named."""
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, kind in (("a.png", tarfile.SYMTYPE), ("a.jpg", tarfile.LNKTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
        member(tar, "a.txt", b"a dog")
    assert "sample 'a': 'a.png' is a link" in refusal(folder / "a.tar", "webdataset")
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, content in (("b.png", picture(1)), ("b.txt", b"a cat")):
            member(tar, name, content)
        for name in ("c.png", "c.txt"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.LNKTYPE, name.replace("c", "b")
            tar.addfile(link)
    assert "item 2: sample 'c': 'c.png' is a link" in refusal(folder / "a.tar", "webdataset")
    header = tarfile.TarInfo("b.png")
    header.size = 10**12
    (folder / "b.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    assert "truncated" in refusal(folder / "b.tar", "webdataset")
    header.type, header.size = tarfile.XHDTYPE, 1 << 40
    (folder / "c.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    os.truncate(folder / "c.tar", 1 << 42)
    assert "get a complete copy" in refusal(folder / "c.tar", "webdataset")


# ---- conversion


def test_conversion_leaves_bad_rows_out_when_it_is_told_to(folder):
    rows = [CAPTION | {"id": k} for k in range(3)]
    path = lines(folder / "rows.jsonl", [rows[0], {"image": "a.png", "caption": 7}, rows[1], "{", rows[2], rows[2]])
    with pytest.raises(DataError, match=r"rows.jsonl:2: .*\(or skip such rows with --on_error skip\)"):
        convert(path, None, "captions", folder / "out.jsonl")
    assert not (folder / "out.jsonl").exists()
    said = []
    done = convert(path, None, "captions", folder / "out.jsonl", "skip", said.append)
    assert (done.groups, len(done.problems)) == (3, 3) and [g.id for g in read_manifest(folder / "out.jsonl")] == ["0", "1", "2"]
    listed = [row["problem"] for row in read_rows(folder / "out.jsonl.skipped.jsonl")]
    assert listed == done.problems and [each.partition(": ")[0] for each in listed] == [f"{path}:{k}" for k in (2, 4, 6)]
    assert f"{path}:5" in listed[2] and any("3 groups" in line and listed[0] in line for line in said)
    with pytest.raises(ConfigError, match=r"out.jsonl already exists and would be overwritten; remove it"):
        convert(lines(folder / "good.jsonl", rows), None, "captions", folder / "out.jsonl", "skip")
    (folder / "out.jsonl").unlink()
    convert(lines(folder / "good.jsonl", rows), None, "captions", folder / "out.jsonl", "skip")
    assert not (folder / "out.jsonl.skipped.jsonl").exists(), "nothing was left out the second time"
    with pytest.raises(ConfigError, match="is an input and would be overwritten; name another output file"):
        convert(path, None, "captions", path)
    with pytest.raises(DataError, match=r"none of the 2 groups is usable"):
        convert(lines(folder / "bad.jsonl", ["{", "{"]), None, "captions", folder / "none.jsonl", "skip")
    assert not (folder / "none.jsonl").exists()


def test_groups_of_joined_rows_are_counted_as_groups(folder):
    """Two rows that are one group of nothing true, and one that lacks its label."""
    rows = [CAPTION | {"caption": text, "label": label} for text, label in (("a", 0), ("b", 0), ("c", None))]
    rows += [row | {"image": "images/001.png"} for row in (CAPTION | {"label": 1}, CAPTION | {"caption": "x", "label": 0})]
    said = []
    done = convert(lines(folder / "rows.jsonl", rows), None, "captions:label=label", folder / "out.jsonl", "skip", said.append)
    assert done.groups == 1 and [each for each in said if each.startswith("left out 2 groups, ")]
    assert [re.sub(".*rows.jsonl", "", problem).split(":")[1] for problem in done.problems] == ["1", "3"]


def test_conversion_leaves_out_pictures_that_a_check_refuses(folder):
    """One that is not there, a damaged one of two rows, one that is too large, and an edited one that was never edited."""
    (folder / "cut.png").write_bytes(picture(1)[:-30])
    (folder / "same.png").write_bytes(picture(0))
    Image.new("RGB", (300, 300)).save(folder / "large.png")
    wrong = [{"image": name} for name in ("absent.png", "cut.png", "images/001.png", "large.png", "cut.png")]
    wrong[2] = {"image": "images/000.png", "negative_image": "same.png"}
    rows = [CAPTION, *wrong, CAPTION | {"negative_image": "images/001.png"}]
    path = lines(folder / "rows.jsonl", [CAPTION | row | {"id": k} for k, row in enumerate(rows)])
    broken = check_manifest(path, max_pixels=80_000, progress=str).problems
    assert len(broken) == 4, "a picture is named once"
    said = []
    done = convert(path, None, "auto", folder / "out.jsonl", "skip", said.append, 80_000)
    listed = [row["problem"] for row in read_rows(folder / "out.jsonl.skipped.jsonl")]
    assert done.groups == 2 and listed == done.problems and set(broken) < set(listed)
    assert [each.partition(": ")[0] for each in listed] == [f"{path}:{k}" for k in (2, 3, 4, 5, 6)]
    assert said[-1].startswith(f"left out 5 groups, listed in {folder}/out.jsonl.skipped.jsonl")
    report = check_manifest(folder / "out.jsonl", max_pixels=80_000, progress=str)
    assert report.ok and report.num_groups == 2 and report.num_images == 2


# ---- pictures of the network


class Server(http.server.BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []
    sent = 0

    def do_GET(self) -> None:
        self.asked.append(self.path)
        busy = self.path == "/busy.png" and self.asked.count(self.path) == 1
        if self.path == "/moved.png":  # with a body of 100 MB that nobody needs
            self.send_response(302)
            self.send_header("Location", "/a.png")
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(100):
                    type(self).sent += self.wfile.write(bytes(1_000_000))
            return
        status = {"/none.png": 404, "/away.png": 302, "/loop.png": 302}.get(self.path, 503 if busy else 200)
        content = {"/page.png": b"<html>", "/large.png": bytes(5000)}.get(self.path, picture(len(self.path) % 5))
        self.send_response(status)
        if status == 302:
            self.send_header("Location", {"/away.png": "ftp://127.0.0.1/x"}.get(self.path, "/loop.png"))
        self.send_header("Content-Length", str(len(content) + (self.path == "/cut.png")))
        self.end_headers()
        with contextlib.suppress(OSError):
            for k in range(0, len(content), 10):
                self.wfile.write(content[k : k + 10])
                time.sleep(self.path == "/slow.png")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        Server.asked.clear()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_pictures_of_the_network_are_fetched_once_and_checked(tmp_path, server, monkeypatch):
    for name, value in (("MAX_DOWNLOAD", 4000), ("WHOLE_S", 3.0), ("TIMEOUT_S", 2.0), ("PAUSE_S", 0.0)):
        monkeypatch.setattr(downloading, name, value)
    text = "data:image/png;base64," + base64.b64encode(picture(3)).decode()
    said = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": text}}]}, {"role": "assistant", "content": "x"}]
    good = [
        {"image": f"{server}/a.png", "caption": "a"},
        {"image": f"{server}/busy.png", "caption": f"see {server}/no.png"},
        {"messages": said},
    ]
    bad = {
        "none": "the server replied 404 Not Found", "away": "unknown url type: ftp", "loop": "infinite loop|error that would lead",
        "page": "not a picture", "large": "more than 4000 bytes", "cut": "were received|IncompleteRead|bytes read",
        "slow": "no complete reply within 3 s",
    }  # fmt: skip
    rows = [
        *good,
        *({"image": f"{server}/{name}.png", "caption": name} for name in bad),
        {"image": "data:image/png;base64,%%", "caption": "b"},
    ]
    path = lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"rows.jsonl:4: 'http.*none.png': cannot be fetched .*--on_error skip"):
        downloading.download(path, tmp_path / "out.jsonl")
    count, pictures, problems = downloading.download(path, tmp_path / "out.jsonl", "skip")
    assert count == pictures == 3 and len(problems) == len(bad) + 1
    listed = (tmp_path / "out.jsonl.skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["problem"] for line in listed] == problems
    for problem, (name, why) in zip(problems, bad.items(), strict=False):
        assert f"{name}.png" in problem and re.search(why, problem), problem
    assert "cannot be decoded" in problems[-1]
    written = read_rows(tmp_path / "out.jsonl")
    assert written[1]["caption"] == good[1]["caption"], "what is said is not an address of a picture"
    lines(tmp_path / "a.jsonl", written[:2])
    lines(tmp_path / "b.jsonl", written[2:])
    assert check_manifest(tmp_path / "a.jsonl", format="captions", progress=str).ok
    (group,) = read_manifest(tmp_path / "b.jsonl", format="messages")
    assert group.images[0][0].read_bytes() == picture(3)
    assert downloading.download(lines(path, good), tmp_path / "again" / "out.jsonl")[0] == 3
    Server.asked.clear()
    (tmp_path / "again" / "out.jsonl").unlink()
    assert downloading.download(path, tmp_path / "again" / "out.jsonl")[0] == 3 and not Server.asked
    assert not list(tmp_path.rglob("*.unchecked"))


def test_the_body_of_a_redirect_is_not_read(tmp_path, server):
    path = lines(tmp_path / "rows.jsonl", [{"image": f"{server}/moved.png"}])
    assert downloading.download(path, tmp_path / "out.jsonl").pictures == 1
    assert Server.sent < 50_000_000
