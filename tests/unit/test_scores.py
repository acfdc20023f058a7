"""The file of stored scores: what is written is read back, and anything less than all of it is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.data import read_manifest, stored_scores
from cfvlm_ds.data.identity import Identity, data_identity
from cfvlm_ds.data.picture_index import PictureTable
from cfvlm_ds.data.stored_scores import ScoresOfSources, StoredScores, read_scores, write_scores
from cfvlm_ds.models import fingerprint


def of(groups: list[CounterfactualGroup]) -> Identity:
    """The groups' identity by their paths as they are."""
    return data_identity(groups, [])


@pytest.fixture
def groups(manifests):
    return read_manifest(manifests["test"])


@pytest.fixture
def scores(groups):
    draw = random.Random(0).uniform
    return {
        g.id: StoredScores(tuple(tuple(-draw(1, 60) for _ in g.candidates) for _ in g.images), tuple(-draw(1, 60) for _ in g.candidates))
        for g in groups
    }


@pytest.fixture
def path(tmp_path, groups, scores):
    write_scores(tmp_path / "scores.jsonl", groups, scores, "org/model", of(groups))
    return tmp_path / "scores.jsonl"


def edit(path: Path, row: int, change) -> None:
    """Change one line's JSON object in place."""
    lines = path.read_text().splitlines()
    value = json.loads(lines[row])
    change(value)
    lines[row] = json.dumps(value)
    path.write_text("\n".join(lines) + "\n")


def test_round_trip_keeps_every_bit(path, groups, scores):
    assert read_scores(path, groups, of(groups)) == scores
    assert [p.name for p in path.parent.iterdir()] == ["scores.jsonl"], "no partial file stays"
    header = json.loads(path.read_text().splitlines()[0])
    assert header == {"schema": "cfscores/3", "data": of(groups), "groups": len(groups), "model": "org/model"}


@pytest.mark.parametrize("alike", [False, True])
def test_scores_are_read_when_they_are_used(alike, path, groups, scores, monkeypatch):
    """From the file, whose numbers are nowhere in memory; also where ids have one hash. Of a mixture they are named SOURCE/ID."""
    if alike:
        monkeypatch.setattr(stored_scores, "_key", lambda name: 7)
    found = read_scores(path, groups[::-1], of(groups[::-1]))
    assert found == scores and list(found) == [group.id for group in groups] and len(found) == len(groups)
    held = [value for value in vars(found).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in held) == 16 * len(groups) and len(vars(found)) == len(held) + 1
    assert "absent" not in found and found.get("absent") is None
    mixed = ScoresOfSources({"a": found, "b.c": {groups[0].id: scores[groups[1].id]}})
    assert mixed[f"a/{groups[0].id}"] == scores[groups[0].id] and mixed[f"b.c/{groups[0].id}"] == scores[groups[1].id]
    assert len(mixed) == len(groups) + 1 and list(mixed)[-1] == f"b.c/{groups[0].id}"
    assert "d/x" not in mixed and f"b.c/{groups[1].id}" not in mixed
    edit(path, 3, lambda row: row.update(blank=[-1.25]))
    with pytest.raises(DataError, match="the row has changed since it was indexed"):
        found[groups[2].id]


def test_a_group_that_is_there_twice_is_named(path, groups, monkeypatch):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:-1], lines[2]]))
    for key in (stored_scores._key, lambda name: 7):
        monkeypatch.setattr(stored_scores, "_key", key)
        with pytest.raises(DataError, match=f"no scores for group '{groups[-1].id}' .the file is incomplete, or contains a group twice"):
            read_scores(path, groups, of(groups))


def test_cut_off_files_are_refused_wherever_the_cut_is(path, groups):
    whole = path.read_bytes()
    row = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for cut in (None, 0, 10, whole.index(b"\n") + 1, row, row + 5, len(whole) - 30):
        path.unlink() if cut is None else path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"scores\.jsonl.*write it again"):
            read_scores(path, groups, of(groups))


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), -1e300, None, "-3.0"])
def test_values_that_are_no_finite_numbers(path, groups, value):
    for key in ("logp", "blank"):

        def spoil(row, key=key):
            (row["logp"][0] if key == "logp" else row["blank"])[0] = value

        original = path.read_text()
        edit(path, 3, spoil)
        with pytest.raises(DataError, match=f"group '{groups[2].id}'.*finite"):
            read_scores(path, groups, of(groups))
        path.write_text(original)


def test_a_matrix_with_images_and_texts_swapped(tmp_path, groups, scores):
    """A sham makes I != C, so a transposed matrix is not the group's though it has as many numbers."""
    group = next(g for g in groups if len(g.images) != len(g.candidates))
    scores[group.id] = dataclasses.replace(scores[group.id], logp=tuple(zip(*scores[group.id].logp, strict=True)))
    write_scores(tmp_path / "swapped.jsonl", groups, scores, "m", of(groups))
    with pytest.raises(DataError, match=f"group '{group.id}'"):
        read_scores(tmp_path / "swapped.jsonl", groups, of(groups))


