"""A store holds the same groups and pictures, whoever prepared it and however often they were killed; another's files are refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import resource
import shutil
import signal
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import contents, read_json, read_rows, write_json, write_manifest, write_rows
from public_data import PUBLIC, write_pictures
from stores import preparing

from cfvlm_ds.__main__ import main
from cfvlm_ds.batching.collator import load_collator
from cfvlm_ds.core.distributed import World
from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.files import Summed, crc32_of, whole_file
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.parsing import parse_config
from cfvlm_ds.data import check, check_manifest, lines, open_groups, prepare, read_manifest
from cfvlm_ds.data.decoding import open_image
from cfvlm_ds.data.identity import changes, data_identity
from cfvlm_ds.data.passes import Scan
from cfvlm_ds.data.permutation import RowsTogether
from cfvlm_ds.data.picture_file import picture_bytes
from cfvlm_ds.data.picture_index import PictureTable, picture_key, picture_of
from cfvlm_ds.data.report import CheckReport
from cfvlm_ds.data.stored import StoredRows
from cfvlm_ds.objectives import OBJECTIVES
from cfvlm_ds.training import token_counts
from cfvlm_ds.training.read_data import read_data
from cfvlm_ds.training.run import _sampler


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    small(monkeypatch)


def small(patch: pytest.MonkeyPatch) -> None:
    for name, value in (("PICTURED", 5), ("ROWS", 6)):
        patch.setattr(prepare, name, value)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Seventeen rows: ragged ones, one of text alone, one that shows pictures of others, one of two pictures at once."""
    path = write_manifest(tmp_path_factory.mktemp("source") / "m.jsonl", 14, seed=3)
    rows = read_rows(path)
    alone = {"id": "alone", "images": [{"id": "i0", "path": None}], "texts": [{"id": "t0", "text": "é"}], "match": [["i0", "t0", 1]]}
    shown = [rows[k]["images"][0]["path"] for k in (1, 9)]
    again = {
        "id": "again",
        "images": [{"id": f"i{k}", "path": each} for k, each in enumerate(shown)],
        **{k: alone[k] for k in ("texts", "match")},
    }
    both = {**alone, "id": "both", "images": [{"id": "i0", "path": shown[::-1]}], "meta": {"a": [1, "x"]}, "weight": 0.5}
    rows.insert(3, alone)
    rows.insert(12, again)
    rows.insert(0, both)
    write_rows(path, rows)
    return path


@pytest.fixture(scope="module")
def stores(source, tmp_path_factory):
    """Packed or not: the store."""
    folder = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        small(patch)
        found = {packs: folder / ("packed" if packs else "plain") for packs in (True, False)}
        assert all(preparing(source, out, pack=packs) for packs, out in found.items())
    return found


@pytest.fixture
def store(stores):
    return stores[True]


def plain(group: CounterfactualGroup) -> dict[str, Any]:
    """A group with the bytes of its pictures in place of their names."""
    return vars(group) | {"images": [[picture_bytes(picture, 1 << 20) for picture in image] for image in group.images]}


@pytest.mark.parametrize("packs", [True, False])
def test_a_store_is_the_data_set(packs, source, stores, tmp_path):
    """Groups, order, contents of pictures; as a copy in another place with other times, too, to which nothing is written."""
    groups = read_manifest(source)
    files_of = PictureTable.of_files(picture for group in groups for image in group.images for picture in image)
    identity = data_identity(groups, [source.parent], files_of)
    shutil.copytree(stores[packs], copied := tmp_path / "copied", copy_function=shutil.copyfile)
    for folder in (stores[packs], copied):
        opened = open_groups(folder, None if not packs else ["/nowhere"], "pairs")
        assert [plain(group) for group in opened] == [plain(group) for group in groups]
        shown = [picture for group in opened for image in group.images for picture in image]
        assert {picture.name.split("-")[0] for picture in shown} == {"images"} or not packs
        assert all((folder if packs else source.parent) in picture.parents for picture in shown)
        assert changes(data_identity(opened, opened.roots, PictureTable.of_files(shown)), identity) is None
        assert StoredRows(folder).identity == identity
        assert check_manifest(folder, progress=pytest.fail).ok
        assert opened.where(7) == f"{folder}/groups-00001.jsonl:2"
    assert contents(copied) == contents(stores[packs])
    names = sorted(each.split("-")[0] for each in contents(stores[packs]))
    assert names == ["groups"] * 6 + ["images"] * 4 * packs + ["picture_keys.npy", "pictures.table", "row_keys.npy", "store.json"]


