"""The check before a run: what it may skip, what it keeps, how ranks wait for it, and what a run's data are recognised by."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ONE, read_json, read_rows, run_ranks, run_train, train_arguments, write_json, write_manifest, write_rows
from PIL import Image

from cfvlm_ds import engine
from cfvlm_ds.batching.collator import load_collator
from cfvlm_ds.cli import train as commands
from cfvlm_ds.cli.exits import exit_cleanly, leave_at_once
from cfvlm_ds.cli.main import main as cli_main
from cfvlm_ds.cluster import signals
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.data_config import EvaluationSet
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.parsing import parse_config
from cfvlm_ds.data import check, read_manifest
from cfvlm_ds.data.identity import changes, data_identity
from cfvlm_ds.data.picture_index import PictureTable
from cfvlm_ds.objectives import OBJECTIVES, required_cells
from cfvlm_ds.training import read_data as preflight
from cfvlm_ds.training import run as training_run
from cfvlm_ds.training import run_start, token_counts
from cfvlm_ds.training.token_counts import group_tokens


@pytest.fixture(scope="module")
def config(model_dir):
    return parse_config(["--config", "tests/support/train.yaml", f"--model.name_or_path={model_dir}"], OBJECTIVES)


@pytest.fixture
def data(tmp_path):
    return write_manifest(tmp_path / "data" / "train.jsonl", 6, seed=2, ragged=False)


def configured(config: RunConfig, run: Path, **changes: Any) -> RunConfig:
    given = {"train": config.data.train, "evaluation": {}} | changes
    return replace(config, data=replace(config.data, **given), train=replace(config.train, output_dir=str(run)))


@pytest.fixture
def own(config, data, tmp_path):
    """A run on the data alone."""
    return configured(config, tmp_path / "run", train=str(data))


def test_every_set_has_its_own_root_and_format(config, data, tmp_path):
    """Training groups under one folder, pairs under another; an evaluation set may be named train."""
    other = tmp_path / "other"
    shutil.copytree(data.parent / "images", other / "pictures")
    names = [f"pictures/train-{k}-{n}.png" for k in range(2) for n in range(2)]
    pairs = [
        {"image_0": names[k], "image_1": names[k + 1], "caption_0": "a red circle", "caption_1": "a blue square", "id": str(k)}
        for k in (0, 2)
    ]
    lists = tmp_path / "lists"
    lists.mkdir()
    write_rows(lists / "pairs.jsonl", pairs)
    moved = shutil.copy(data, lists / "train.jsonl")
    evaluation = {"train": EvaluationSet(str(lists / "pairs.jsonl"), str(other), "pairs"), "same": str(moved)}
    read = preflight.read_data(configured(config, tmp_path / "run", train=str(moved), root=[str(data.parent)], evaluation=evaluation), ONE)
    groups, splits = read.groups, read.splits
    assert len(groups) == 6 and list(groups) == list(splits["same"]) and groups[0].images[0][0].parent.parent == data.parent
    assert [group.id for group in splits["train"]] == ["0", "2"] and splits["train"][0].images[0] == (other / names[0],)


@pytest.fixture
def opened(monkeypatch):
    """Names of the pictures that the check opens."""
    names = []
    right = check.open_image

    def recorded(path, max_pixels):
        names.append(path.name)
        return right(path, max_pixels)

    monkeypatch.setattr(check, "open_image", recorded)
    return names


def test_what_was_checked_is_checked_again_under_other_options_only(config, data, tmp_path, opened):
    """A root, a format or a limit that has changed, and a manifest that was written, are looked at; pictures that have not been are not."""
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(data.parent, other)

    def read(**changes):
        opened.clear()
        return preflight.read_data(configured(config, run, **{"train": str(data), **changes}), ONE)

    first = read()
    assert len(opened) == 12 == len(set(opened))
    assert read().identity == first.identity and not opened
    with pytest.raises(DataError, match=r"48x48 .*11 more"):
        read(max_pixels=2000)
    assert read().identity == first.identity and len(opened) == 12
    with pytest.raises(DataError, match="no row has the column 'caption_0'"):
        read(format="pairs")
    assert read(root=str(other)).groups[0].images[0][0].is_relative_to(other) and len(opened) == 12
    data.write_text(data.read_text())
    assert read().identity == first.identity and not opened
    Image.new("RGB", (48, 48), "white").save(picture := first.groups[2].images[1][0])
    assert read().identity == first.identity and not opened, "the manifest alone is looked at; the picture is, when it is opened"
    data.write_text(data.read_text())
    assert changes(first.identity, read().identity) == "contents of pictures" and opened == [picture.name]
    shutil.rmtree(run / "prepared")
    assert read().pictures is not None and len(opened) == 12
    for record in (run / "prepared").glob("*/store.json"):
        record.write_text('{"a": ')
    assert not read(check="rows").pictures and not opened


def test_what_is_written_while_it_is_checked_is_looked_at_again(own, config, data, tmp_path, monkeypatch):
    """A manifest that changes after it was read, or under its old time, is another one; what was read is what a run is recognised by."""
    before, text, unchanged = data.stat(), data.read_text(), read_manifest(data)
    flipped = text.replace('["i0", "t1", 0]', '["i0", "t1", 1]', 1)
    assert flipped != text
    ticks = []

    def write():
        ticks.append(1)
        if len(ticks) == 6:  # between two rows
            data.write_text(flipped)

    first = preflight.read_data(configured(config, tmp_path / "first", train=str(data)), ONE)
    with monkeypatch.context() as patched, pytest.raises(DataError, match="modified while it was being checked"):
        patched.setattr(preflight.ProgressBarrier, "alive", lambda barrier: write())
        preflight.read_data(own, ONE)
    assert data.read_text() == flipped
    assert list(first.groups) == unchanged, "a run reads what it has prepared"
    second = preflight.read_data(own, ONE)
    assert changes(first.identity, second.identity) == "labels (match)" and list(second.groups) == read_manifest(data)
    data.write_text(text)
    os.utime(data, ns=(before.st_atime_ns, data.stat().st_mtime_ns))
    third = preflight.read_data(own, ONE)
    assert changes(second.identity, third.identity) == "labels (match)"


def test_a_large_manifest_is_prepared_before_the_run(config, data, tmp_path, opened):
    """The sentence names a command that makes a store of what the run would have read; a run's own preparation is another way."""
    run = configured(config, tmp_path / "run", train=str(data))
    with pytest.raises(DataError, match="has 6 groups, but a run itself prepares at most 5 of a data set; run `cfvlm-ds") as refused:
        preflight.read_data(run, ONE, most_rows=5)
    assert not opened
    cli_main(shlex.split(str(refused.value).split("`")[1])[1:])
    stored = preflight.read_data(configured(run, tmp_path / "run", train=f"{data}.store"), ONE, most_rows=5)
    assert len(opened) == 12 and list(stored.groups) == read_manifest(data)
    again = preflight.read_data(run, ONE)
    assert again.identity == stored.identity and len(opened) == 24
    preflight.read_data(run, ONE, most_rows=5)
    assert len(opened) == 24, "what is prepared is taken, whatever its size"