def test_another_schema(path, groups):
    edit(path, 0, lambda header: header.update(schema="cfscores/1"))
    with pytest.raises(DataError, match="schema 'cfscores/1' is not 'cfscores/3'"):
        read_scores(path, groups, of(groups))


def test_scores_of_another_manifest(path, groups, scores):
    """What a score depends on is named where it has changed; what none depends on may change."""
    first = groups[0]
    texts = (dataclasses.replace(first.candidates[0], text="a purple hexagon"), *first.candidates[1:])
    folder = first.images[0][0].parent
    images = ((folder.with_name("edited") / first.images[0][0].name,), *first.images[1:])  # the same name in another folder
    for change, what in (({"candidates": texts}, "prompts or texts"), ({"images": images}, "image paths")):
        with pytest.raises(DataError, match=f"belong to another manifest, which differs in .*{what}"):
            read_scores(path, changed := [dataclasses.replace(first, **change), *groups[1:]], of(changed))
    relabelled = [dataclasses.replace(group, weight=2.0, match=((1, *group.match[0][1:]), *group.match[1:])) for group in groups[::-1]]
    assert read_scores(path, relabelled, of(relabelled)) == scores


def test_scores_of_other_pictures(tmp_path, groups, scores):
    """Where the contents of pictures are known to both, they decide: exchanged files are found, a moved folder is the same."""
    folder = groups[0].images[0][0].parent
    copied = shutil.copytree(folder, tmp_path / "copied")
    moved = [dataclasses.replace(g, images=tuple((copied / image.name,) for (image,) in g.images)) for g in groups]

    def identity(of):
        return data_identity(of, [], PictureTable.of_files(image for group in of for (image,) in group.images))

    path = tmp_path / "scores.jsonl"
    write_scores(path, groups, scores, "m", identity(groups))
    assert read_scores(path, moved, identity(moved)) == scores
    (one,), (other,) = next(group for group in moved if len(group.images) > 1).images[:2]
    one.rename(copied / "aside")
    other.rename(one)
    (copied / "aside").rename(other)
    with pytest.raises(DataError, match="belong to another manifest, which differs in contents of pictures"):
        read_scores(path, moved, identity(moved))


def test_scores_know_their_model(tmp_path, groups, scores, model_dir):
    """A copy of the model is the same one; other weights, tokenizer, template or bounds on visual tokens are refused by name."""
    path = tmp_path / "known.jsonl"
    write_scores(path, groups, scores, "org/model", of(groups), made_by=fingerprint(ModelConfig(str(model_dir))))
    copied = shutil.copytree(model_dir, tmp_path / "copied")
    identity = fingerprint(ModelConfig(str(copied)))
    assert read_scores(path, groups, of(groups), made_by=identity) == scores
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(DataError, match="computed by 'org/model' with other weights than this run's model; write it again"):
        read_scores(path, groups, of(groups), made_by=fingerprint(ModelConfig(str(copied))))
    shutil.copy(model_dir / "model.safetensors", weights)
    assert fingerprint(ModelConfig(str(copied))) == identity
    assert fingerprint(ModelConfig(str(copied), max_tiles=2)) != identity
    template = next(path for path in copied.glob("*.jinja"))
    template.write_text(template.read_text().replace("USER", "HUMAN"))
    with pytest.raises(DataError, match="with another tokenizer, processor or chat template than"):
        read_scores(path, groups, of(groups), made_by=fingerprint(ModelConfig(str(copied))))


def test_every_byte_of_the_weights_counts_and_is_read_once(model_dir, tmp_path, monkeypatch):
    """A fine-tune of the projector alone is another model, wherever it lies in a file, with its old time set again too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copied = shutil.copytree(model_dir, tmp_path / "copied")
    config, file = ModelConfig(str(copied)), copied / "model.safetensors"
    read = []
    seen = {fingerprint(config, lambda: read.append(1))["weights"]}
    assert read and fingerprint(config, pytest.fail)["weights"] in seen, "a second time nothing is read"
    original = file.read_bytes()
    stat = file.stat()
    for place in (len(original) // 2, len(original) // 3, len(original) - 1):
        changed = bytearray(original)
        changed[place] ^= 1
        with file.open("r+b") as handle:  # the same file, in place
            handle.write(changed)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        seen.add(fingerprint(config)["weights"])
    assert len(seen) == 4
    for remembered in (tmp_path / "cache").rglob("*"):
        if remembered.is_file():
            remembered.write_text("damaged")
    file.write_bytes(original)
    assert fingerprint(config)["weights"] in seen


def test_a_moved_folder_is_the_same_manifest(tmp_path, groups, scores):
    """Without the contents of pictures, their paths inside the data root tell."""
    root, path = groups[0].images[0][0].parent.parent, tmp_path / "scores.jsonl"
    write_scores(path, groups, scores, "m", data_identity(groups, [root]))
    moved = [dataclasses.replace(g, images=tuple((Path("/else") / image.relative_to(root),) for (image,) in g.images)) for g in groups]
    assert read_scores(path, moved, data_identity(moved, [Path("/else")])) == scores