def test_pictures_of_a_store_may_move(source, stores, tmp_path):
    """Once they have, the folder that they are in is named as root; they are known by their names there."""
    shutil.copytree(source.parent, tmp_path / "data")
    out = tmp_path / "store"
    assert preparing(tmp_path / "data" / "m.jsonl", out)
    assert all(tmp_path / "data" in picture.parents for picture in shown_in(out, source.parent)), "where they still are"
    (tmp_path / "data").rename(moved := tmp_path / "moved")
    known = StoredRows(out, [moved]).pictures
    for picture in (shown := shown_in(out, moved)):
        assert known is not None and moved in picture.parents
        assert known.find(picture) == picture_of(picture, *open_image(picture).size)
        known.verify(picture)
    edit_unseen(shown[0])
    with pytest.raises(DataError, match="has changed since the data were checked"):
        known.verify(shown[0])


def edit_unseen(picture: Path) -> None:
    """Change a picture as nothing shows that a user can set: neither its size nor its time."""
    before = picture.stat()
    picture.write_bytes(picture.read_bytes()[:-1] + b"!")
    os.utime(picture, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("packs", [True, False])
def test_what_cannot_be_used_is_left_out_and_listed(packs, source, model_dir, tmp_path, capsys):
    """A row that is no group, a repeated id, a broken picture that two groups show; the rest is the store of the rest."""
    shutil.copytree(source.parent, tmp_path / "data")
    path = tmp_path / "data" / "m.jsonl"
    rows = path.read_text().splitlines()
    again = next(k for k, row in enumerate(rows) if json.loads(row)["id"] == "again")
    picture = json.loads(rows[again])["images"][0]["path"]
    showing = [k for k, row in enumerate(rows) if picture in json.dumps(json.loads(row)["images"])]
    (tmp_path / "data" / picture).write_bytes(b"no picture")
    left = [row for k, row in enumerate(rows) if k not in showing]
    path.write_text("\n".join([*rows[:5], "{", *rows[5:], rows[-1]]))
    for shard in (0, 1, 0):
        whole = preparing(path, tmp_path / "store", shard, 2, pack=packs, on_error="skip")
    assert whole and len(showing) == 3 > 1
    path.write_text("\n".join(left))
    assert preparing(path, tmp_path / "rest", pack=packs)
    assert [plain(group) for group in open_groups(tmp_path / "store")] == [plain(group) for group in open_groups(tmp_path / "rest")]
    assert StoredRows(tmp_path / "store").identity == StoredRows(tmp_path / "rest").identity
    problems = [row["problem"] for row in read_rows(tmp_path / "store" / "left_out.jsonl")]
    assert len(problems) == len(showing) + 2 == StoredRows(tmp_path / "store").found["left_out"]
    named = sorted(int(problem.partition("m.jsonl:")[2].partition(":")[0]) for problem in problems)
    assert named == sorted([6, len(rows) + 2, *(k + 1 + (k >= 5) for k in showing)])
    for store, said in (("store", f" ({len(problems)} were left out"), ("rest", "")):
        capsys.readouterr()
        read_data(reading(tmp_path / store, tmp_path / "run", model_dir, "full"), World(0, 1, torch.device("cpu")))
        assert f"/{store}: {len(left)} groups{said}" in (printed := capsys.readouterr().out) and ("left out" in printed) == bool(said)
    path.write_text("{\n")
    with pytest.raises(DataError, match=r"m.jsonl:1: .*none of the 1 groups"):
        preparing(path, tmp_path / "none", on_error="skip")


def test_pictures_are_members_of_tars(source, store):
    """Each file is there once, under a name of its own, for whoever unpacks it; store.json has the sums of all files."""
    found = []
    for tar in sorted(store.glob("*.tar")):
        with tarfile.open(tar) as archive:
            members = [(member.name, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]
        assert len({name for name, _ in members}) == len(members) and all(name.endswith(".png") for name, _ in members)
        found += [content for _, content in members]
    shown = {picture for group in read_manifest(source) for image in group.images for picture in image}
    assert sorted(found) == sorted(picture.read_bytes() for picture in shown)
    record = read_json(store / "store.json")
    for each in (*record["rows"], *record["images"], *record["tables"]):
        content = (store / each["file"]).read_bytes()
        assert (each["bytes"], each["crc32"]) == (len(content), zlib.crc32(content))


def shown_in(folder: Path, root: Path | None = None) -> list[Path]:
    return [picture for group in open_groups(folder, root) for image in group.images for picture in image]


def test_a_store_knows_its_pictures_without_opening_them(store, tmp_path):
    """Sizes and contents as whoever opens them finds them, wherever the store is; a tar that is written afterwards is found out."""
    shutil.copytree(store, copied := tmp_path / "copied", copy_function=shutil.copyfile)
    for folder in (store, copied):
        known = StoredRows(folder).pictures
        assert known is not None and len(known) == len(set(shown_in(folder)))
        for picture in shown_in(folder):
            assert known.find(picture) == picture_of(picture, *open_image(picture).size)._replace(ctime=0)
            assert known.find(tmp_path / picture.name) is None and known.find(picture.with_name("images-00000.tar#0+1")) is None
    picture = shown_in(copied)[0]
    known = StoredRows(copied).pictures
    assert known is not None
    known.verify(picture)
    tar, _, place = picture.name.partition("#")
    with (copied / tar).open("r+b") as file:
        file.seek(int(place.partition("+")[0]) + 60)
        file.write(b"other")
    os.utime(copied / tar, ns=(1, 1))
    with pytest.raises(DataError, match="has changed since the data were checked"):
        known.verify(picture)


def test_groups_of_one_row_stay_together_in_a_store(tmp_path):
    """The answers of a conversation are drawn one after the other, from the file and from a store of it, or of a part of it."""
    (tmp_path / "data").mkdir()
    path, _ = PUBLIC["LLaVA"][0](tmp_path / "data", 20)
    for limit in (None, 8):
        groups = open_groups(path, format="llava:per_turn=true", limit=limit)
        out = tmp_path / f"store-{limit}"
        assert preparing(groups, out, pack=True)
        packed_groups = open_groups(out)
        assert groups.together is not None and packed_groups.together is not None
        orders = [RowsTogether(each.together, len(each)).permuted(0, len(each), 0, 0) for each in (groups, packed_groups)]  # type: ignore[arg-type]
        assert [each.id for each in groups] == [each.id for each in packed_groups] and orders[0] == orders[1]
        drawn = [groups[index].id.rpartition("-")[0] for index in orders[0]]
        assert len([name for name, _ in itertools.groupby(drawn)]) == len(set(drawn)) < len(drawn)
    assert open_groups(path, format="llava").together is None


@pytest.mark.parametrize("where", ["picture", "row"])
def test_every_picture_and_row_of_a_store_is_held_against_its_sum(where, store, tmp_path):
    """A byte is changed, and no size: the check names the picture or the row."""
    shutil.copytree(store, copied := tmp_path / "store")
    assert check_manifest(copied, progress=str).ok
    tar, _, place = shown_in(copied)[0].name.partition("#")
    file, byte = (tar, int(place.partition("+")[0]) + 70) if where == "picture" else ("groups-00000.jsonl", 3)
    data = bytearray((copied / file).read_bytes())
    data[byte] ^= 1
    (copied / file).write_bytes(data)
    (problem,) = check_manifest(copied, progress=str).problems
    assert {"picture": f"{copied / tar}#", "row": f"{copied / file}:1: "}[where] in problem


def reading(train: Path, run: Path, model: Path, check: str) -> Any:
    names = {"--model.name_or_path": model, "--data.train": train, "--train.output_dir": run, "--data.check": check}
    options = [str(part) for pair in names.items() for part in pair]
    return parse_config(["--config", "tests/support/train.yaml", *options, "--data.max_tokens_per_micro_batch", "1000"], OBJECTIVES)


def test_a_run_on_a_store_knows_its_pictures_and_shares_its_token_counts(source, store, model_dir, tmp_path, monkeypatch):
    """Under ``check: rows`` the identity is that of a full check of the files; counts are made once for all runs."""
    shutil.copytree(store, copied := tmp_path / "store")
    alone = World(0, 1, torch.device("cpu"))

    def tokens(run, train=copied, check="rows"):
        config = reading(train, tmp_path / run, model_dir, check)
        data = read_data(config, alone)
        collator = load_collator(config.model).of_run("full", None, data.pictures)
        return _sampler(config, alone, data, collator).tokens.tolist(), data  # type: ignore[attr-defined]

    expected, plain_data = tokens("files", source, "full")
    found, data = tokens("one")
    assert found == expected and changes(plain_data.identity, data.identity) is None
    assert data.identity["pictures"] == plain_data.identity["pictures"] is not None
    (kept,) = (copied / "tokens").iterdir()
    monkeypatch.setattr(token_counts, "Scan", pytest.fail)
    assert tokens("two")[0] == expected
    kept.write_bytes(kept.read_bytes()[:-4])
    monkeypatch.undo()
    assert tokens("three")[0] == expected


@pytest.mark.parametrize(("of", "packs"), [(2, True), (7, False)])
def test_shards_together_are_the_store_of_one(of, packs, source, stores, tmp_path):
    """In any order; rows wait for the pictures of all shards, and who was there first is called again."""
    order, said = random.Random(of).sample(range(of), of), list[str]()
    wholes = [preparing(source, tmp_path / "store", shard, of, said.append, pack=packs) for shard in [*order, *order]]
    assert wholes[-1] and contents(tmp_path / "store") == contents(stores[packs])
    assert any("parts of its pictures" in line and "run this command again" in line for line in said)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "store").iterdir()}
    assert preparing(source, tmp_path / "store", 1, of, pack=packs), "a store that is whole is left alone"
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "store").iterdir()}