def test_a_run_is_prepared_before_it_has_its_gpus(data, model_dir, tmp_path, opened, monkeypatch):
    """By its configuration alone: the start opens, measures and counts nothing."""
    named = {"model": {"name_or_path": str(model_dir)}, "data": {"train": str(data), "max_tokens_per_micro_batch": 4000}}
    write_json(tmp_path / "run.yaml", {**named, "train": {"output_dir": str(tmp_path / "run"), "bf16": False}})
    cli_main(["data", "prepare", "--config", str(tmp_path / "run.yaml")])
    assert len(opened) == 12
    for module, name in ((check, "open_image"), (preflight, "check_texts"), (token_counts, "Scan")):
        monkeypatch.setattr(module, name, pytest.fail)
    run = parse_config(["--config", str(tmp_path / "run.yaml")], OBJECTIVES)
    read = preflight.read_data(run, ONE)
    collator = load_collator(run.model).of_run(required_cells(run.objective), None, read.pictures)
    assert len(training_run._tokens(run, ONE, read, collator)) == 6


def test_a_model_that_a_run_would_build_is_there_when_its_data_are_prepared(data, tmp_path):
    base = str(tmp_path / "base")
    named = {"build": {"base": base}, "model": {"name_or_path": base}, "data": {"train": str(data), "max_tokens_per_micro_batch": 4000}}
    write_json(tmp_path / "run.yaml", {**named, "train": {"output_dir": str(tmp_path / "run")}})
    cli_main(["data", "prepare", "--config", str(tmp_path / "run.yaml")])
    assert (tmp_path / "base" / "config.json").is_file() and (tmp_path / "run" / "prepared").is_dir()


