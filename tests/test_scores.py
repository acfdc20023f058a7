"""The file of stored scores: what is written is read back, and anything less than all of it is refused."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest

from cfvlm_ds.config import ModelConfig
from cfvlm_ds.data import read_manifest
from cfvlm_ds.data.scores import StoredScores, content_hash, read_scores, write_scores
from cfvlm_ds.groups import CounterfactualGroup, DataError
from cfvlm_ds.models import fingerprint


@pytest.fixture
def groups(manifests: dict[str, Path]) -> list[CounterfactualGroup]:
    return read_manifest(manifests["test"])


@pytest.fixture
def scores(groups: list[CounterfactualGroup]) -> dict[str, StoredScores]:
    draw = random.Random(0).uniform
    return {
        g.id: StoredScores(tuple(tuple(-draw(1, 60) for _ in g.candidates) for _ in g.images), tuple(-draw(1, 60) for _ in g.candidates))
        for g in groups
    }


@pytest.fixture
def path(tmp_path: Path, groups: list[CounterfactualGroup], scores: dict[str, StoredScores]) -> Path:
    write_scores(tmp_path / "scores.jsonl", groups, scores, "org/model")
    return tmp_path / "scores.jsonl"


def edit(path: Path, row: int, change) -> None:
    """Change one line's JSON object in place."""
    lines = path.read_text().splitlines()
    value = json.loads(lines[row])
    change(value)
    lines[row] = json.dumps(value)
    path.write_text("\n".join(lines) + "\n")


def test_round_trip_keeps_every_bit(path: Path, groups: list[CounterfactualGroup], scores: dict[str, StoredScores]) -> None:
    assert read_scores(path, groups) == scores
    assert [p.name for p in path.parent.iterdir()] == ["scores.jsonl"], "no partial file stays"
    header = json.loads(path.read_text().splitlines()[0])
    assert header == {"schema": "cfscores/2", "manifest": content_hash(groups), "groups": len(groups), "model": "org/model"}


def test_order_of_rows_does_not_matter(path: Path, groups: list[CounterfactualGroup], scores: dict[str, StoredScores]) -> None:
    assert read_scores(path, groups[::-1]) == scores


def test_a_missing_group_at_writing_leaves_no_file(tmp_path: Path, groups: list[CounterfactualGroup], scores) -> None:
    del scores[groups[3].id]
    with pytest.raises(KeyError):
        write_scores(tmp_path / "new.jsonl", groups, scores, "m")
    assert not (tmp_path / "new.jsonl").exists()


def test_missing_file(tmp_path: Path, groups: list[CounterfactualGroup]) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl: no such scores file; write it anew with `cfvlm-ds score`"):
        read_scores(tmp_path / "absent.jsonl", groups)


def test_cut_off_files_are_refused_wherever_the_cut_is(path: Path, groups: list[CounterfactualGroup]) -> None:
    whole = path.read_bytes()
    row = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for cut in (0, 10, whole.index(b"\n") + 1, row, row + 5, len(whole) - 30):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"scores\.jsonl.*write it anew"):
            read_scores(path, groups)


def test_one_missing_group_is_named(path: Path, groups: list[CounterfactualGroup]) -> None:
    lines = path.read_text().splitlines()
    del lines[4]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=f"no scores for group '{groups[3].id}'"):
        read_scores(path, groups)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), -1e300, None, "-3.0"])
def test_values_that_are_no_finite_numbers(path: Path, groups: list[CounterfactualGroup], value: object) -> None:
    for key in ("logp", "blank"):

        def spoil(row: dict, key: str = key) -> None:
            (row["logp"][0] if key == "logp" else row["blank"])[0] = value

        original = path.read_text()
        edit(path, 3, spoil)
        with pytest.raises(DataError, match=f"group '{groups[2].id}'.*finite"):
            read_scores(path, groups)
        path.write_text(original)


def test_a_matrix_of_another_shape(path: Path, groups: list[CounterfactualGroup]) -> None:
    edit(path, 2, lambda row: row["blank"].append(-1.0))
    with pytest.raises(DataError, match=f"group '{groups[1].id}'"):
        read_scores(path, groups)


def test_a_matrix_with_images_and_texts_swapped(tmp_path: Path, groups: list[CounterfactualGroup], scores) -> None:
    """A sham makes I != C, so a transposed matrix is not the group's though it has as many numbers."""
    group = next(g for g in groups if len(g.images) != len(g.candidates))
    scores[group.id] = dataclasses.replace(scores[group.id], logp=tuple(zip(*scores[group.id].logp, strict=True)))
    write_scores(tmp_path / "swapped.jsonl", groups, scores, "m")
    with pytest.raises(DataError, match=f"group '{group.id}'"):
        read_scores(tmp_path / "swapped.jsonl", groups)


def test_another_schema(path: Path, groups: list[CounterfactualGroup]) -> None:
    edit(path, 0, lambda header: header.update(schema="cfscores/1"))
    with pytest.raises(DataError, match="schema 'cfscores/1' is not 'cfscores/2'"):
        read_scores(path, groups)


def test_scores_of_another_manifest(path: Path, groups: list[CounterfactualGroup]) -> None:
    first = groups[0]
    texts = (dataclasses.replace(first.candidates[0], text="a purple hexagon"), *first.candidates[1:])
    prompts = (dataclasses.replace(first.candidates[0], prompt="What is this?"), *first.candidates[1:])
    images = ((first.images[0][0].with_name("other.png"),), *first.images[1:])
    for change in ({"candidates": texts}, {"candidates": prompts}, {"images": images}, {"id": "else"}):
        with pytest.raises(DataError, match="belong to another manifest"):
            read_scores(path, [dataclasses.replace(first, **change), *groups[1:]])
    with pytest.raises(DataError, match="belong to another manifest"):
        read_scores(path, groups[1:])


def test_scores_know_their_model(tmp_path: Path, groups: list[CounterfactualGroup], scores, model_dir: Path) -> None:
    """A copy of the model is the same one; other weights, tokenizer, template or bounds on visual tokens are refused by name."""
    path = tmp_path / "known.jsonl"
    write_scores(path, groups, scores, "org/model", fingerprint(ModelConfig(str(model_dir))))
    copied = shutil.copytree(model_dir, tmp_path / "copied")
    identity = fingerprint(ModelConfig(str(copied)))
    assert read_scores(path, groups, identity) == scores
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(DataError, match="made by org/model with other weights than this run's model; write it anew"):
        read_scores(path, groups, fingerprint(ModelConfig(str(copied))))
    shutil.copy(model_dir / "model.safetensors", weights)
    assert fingerprint(ModelConfig(str(copied))) == identity
    assert fingerprint(ModelConfig(str(copied), max_tiles=2)) != identity
    template = next(path for path in copied.glob("*.jinja"))
    template.write_text(template.read_text().replace("USER", "HUMAN"))
    with pytest.raises(DataError, match="with another tokenizer, processor or chat template than"):
        read_scores(path, groups, fingerprint(ModelConfig(str(copied))))


def test_a_moved_folder_is_the_same_manifest(path: Path, groups: list[CounterfactualGroup], scores) -> None:
    moved = [dataclasses.replace(g, images=tuple((Path("/elsewhere") / image.name,) for (image,) in g.images)) for g in groups]
    assert read_scores(path, moved) == scores