@pytest.mark.parametrize("function", ["tar_member", "_written", "crc32_of"])
def test_who_packs_the_same_shard_at_the_same_time_finds_it_packed(function, source, store, tmp_path, monkeypatch):
    """Another call ends the store while this one writes a file of it, and removes what it takes for left."""
    right, out = getattr(prepare, function), tmp_path / "store"

    def overtaken(*given):
        monkeypatch.setattr(prepare, function, right)
        with whole_file(out / "other.tar", shared=True):
            assert preparing(source, out, pack=True)
        return right(*given)

    monkeypatch.setattr(prepare, function, overtaken)
    assert preparing(source, out, pack=True) and contents(out) == contents(store)


def test_a_packing_that_is_killed_goes_on(source, store, tmp_path, monkeypatch):
    """SIGKILL after ever more writes: what was finished is not made again, and the bytes are the same in the end."""
    out, right, finished = tmp_path / "store", Summed.write, dict[str, int]()
    for calls in itertools.count(1):
        left = itertools.count(8 * calls, -1)

        def write(self, data, left=left):
            if not next(left):
                os.kill(os.getpid(), signal.SIGKILL)
            return right(self, data)

        monkeypatch.setattr(Summed, "write", write)
        if not (child := os.fork()):
            try:
                os._exit(0 if preparing(source, out, pack=True) else 3)
            finally:
                os._exit(4)
        status = os.waitpid(child, 0)[1]
        now = {file.name: file.stat().st_mtime_ns for file in out.iterdir() if file.suffix in (".tar", ".jsonl")}
        assert finished.items() <= now.items()
        finished = {name: now[name] for name in now if (out / "parts" / name).with_suffix(".json").exists()}
        if status == 0:
            break
        assert status == signal.SIGKILL
    assert calls > 3 and contents(out) == contents(store)