def test_a_store_of_another_schema_or_half_of_one_is_made_again(config, data, tmp_path, opened):
    """In the run folder; a store of the user's own is refused, for nobody knows what it was made of."""
    run = configured(config, tmp_path / "run", train=str(data))
    first = preflight.read_data(run, ONE)
    (store,) = (each.parent for each in (tmp_path / "run" / "prepared").glob("*/store.json"))
    own = configured(config, tmp_path / "own", train=str(shutil.copytree(store, tmp_path / "copied")))
    for folder, damage in itertools.product((store, tmp_path / "copied"), ("schema", "half")):
        record = (folder / "store.json").read_text()
        if damage == "schema":
            (folder / "store.json").write_text(record.replace("cfstore/", "cfstore/x"))
        else:
            os.truncate(folder / "groups-00000.jsonl", 100)
        if folder == store:
            assert preflight.read_data(run, ONE).identity == first.identity
        else:
            with pytest.raises(DataError, match=str(folder)):
                preflight.read_data(own, ONE)


def test_another_template_or_tokenizer_in_the_same_folder_is_tried_again(own, config, model_dir, tmp_path):
    model = shutil.copytree(model_dir, tmp_path / "model")
    run = replace(own, model=replace(config.model, name_or_path=str(model)))
    preflight.read_data(run, ONE)
    tokenizer = read_json(model / "tokenizer.json")
    red = next(token for token in tokenizer["added_tokens"] if token["content"] == "</s>")
    tokenizer["added_tokens"].append({**red, "id": len(tokenizer["model"]["vocab"]), "content": "red"})
    write_json(model / "tokenizer.json", tokenizer)
    with pytest.raises(DataError, match="contains the control token 'red'"):
        preflight.read_data(run, ONE)


def test_what_cannot_be_divided_is_refused_for_a_forward_and_nothing_else(config, data):
    """An image's texts are divided between forwards; one text with its prompt and image is not."""
    groups, collator = list(read_manifest(data)), load_collator(config.model)
    text = groups[3].candidates[1]
    groups[3] = replace(groups[3], candidates=(groups[3].candidates[0], replace(text, text=f"{text.text} and a red circle")))
    batches = collator.parts(groups, max_tokens=1)
    least, whole = max(batch.num_tokens for batch in batches), max(part.num_tokens for group in groups for part in collator.parts([group]))
    assert least < whole

    def tokens(limit):
        return group_tokens(groups, collator, replace(config.data, max_tokens_per_forward=limit), ONE)

    assert max(tokens(least)) == whole and all(part.num_tokens <= least for part in collator.parts(groups, least))
    with pytest.raises(DataError, match=f"group '{groups[3].id}' has {least} tokens .*data.max_tokens_per_forward is {least - 1}"):
        tokens(least - 1)


def test_a_check_that_is_killed_goes_on(own, tmp_path, opened, monkeypatch):
    """What it has seen is kept, to the last whole record; it leaves when it is asked to, between two pictures."""
    monkeypatch.setattr(check, "_AHEAD", 2)

    def leave():
        if len(opened) >= 7:
            raise SystemExit(85)

    with pytest.raises(SystemExit), monkeypatch.context() as patched:
        patched.setattr(preflight.ProgressBarrier, "alive", lambda barrier: leave())
        preflight.read_data(own, ONE)
    (found,) = (tmp_path / "run" / "prepared").glob("*/parts/images-00000.npy")
    kept = len(np.load(found))
    assert 4 <= kept < 12
    seen = opened.copy()
    opened.clear()
    read = preflight.read_data(own, ONE)
    assert len(opened) == 12 - kept and set(seen) | set(opened) == {picture.name for group in read.groups for (picture,) in group.images}
    assert read.pictures is not None and len(read.pictures) == 12
    for group in read.groups:
        for (picture,) in group.images:
            found, stat = read.pictures.find(picture), picture.stat()
            assert found == (stat.st_size, stat.st_ctime_ns, hashlib.blake2b(picture.read_bytes(), digest_size=16).digest(), 48, 48)


