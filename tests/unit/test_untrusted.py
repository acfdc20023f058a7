"""Names and links from files that somebody else made: what is refused, what a hub cache may do, and where writing ends."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

from cfvlm_ds.core.errors import ConfigError, DataError, InputError, StorageError
from cfvlm_ds.core.files import create, remove
from cfvlm_ds.core.text import in_cell, one_line, plain_tables, printable, quoted
from cfvlm_ds.core.untrusted import bare_name, output_file, own_file, refuse_foreign
from cfvlm_ds.data.cfgroup import from_row
from cfvlm_ds.data.report import CheckReport

PATHS = ["", ".", "..", "/etc/passwd", "../x", "a/b", "a\\b", "x\0", "x\n", "\ud800", "n" * 256, "é" * 200, None, 3, ["x"], {"x": 1}]


@pytest.mark.parametrize("name", PATHS, ids=lambda name: ascii(name)[:20])
def test_a_name_that_is_a_path_is_refused_by_the_file_that_has_it(name):
    with pytest.raises(ConfigError, match=r"^index\.json: .* (download the folder again)$"):
        bare_name(name, "index.json")


def test_bare_names_pass_and_their_ending_is_held():
    for name in ("model.safetensors", "model-00001-of-00002.safetensors", "a..b", "é", "..."):
        assert bare_name(name, "index.json") == name
    with pytest.raises(ConfigError, match=r"'config\.json' is not .* that ends in \.safetensors"):
        bare_name("config.json", "index.json", ".safetensors")


def test_files_of_a_folder_and_links_that_lead_out_of_it(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    for name, target in {"out": "../secret", "absolute": tmp_path / "secret", "in": "sub", "loop": "loop", "deep": "out"}.items():
        (folder / name).symlink_to(target)
    assert own_file(folder, "sub/x", "list") == folder / "sub" / "x" and own_file(folder, "in", "list") == folder / "in"
    for name in ("out", "absolute", "deep"):
        with pytest.raises(ConfigError, match=rf"model/{name} leads to {tmp_path}/secret, outside its folder; put the file itself there"):
            own_file(folder, name, "list")
    for name in ("sub/../../secret", "/etc/passwd", "sub//x", ["sub"]):
        with pytest.raises(ConfigError, match=r"^list: "):
            own_file(folder, name, "list")
    (tmp_path / "alias").symlink_to(folder)
    refuse_foreign(tmp_path / "alias" / "sub", tmp_path / "alias")


def test_the_links_of_a_hub_cache(tmp_path):
    """snapshots/REVISION/NAME -> ../../blobs/HASH, also where the cache is named by a link. Blobs that are a link, a blob that is one, and
    another repository's blobs are not its own."""
    repository, private = tmp_path / "models--org--model", tmp_path / "private"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    for folder in (blobs, private):
        folder.mkdir()
        (folder / "hash").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/hash")
    (tmp_path / "alias").symlink_to(repository)
    refuse_foreign(snapshot / "config.json", snapshot)
    refuse_foreign(tmp_path / "alias" / "snapshots" / "abc" / "config.json", tmp_path / "alias" / "snapshots" / "abc")
    (blobs / "key").symlink_to(private / "hash")
    (snapshot / "LICENSE").symlink_to("../../blobs/key")
    with pytest.raises(ConfigError, match=r"LICENSE leads to .*, outside its folder"):
        refuse_foreign(snapshot / "LICENSE", snapshot)
    shutil.rmtree(blobs)
    blobs.symlink_to(private)
    with pytest.raises(ConfigError, match=r"config\.json leads to .*, outside its folder"):
        refuse_foreign(snapshot / "config.json", snapshot)
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    (snapshot / "foreign.json").symlink_to("../../../models--a--b/blobs/x")
    with pytest.raises(ConfigError, match=r"foreign\.json leads to .*, outside its folder"):
        refuse_foreign(snapshot / "foreign.json", snapshot)


def test_nothing_is_written_through_a_link(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_text("mine")
    folder.mkdir()
    (folder / "kept").write_text("")
    (tmp_path / "link").symlink_to(victim)
    with create(tmp_path / "link") as handle:
        handle.write(b"new")
    assert victim.read_text() == "mine" and not (tmp_path / "link").is_symlink() and (tmp_path / "link").read_text() == "new"
    (tmp_path / "tree").symlink_to(folder)
    remove(tmp_path / "tree")
    assert (folder / "kept").exists() and not (tmp_path / "tree").is_symlink()
    remove(folder)
    assert not folder.exists()


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "fifo")
    cases = {"file/out.json": "cannot be written", "link": "is a link to", "fifo": "not a file", "": "not a file"}
    for name, said in cases.items():
        with pytest.raises(InputError, match=rf"{said}.* with --out$"):
            output_file(tmp_path / name)
    with pytest.raises(StorageError, match=r"cannot be written .* with --out$"):
        output_file(Path("/proc/out.json"))
    assert output_file(tmp_path / "new" / "out.json").parent.is_dir()
    with pytest.raises(ConfigError, match="file is an input and would be overwritten; name another output file"):
        output_file(tmp_path / "new" / ".." / "file", tmp_path / "none", tmp_path / "file")


# Names in rows of data ---------------------------------------------------------------------------------------------------------------

HOSTILE = "a\x1b[2Jb\nc\ud800d\u202ee"


def test_nothing_commands_a_terminal_or_ends_a_line():
    assert printable("zwei Hunde 犬 ✓") == "zwei Hunde 犬 ✓"
    assert printable(HOSTILE) == r"a\x1b[2Jb\nc\ud800d\u202ee"
    assert one_line(HOSTILE, 60) == r"a\x1b[2Jb c\ud800d\u202ee"
    assert one_line("x" * 10**6, 60) == "x" * 60 + "..." and one_line("x" * 60, 60) == "x" * 60
    assert quoted({"a": "\n"}) == r"{'a': '\n'}" and len(quoted(["x"] * 1000)) == 203
    assert in_cell("a|b\x07") == r"a\|b\\x07"
    assert r"\x1b[2Jb" in str(CheckReport("m", edit_types=Counter({HOSTILE: 2})))


@pytest.mark.parametrize(("place", "key"), [((), "id"), ((), "source"), (("edits", 0), "type"), (("edits", 0), "from")])
@pytest.mark.parametrize("value", [None, [], {"a": 1}, True])
def test_a_name_in_a_row_is_a_string_or_a_number(place, key, value):
    row = {
        "id": 7, "images": [{"id": "i0", "path": "a.png"}], "texts": [{"id": "t0", "text": "a"}], "match": [["i0", "t0", 1]],
        "edits": [{"type": 3}],
    }  # fmt: skip
    assert from_row(row).id == "7" and from_row(row).edits[0].type == "3"
    holder = row
    for part in place:
        holder = holder[part]  # type: ignore[index]
    holder[key] = value
    with pytest.raises(DataError, match=rf"'{key}' must be a string, not .*; quote it"):
        from_row(row)


def test_tables_for_a_terminal_have_columns_of_fixed_width():
    name = r"a|b\[<i>"
    text = f"# head\n\n| set | value |\n|---|---:|\n| {in_cell(name)} | 1.5 |\n| b | 10 |\n\n- a | b"
    rows = [f"set{' ' * 7}value", f"{name}    1.5", f"b{' ' * 12}10"]
    assert plain_tables(text) == "\n".join(["# head", "", *rows, "", "- a | b"])
