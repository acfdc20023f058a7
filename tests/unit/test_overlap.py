"""What training shares with evaluation, against a naive comparison of all rows and pictures; in one process, and in several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import read_rows, write_manifest, write_rows
from stores import preparing

from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.data import read_manifest
from cfvlm_ds.data.overlap import Shared, shared_with
from cfvlm_ds.data.stored import StoredRows


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A training set; itself; half of it in another order, with other ids, texts in another order and other white space; its pictures with
    other texts; copies of its pictures under other names; and a set of its own."""
    folder = tmp_path_factory.mktemp("sets")
    train = write_manifest(folder / "train.jsonl", 16, seed=1)
    rows = read_rows(train)

    def written(name: str, changed: list[dict[str, Any]]) -> Path:
        write_rows(folder / f"{name}.jsonl", changed)
        return folder / f"{name}.jsonl"

    moved = []
    for number, row in enumerate(rows[::-2]):
        texts = [{**text, "text": f"  {text['text']} "} for text in row["texts"]]
        moved.append({**row, "id": f"other-{number}", "texts": [texts[0], *texts[:0:-1]]})
    other = [{**row, "texts": [{**text, "text": f"no {text['text']}"} for text in row["texts"]]} for row in rows[:5]]
    copies = []
    for row in rows[3:6]:
        for image in row["images"]:
            (folder / "copies" / image["path"]).parent.mkdir(parents=True, exist_ok=True)
            (folder / "copies" / image["path"]).write_bytes((folder / image["path"]).read_bytes())
        copies.append({**row, "images": [{**image, "path": f"copies/{image['path']}"} for image in row["images"]]})
    found = {"same": train, "moved": written("moved", moved), "texts": written("texts", other), "copies": written("copies", copies)}
    (folder / "own").mkdir()
    return {"train": train, **found, "own": write_manifest(folder / "own" / "own.jsonl", 6, seed=77)}


def naive(train: list[CounterfactualGroup], split: list[CounterfactualGroup], contents: bool) -> Shared:
    def picture(path: Path) -> Any:
        return path.read_bytes() if contents else path

    def row(group: CounterfactualGroup) -> str:
        texts = sorted((str(each.prompt), " ".join(each.text.split())) for each in group.candidates)
        return str((texts, sorted(str([picture(each) for each in image]) for image in group.images)))

    rows = [{row(group) for group in groups} for groups in (train, split)]
    pictures = [{picture(each) for group in groups for image in group.images for each in image} for groups in (train, split)]
    return Shared(len(rows[0] & rows[1]), len(pictures[0] & pictures[1]), len(rows[1]), len(pictures[1]))


@pytest.mark.parametrize("contents", [True, False])
def test_what_is_shared_is_what_a_naive_comparison_finds(sets, tmp_path, contents):
    assert all(preparing(path, tmp_path / name, open_pictures=contents) for name, path in sets.items())
    keys = {name: StoredRows(tmp_path / name).keys for name in sets}
    expected = {name: naive(read_manifest(sets["train"]), read_manifest(sets[name]), contents) for name in sets if name != "train"}
    assert {name: shared_with(keys["train"], keys[name]) for name in expected} == expected
    assert expected["same"].rows == expected["same"].num_rows and expected["moved"].rows == expected["moved"].num_rows > 0
    assert expected["texts"].rows == 0 and expected["texts"].pictures == expected["texts"].num_pictures
    assert bool(expected["copies"].rows) == contents == bool(expected["copies"].pictures)
    assert str(expected["same"]) == f"{expected['same'].rows} of its {expected['same'].rows} rows and " + str(
        f"{expected['same'].pictures} of its {expected['same'].pictures} pictures"
    )
    assert not str(Shared(0, 0, 5, 5)) and str(Shared(0, 2, 5, 5)) == "2 of its 5 pictures"