def test_a_picture_is_held_against_the_check_when_it_is_opened(own, config):
    """Written again with the same bytes it passes; with others, of the same size too, it is refused by name."""
    read = preflight.read_data(own, ONE)
    collator = load_collator(config.model, checked=read.pictures)
    (picture,) = read.groups[1].images[1]
    before = picture.read_bytes()
    picture.write_bytes(before)
    os.utime(picture, ns=(1, 1))
    whole = collator(read.groups)
    assert collator([read.groups[1]]).num_images == 2
    picture.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    for refused in (lambda: collator(read.groups), lambda: collator.files.content((picture, False))):
        with pytest.raises(DataError, match=f"{picture}: .*changed"):
            refused()
    (kept, dropped) = collator.readable(read.groups)
    assert [name for name, _ in dropped] == [read.groups[1].id] and len(kept) == 5
    shutil.copy(read.groups[0].images[0][0], picture)
    with pytest.raises(DataError, match="changed since"):
        collator(read.groups)
    picture.write_bytes(before)
    assert torch.equal(collator(read.groups).model_inputs["input_ids"], whole.model_inputs["input_ids"])


def relabelled(group: CounterfactualGroup) -> CounterfactualGroup:
    return replace(group, match=((1, 1), *group.match[1:]))


CHANGES = {
    "nothing": (list, None),
    "label": (lambda groups: [relabelled(groups[0]), *groups[1:]], "labels (match)"),
    "prompt": (
        lambda groups: [replace(groups[0], candidates=tuple(replace(c, prompt="Which?") for c in groups[0].candidates)), *groups[1:]],
        "prompts or texts",
    ),
    "text": (lambda groups: [replace(groups[0], candidates=groups[1].candidates), *groups[1:]], "prompts or texts"),
    "images exchanged": (lambda groups: [replace(groups[0], images=groups[0].images[::-1]), *groups[1:]], "PICTURES"),
    "other row": (lambda groups: [replace(groups[0], id="new"), *groups[1:]], "the groups (different ids)"),
    "order": (lambda groups: groups[::-1], "the order of the rows"),
    "a row less": (lambda groups: groups[1:], "the number of rows (5, was 6)"),
    "two": (lambda groups: [relabelled(replace(groups[0], weight=2.0)), *groups[1:]], "labels (match) and weights"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_named(change, data, tmp_path):
    """By paths where contents are not known, and by contents where they are; a copy in another folder is the same either way."""
    groups = read_manifest(data)
    shutil.copytree(data.parent, tmp_path / "copied")
    copied = read_manifest(tmp_path / "copied" / data.name)
    changed, what = CHANGES[change][0](copied), CHANGES[change][1]

    def of(some, root, contents):
        files = [picture for group in some for image in group.images for picture in image]
        return data_identity(some, [root], PictureTable.of_files(files) if contents else None)

    for contents, pictures in ((False, "image paths"), (True, "contents of pictures")):
        expected = pictures if what == "PICTURES" else what
        assert changes(of(groups, data.parent, contents), of(changed, tmp_path / "copied", contents)) == expected


def build_late(config: Any, alive: Callable[[], object]) -> None:
    """As long as two collectives may take."""
    for _ in range(60):
        time.sleep(0.1)
        alive()


def read_late(manifest: str, model: str, run: str, bad: str) -> None:
    """A rank whose collectives end after three seconds reads the data, and takes five for the pictures if it is the first. The other one
    then sees neither the token counts nor, because its folder is another one, the run.
    """
    world = engine.start()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=3), dist.group.WORLD)
    config = parse_config(
        ["--config", "tests/support/train.yaml", "--model.name_or_path", model, "--data.max_tokens_per_micro_batch=4000"], OBJECTIVES
    )
    right, opened = check.open_image, []

    def slow(path, max_pixels):
        opened.append(path.name)
        time.sleep(5 / 18 if world.rank == 0 else 0)
        return right(path, max_pixels)

    check.open_image = slow  # type: ignore[assignment]
    read = preflight.read_data(configured(config, Path(run), train=manifest, num_workers=0), world)
    if not world.is_main:  # a node that does not see what the first has written
        token_counts._mapped = lambda file, count: None  # type: ignore[assignment]
    kept = {"folders": [Path(run) / "counts"], "depends_on": lambda: dict(read.identity)}
    tokens = group_tokens(read.groups, load_collator(config.model), config.data, world, read.pictures, **kept)
    print(json.dumps({"opened": opened, "identity": dict(read.identity), "tokens": tokens.tolist(), "known": len(read.pictures or [])}))
    commands.build = build_late
    commands.build_once(config.build, world)
    run_start.option_changes.model_hashes = lambda name, alive, say: print("hashed") or {"weights": "w", "inputs": "i"}  # type: ignore[func-returns-value]
    record = run_start.Start(None, [], {"model": None, "steps": 1}, 1, {}).complete_record(config, world)
    assert record == {"model": {"weights": "w", "inputs": "i"}, "steps": 1}
    for wrong in (bad, bad):
        try:
            preflight.read_data(configured(config, Path(run), train=wrong), world)
        except DataError as error:
            print("refused", error)
    os.chdir(Path(run).parent if world.is_main else "/")
    try:
        preflight.read_data(configured(config, Path(Path(run).name), train=manifest, num_workers=0), world)
    except DataError as error:
        print("unseen", error)