@pytest.mark.parametrize("packs", [True, False])
def test_a_full_disk_is_named_and_the_same_command_goes_on(packs, source, stores, tmp_path, capsys):
    """The system refuses every file above a size, which grows from call to call: one sentence each time, and in the end the same bytes."""
    out, limits = tmp_path / "store", resource.getrlimit(resource.RLIMIT_FSIZE)
    command = ["data", "prepare", str(source), "--out", str(out), *["--pack"] * packs]
    for size in itertools.count(200, 900):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            main(command)
        except SystemExit as ended:
            said = capsys.readouterr().err.splitlines()[-1]
            assert ended.code == 2 and said.startswith(f"error: {out}") and "File too large" in said, said
            assert not (out / "store.json").exists()
        else:
            break
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert size > 2000 and contents(out) == contents(stores[packs])


def test_whoever_prepares_other_data_in_the_same_folder_meanwhile_is_named(source, store, tmp_path, monkeypatch):
    """They remove what this call has begun, and end theirs between its pictures and its rows: theirs stays whole."""
    right, out = prepare._Job._write_rows, tmp_path / "store"

    def overtaken(*given):
        monkeypatch.setattr(prepare._Job, "_write_rows", right)
        assert preparing(source, out, pack=True)
        return right(*given)

    monkeypatch.setattr(prepare._Job, "_write_rows", overtaken)
    with pytest.raises(ConfigError, match="was prepared from another state of"):
        preparing(open_groups(source, limit=9), out, pack=True)
    assert contents(out).keys() - {"parts"} == contents(store).keys() and [plain(group) for group in open_groups(out)] == [
        plain(group) for group in open_groups(store)
    ]


