"""Groups at random: rows, places and errors are those of a naive reading; an index that does not fit is refused, whoever made it."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import read_rows, write_manifest, write_rows
from stores import preparing
from torch.utils.data import DataLoader

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.data import check_manifest, check_rows, lines, open_groups, passes, read_manifest
from cfvlm_ds.data.formats import FORMATS
from cfvlm_ds.data.formats.pairs import Pairs
from cfvlm_ds.data.identity import data_identity
from cfvlm_ds.data.lines import IndexedLines
from cfvlm_ds.data.picture_index import PictureTable
from cfvlm_ds.data.store import Unraised
from cfvlm_ds.data.stored import StoredRows

ODD_LINES = [b"", b" \t", b"\r", b"{}", b" {}", b'{"a": 1}', b"x" * 90, b"\xef\xbb\xbf{}", b"\x0c", b"\xff", b"\x00", b" " * 70]


def naive(path: Path) -> list[tuple[str, bytes]]:
    """The rows of a file by Python's own iteration."""
    with path.open("rb") as handle:
        return [(f"{path}:{number}", line.rstrip(b"\r\n")) for number, line in enumerate(handle, 1) if line.strip()]


def rows(found: IndexedLines) -> list[tuple[str, bytes]]:
    return [(found.where(row), found.line(row)) for row in range(len(found))]


@pytest.fixture
def small(monkeypatch):
    """Files of a few bytes have blocks."""
    for name, value in (("MIB", 64), ("MAX_LINE", 100)):
        monkeypatch.setattr(lines, name, value)


def test_lines_are_those_of_a_naive_reading(small, tmp_path):
    """Blank lines, spaces, carriage returns, a missing last break, lines that cross blocks: scanned, and then mapped."""
    path, chance = tmp_path / "rows.jsonl", random.Random(0)
    for _ in range(60):
        ends = chance.choices([b"\n", b"\r\n"], k=40)
        path.write_bytes(
            b"".join(line + end for line, end in zip(chance.choices(ODD_LINES, k=40), ends, strict=True))[: chance.randrange(900)]
        )
        lines.write_index(path)
        first, second = IndexedLines.scanned(path), IndexedLines.mapped(path)
        assert rows(first) == naive(path) and [line for _, line in rows(second)] == [line for _, line in naive(path)]
        assert isinstance(second.starts.base, np.ndarray) and not second.starts.flags.owndata, "mapped"