def test_ranks_wait_for_a_check_that_takes_longer_than_a_collective_may(config, data, model_dir, tmp_path):
    """The first opens every picture, both know everything afterwards; what is wrong is said by both."""
    train = write_manifest(tmp_path / "data" / "long.jsonl", 18, seed=4, ragged=False)
    rows = read_rows(train)
    for row, name in ((rows[3], "none"), (rows[4], "nothing"), (rows[5], "naught")):
        row["images"][1]["path"] = f"images/{name}.png"
    write_rows(tmp_path / "data" / "bad.jsonl", rows)
    ended = run_ranks(
        2, "test_preflight:read_late", str(train), str(model_dir), str(tmp_path / "run"), str(tmp_path / "data" / "bad.jsonl"), timeout=120,
    )  # fmt: skip
    assert [code for code, _ in ended] == [0, 0], ended
    said = [json.loads(next(line for line in output.splitlines() if line.startswith("{"))) for _, output in ended]
    alone = preflight.read_data(configured(config, tmp_path / "alone", train=str(train)), ONE)
    tokens = group_tokens(alone.groups, load_collator(config.model), config.data, ONE, alone.pictures)
    for rank in said:
        assert rank["identity"] == alone.identity and rank["known"] == 36 and rank["tokens"] == tokens.tolist()
    assert ["hashed" in output.splitlines() for _, output in ended] == [True, False], "a model is read by one rank"
    first, second = (rank["opened"] for rank in said)
    assert len(first) == len(set(first)) == 36 and not second
    for _, output in ended:
        refused = [line for line in output.splitlines() if line.startswith("refused")]
        assert len(refused) == 2 and all("no such image file" in line and "(2 more: see" in line for line in refused), output
        (unseen,) = [line for line in output.splitlines() if line.startswith("unseen")]
        assert unseen.endswith("; every node must have access to run"), output


# --- what all ranks know is said by one of them ---------------------------------------------------------------------------------------


def found_by_one() -> None:
    """Rank 1 alone finds something wrong, while rank 0 waits for it in a collective; a launcher's TERM comes before rank 1 has said so."""
    world = engine.start()
    signals.install()
    if world.rank == 0:
        try:
            world.wait()
        except RuntimeError:
            os._exit(0)

    def found():
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        raise DataError("only rank 1 sees this; look")

    leave_at_once(lambda: exit_cleanly(found))


def errors_of(said: list[str]) -> list[list[str]]:
    return [[line for line in output.splitlines() if line.startswith("error: ")] for output in said]


def test_a_refusal_is_said_by_one_of_several_ranks(model_dir, tmp_path):
    """Before ranks meet, where none hears of another, and after it; by rank 0, whose log is the one that is looked at."""
    missing = train_arguments(model_dir, {"train": tmp_path / "none.jsonl"}, tmp_path / "run")
    for options, sentence in (
        (["--train.learning_rat=1"], "did you mean"),
        (missing, "none.jsonl: no such manifest; correct the path"),
    ):
        ((first,), others) = errors_of(run_train(2, options, code=2))
        assert sentence in first and not others


def test_a_failure_that_one_rank_alone_knows_is_said():
    ended = run_ranks(2, "test_preflight:found_by_one", timeout=120)
    assert ended[1][0] == 2 and errors_of([output for _, output in ended]) == [[], ["error: only rank 1 sees this; look"]], ended