def test_a_run_refuses_pictures_larger_than_its_own_limit(source, stores, model_dir, tmp_path):
    """The store was prepared with another one."""
    found = StoredRows(stores[False]).found["most_pixels"]
    assert found == max(np.prod(open_image(picture).size) for picture in shown_in(stores[False]))

    def limited(most):
        config = reading(stores[False], tmp_path / "run", model_dir, "full")
        return read_data(
            dataclasses.replace(config, data=dataclasses.replace(config.data, max_pixels=most)), World(0, 1, torch.device("cpu"))
        )

    limited(found)
    with pytest.raises(DataError, match=rf"a picture has {found} pixels, but data.max_pixels is {found - 1}"):
        limited(found - 1)


def test_a_broken_picture_is_named_before_anything_is_whole(source, tmp_path, monkeypatch):
    shutil.copytree(source.parent, tmp_path / "data")
    broken = read_manifest(tmp_path / "data" / "m.jsonl")[8].images[0][0]
    broken.write_bytes(b"no picture")
    with pytest.raises(DataError, match=rf"m.jsonl:9: {broken}: it contains no image"):
        preparing(tmp_path / "data" / "m.jsonl", tmp_path / "store")
    with pytest.raises(DataError, match="run `cfvlm-ds data prepare` again"):
        open_groups(tmp_path / "store")
    rows = (tmp_path / "data" / "m.jsonl").read_text().splitlines()
    (tmp_path / "data" / "m.jsonl").write_text("\n".join([*rows, rows[0]]))
    with pytest.raises(ConfigError, match="prepared from another state of"):
        preparing(tmp_path / "data" / "m.jsonl", tmp_path / "store", 0, 2)
    opened = []
    monkeypatch.setattr(check, "open_image", lambda path, pixels: opened.append(path) or open_image(path, pixels))
    with pytest.raises(DataError, match="repeats"):
        preparing(tmp_path / "data" / "m.jsonl", tmp_path / "store")
    assert opened == [broken], "the others were not written since"
    shutil.copy(read_manifest(source)[8].images[0][0], broken)
    (tmp_path / "data" / "m.jsonl").write_text("\n".join(rows))
    assert preparing(tmp_path / "data" / "m.jsonl", tmp_path / "store") and opened[1:] == [broken]
    with pytest.raises(ConfigError, match="with other options; remove it"):
        preparing(tmp_path / "data" / "m.jsonl", tmp_path / "store", pack=True)


def test_a_store_of_the_same_rows_read_otherwise_is_another(tmp_path):
    write_pictures(tmp_path)
    rows = [{"id": k, "image": "images/000.png", "caption": f"dog {k}"} for k in range(3)]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert preparing(open_groups(tmp_path / "rows.jsonl", format="captions"), tmp_path / "other")
    with pytest.raises(ConfigError, match="or with other options; remove it"):
        preparing(open_groups(tmp_path / "rows.jsonl", format="captions:ask=What?"), tmp_path / "other")


def test_what_is_no_store_is_left_alone(source, store, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "file").write_text("x")
    (tmp_path / "book" / "parts").mkdir(parents=True)
    (tmp_path / "book" / "parts" / "thesis.txt").write_text("x")
    for name, reason in (("mine", "not a store"), ("link", "is a link"), ("file", "not a store"), ("book", "not a store")):
        with pytest.raises(ConfigError, match=reason):
            preparing(source, tmp_path / name)
    shop = tmp_path / "shop"
    shop.mkdir()
    (shop / "store.json").write_text('{"name": "a shop"}')
    groups, options = open_groups(source), prepare.PrepareOptions()
    for folder in (shop, tmp_path / "link"):
        with pytest.raises(ConfigError):
            prepare.prepare(groups, folder, "another", options, str, anew=True)
    assert os.listdir(shop) == ["store.json"]
    out = tmp_path / "ours"
    assert preparing(source, out)
    (out / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="not a store"):
        prepare.prepare(groups, out, "another", options, str, anew=True)
    assert os.listdir(out) == ["thesis.txt"], "what somebody else has put there"
    assert os.listdir(tmp_path / "mine") == os.listdir(tmp_path / "book" / "parts") == ["thesis.txt"]
    with pytest.raises(DataError, match="name the data file"):
        open_groups(tmp_path / "mine")