def test_a_row_takes_at_most_sixteen_bytes(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' * 5000)
    assert lines.write_index(path).stat().st_size < 13 * 5000
    found = IndexedLines.scanned(path)
    assert sum(each.nbytes for each in vars(found).values() if isinstance(each, np.ndarray)) < 17 * 5000


def test_a_file_that_is_written_is_indexed_again(small, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n')
    before = path.stat()
    found = IndexedLines.scanned(path)
    path.write_bytes(b'{"a": 1}\n{"a": 3}\n')
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert rows(IndexedLines.scanned(path)) == naive(path), "of the same size, with its old time"
    assert found.line(0) == b'{"a": 1}'
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the row has changed"):
        found.line(1)
    os.truncate(path, 3)
    with pytest.raises(DataError, match="has changed"):
        found.line(0)


# Groups ------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    path = write_manifest(tmp_path_factory.mktemp("store") / "m.jsonl", 12)
    path.write_text(path.read_text().replace("\n", "\n\n", 5))
    return path


def test_a_store_is_the_list(manifest):
    """In any order, by slices, in forked workers."""
    store, groups = open_groups(manifest), read_manifest(manifest)
    assert len(store) == 12 and list(store) == groups and [store[k] for k in (-1, 3, 0, 3)] == [groups[k] for k in (-1, 3, 0, 3)]
    assert list(store[2:9:3]) == groups[2:9:3] and list(store[::-1][1:3]) == groups[::-1][1:3] and len(store[20:]) == 0
    with pytest.raises(IndexError):
        store[12]
    assert [store.where(k) for k in (0, 1, 5, 11)] == [f"{manifest}:{line}" for line in (1, 3, 11, 17)]
    loaded: Any = DataLoader(store, batch_size=5, num_workers=2, collate_fn=list)  # type: ignore[arg-type]
    assert [group for batch in loaded for group in batch] == groups


def test_the_first_problem_of_a_row_is_raised_where_it_is_used(manifest, tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(manifest.read_text() + "{\n")
    store = open_groups(path, manifest.parent)
    assert len(store) == 13 and list(store[:12]) == read_manifest(manifest)
    with pytest.raises(DataError, match=rf"{path}:18: broken JSON at column 2"):
        store[12]


class Doubled:
    """Rows of ``pairs``, each once for every number in ``times``."""

    def __call__(self, row: Mapping[str, Any]) -> Sequence[CounterfactualGroup]:
        return [Pairs()({**row, "id": f"{row['id']}-{k}"}) for k in range(row["times"])]

    def parts(self, row: Mapping[str, Any]) -> int:
        return row["times"]


def test_rows_of_several_groups(tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "doubled", Doubled())
    common = {"image_0": "a.png", "image_1": "b.png", "caption_0": "x", "caption_1": "y"}
    rows = [{**common, "id": n, "times": times} for n, times in enumerate((2, 1, 3))]
    path = tmp_path / "m.jsonl"
    write_rows(path, rows)
    store = open_groups(path, format="doubled")
    assert [group.id for group in store] == ["0-0", "0-1", "1-0", "2-0", "2-1", "2-2"] == [group.id for group in reversed(store)][::-1]
    assert [store.where(k) for k in range(6)] == [f"{path}:{line}" for line in (1, 1, 2, 3, 3, 3)]
    rows[2]["caption_1"] = "x"
    write_rows(path, [*rows, [], {"times": "three"}])
    problems = check_rows(open_groups(path, format="doubled"), progress=pytest.fail).problems
    assert len(problems) == 3 and [problem.split(": ")[0] for problem in problems] == [f"{path}:{line}" for line in (3, 4, 5)]
    monkeypatch.setattr(Doubled, "parts", lambda self, row: 1)
    with pytest.raises(DataError, match=r"m.jsonl:1: the row has 2 groups, but 1 were counted"):
        open_groups(path, format="doubled")[0]


# Passes ------------------------------------------------------------------------------------------------------------------------------


def test_ids_that_come_twice_are_found_wherever_they_are(tmp_path):
    """Each names the first row of that id; a hash is no proof."""
    names = ["a", "b", "c", "a", "d", "b", "a", "e", "f", "g", "e"]
    common = {"image_0": "a.png", "image_1": "b.png", "caption_0": "x", "caption_1": "y"}
    path = tmp_path / "m.jsonl"
    write_rows(path, ({**common, "id": name, "prompt": str(k)} for k, name in enumerate(names)))
    assert check_rows(open_groups(path, format="pairs"), progress=pytest.fail).problems == [
        f"{path}:{k + 1}: group id {name!r} is already used by {path}:{names.index(name) + 1}; make ids unique, or remove the row if it "
        "repeats that one"
        for k, name in enumerate(names)
        if names.index(name) < k
    ]


def test_keys_that_are_equal_by_chance_are_no_problem(manifest, monkeypatch):
    monkeypatch.setattr("cfvlm_ds.data.check.hashed", lambda name: 1)
    assert check_rows(open_groups(manifest), progress=pytest.fail).ok


def test_processes_find_what_one_finds(manifest, tmp_path, monkeypatch):
    """Chunks in forked processes: one report, one store."""
    whole, groups = check_manifest(manifest), read_manifest(manifest)
    pictures = PictureTable.of_files(picture for group in groups for image in group.images for picture in image)
    identity = data_identity(groups, [manifest.parent], pictures)
    for name, value in (("_MANY", 0), ("_CHUNK", 2), ("cores_per_rank", lambda: 2)):
        monkeypatch.setattr(passes, name, value)
    assert check_manifest(manifest, progress=str) == whole
    for opens, expected in ((True, identity), (False, data_identity(groups, [manifest.parent]))):
        assert preparing(manifest, tmp_path / f"{opens}", open_pictures=opens)
        assert StoredRows(tmp_path / f"{opens}").identity == expected and read_manifest(tmp_path / f"{opens}") == groups


def test_a_batch_is_its_groups_one_by_one(tmp_path):
    """What is wrong stands in its place, in the words of whoever asks for that row alone; rows of several groups too."""
    sound = read_rows(write_manifest(tmp_path / "m.jsonl", 6))
    wrong: list[Any] = [
        {**sound[0], "match": 7},
        [1],
        {**sound[1], "images": [{"id": "i0", "path": "../x.png"}]},
        {"image": "a", "caption": "b"},
    ]
    lines = [json.dumps(row) for each in zip(sound, [*wrong, *sound], strict=False) for row in each]
    (path := tmp_path / "odd.jsonl").write_text("\n".join([*lines, "{", '{"id": 1, "id": 2}']))
    order = random.Random(0).choices(range(len(groups := open_groups(path))), k=40)
    expected = [groups.entry(index) for index in order]
    given = [batch for batch in DataLoader(Unraised(groups), batch_size=7, sampler=order, collate_fn=list, num_workers=1)]  # type: ignore[arg-type,var-annotated]
    assert [str(each) for batch in given for each in batch] == [str(each) for each in expected]
    assert len({str(each) for each in expected if isinstance(each, DataError)}) == len(wrong) + 2
    rows = [
        {"id": k, "conversations": [{"from": f, "value": f"{f} {k} {n}"} for n in range(k % 3 + 1) for f in ("human", "gpt")]}
        for k in range(5)
    ]
    write_rows(path := tmp_path / "turns.jsonl", rows)
    several = open_groups(path, format="llava:per_turn=true")
    places = [6, 0, 1, 5, 2, 6]
    assert [several.entry(place) for place in places] == [several[place] for place in places] and len(several) == 9