def renamed(store: Path, one: str, other: str) -> None:
    (store / one).rename(store / "aside")
    (store / other).rename(store / one)
    (store / "aside").rename(store / other)


def edited(store: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = read_json(store / "store.json")
    change(record)
    write_json(store / "store.json", record)


def swapped(store: Path) -> None:
    """Rows with their index in the place of others: the same sizes, so that only sums tell."""
    for name in ("groups-00000.jsonl", "groups-00001.jsonl"):
        (store / name).write_bytes((store / name).read_bytes().ljust(5999) + b"\n")
        lines.write_index(store / name)
    edited(store, lambda record: [each.update(bytes=6000) for each in record["rows"][:2]])
    edited(store, lambda record: [each.update(index=crc32_of(store / f"{each['file']}.idx")) for each in record["rows"]])
    assert len(open_groups(store)) == 17, "and so far it is one"
    renamed(store, "groups-00000.jsonl", "groups-00001.jsonl")
    renamed(store, "groups-00000.jsonl.idx", "groups-00001.jsonl.idx")


DAMAGE = {
    "rows cut": lambda store: os.truncate(store / "groups-00001.jsonl", 100),
    "tar cut": lambda store: os.truncate(store / "images-00000.tar", 1000),
    "no tar": lambda store: (store / "images-00002.tar").unlink(),
    "no index": lambda store: (store / "groups-00002.jsonl.idx").unlink(),
    "another index": lambda store: (store / "groups-00002.jsonl.idx").write_bytes((store / "groups-00001.jsonl.idx").read_bytes()),
    "swapped": swapped,
    "no JSON": lambda store: (store / "store.json").write_text("{"),
    "a later kind": lambda store: edited(store, lambda record: record.update(schema="cfstore/9")),
    "out of the store": lambda store: edited(store, lambda record: record["rows"][0].update(file="../m.jsonl")),
    "table cut": lambda store: os.truncate(store / "pictures.table", 48),
    "a table elsewhere": lambda store: edited(store, lambda record: record["tables"][2].update(file="../pictures.table")),
    "another table": lambda store: np.save(store / "row_keys.npy", np.load(store / "row_keys.npy")[::-1]),
    "another number of groups": lambda store: edited(store, lambda record: record["identity"].update(rows=3)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_store_is_refused(damage, store, tmp_path):
    shutil.copytree(store, copied := tmp_path / "store")
    DAMAGE[damage](copied)
    with pytest.raises(DataError) as error:
        open_groups(copied)
    assert str(copied) in str(error.value) and str(error.value).isprintable() and "; " in str(error.value)


def test_rows_are_checked_in_chunks_and_pictures_reduced_on_the_way(tmp_path, monkeypatch):
    """The pictures and repeated ids of 700 rows in three chunks, against a dictionary."""
    monkeypatch.setattr(check, "_MERGED", 8)
    chance, first, repeats, ids = random.Random(0), dict[str, int](), list[int](), set[str]()
    with (path := tmp_path / "m.jsonl").open("w") as file:
        for index in range(700):
            row: dict[str, Any] = {"id": f"g{chance.choice((index, chance.randrange(700)))}", "match": [["i", "t", 1]]}
            shown = f"{int(chance.random() ** 3 * 900)}.png"
            first.setdefault(shown, index)
            if row["id"] in ids:
                repeats.append(index)
            ids.add(row["id"])
            file.write(json.dumps(row | {"images": [{"id": "i", "path": shown}], "texts": [{"id": "t", "text": "a cup"}]}) + "\n")
    seen = check.look_at_rows(CheckReport(str(path)), open_groups(path), lambda line: None, Scan())
    expected = {picture_key(tmp_path / name): index for name, index in first.items()}
    assert dict(zip(*map(np.ndarray.tolist, seen.pictures), strict=True)) == expected and seen.repeats == repeats and len(repeats) > 100
