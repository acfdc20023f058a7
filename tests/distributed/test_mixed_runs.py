"""Runs on a mixture: one trajectory on any number of ranks, resumed at the same draw, and what is said of its sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import losses, metrics, read_json, read_rows, run_plans, train_arguments, write_manifest, write_rows

from cfvlm_ds.data import read_manifest
from cfvlm_ds.data.cfgroup import to_row
from cfvlm_ds.data.mixture import Order, shares_of

Trained = tuple[Path, dict[str, str]]


@pytest.fixture(scope="module")
def trained(model_dir, manifests, tmp_path_factory):
    """Four steps of eight groups from three sources, on two ranks and on one, and stopped on two and continued on one."""
    folder = tmp_path_factory.mktemp("mixture")
    plain = folder / "chat.jsonl"
    rows = [to_row(group, folder) for group in read_manifest(write_manifest(folder / "pairs.jsonl", 20, seed=5))]
    for row in rows:  # a picture and its caption, as instruction data have them
        kept = {"images": row["images"][:1], "texts": row["texts"][:1], "match": row["match"][:1], "edits": []}
        row |= kept | {"id": row["id"].replace("pairs", "chat")}
    write_rows(plain, rows)
    few = write_rows(folder / "few.jsonl", read_rows(manifests["test"])[:3])
    sources: list[dict[str, Any]] = [
        {"path": str(manifests["train"]), "weight": 4, "limit": 30},
        {"path": str(plain), "weight": 3, "objectives": ["align"]},
        {"path": str(few), "weight": 1, "root": [str(manifests["test"].parent)]},
    ]
    evaluation = ["--data.evaluation", json.dumps({"half": str(manifests["train"])})]

    def arguments(name: str, groups: int, *extra: str, changed: dict[int, dict[str, Any]] | None = None) -> list[str]:
        listed = json.dumps([source | (changed or {}).get(place, {}) for place, source in enumerate(sources)])
        steps = ["--train.max_steps=4", "--train.save_steps=1", "--train.save_total_limit=0"]
        size = [f"--train.per_device_train_batch_size={groups}", "--data.train", listed]
        return train_arguments(model_dir, manifests, folder / name, *steps, *size, *extra)

    said: dict[str, str] = {}

    def run(ranks: int, plans: dict[str, tuple[list[Any], list[str]]]) -> None:
        said.update(zip(plans, run_plans(ranks, plans.values()), strict=True))

    run(2, {"two": (["nothing"], arguments("two", 4, *evaluation)), "broken": (["stopped", 2], arguments("broken", 4))})
    without = {
        0: {"path": str(plain), "name": "a"},
        2: {"path": str(plain), "name": "b", "objectives": ["align"], "root": str(folder)},
    }
    masked = {k: {"objectives": ["align", "csd"]} for k in (0, 2)}
    refused = ["unchanged", str(folder / "broken"), False]
    alone = ["--objective.csd.weight=0", "--objective.fcd.weight=0"]
    run(1, {
        "share": (refused, arguments("broken", 8, changed={0: {"weight": 5}})),
        "objectives": (refused, arguments("broken", 8, changed={1: {"objectives": ["align", "csd"]}})),
        "name": (refused, arguments("broken", 8, changed={1: {"name": "talk"}})),
        "one": (["nothing"], arguments("one", 8)),
        "resumed": (["nothing"], arguments("broken", 8)),
        "idle": (["nothing"], arguments("idle", 4, "--train.max_steps=1", changed=without)),
        "masked": (["nothing"], arguments("masked", 4, "--train.max_steps=1", changed=masked)),
        "meant": (["nothing"], arguments("meant", 4, "--train.max_steps=1", *alone, changed=without)),
    })  # fmt: skip
    return folder, said


def test_one_trajectory_on_any_number_of_ranks(trained):
    folder, _ = trained
    assert len(losses(folder / "one")) == 4
    assert losses(folder / "two") == pytest.approx(losses(folder / "one"), rel=1e-5)
    assert losses(folder / "broken") == pytest.approx(losses(folder / "one"), rel=1e-5)


def test_sources_are_seen_by_their_shares(trained):
    """Passes over each source after every step, by counting the order of the whole stream from its start."""
    folder, _ = trained
    sizes = (30, 20, 3)
    drawn = Order(sizes, shares_of([4, 3, 1], sizes), 0).at(0, 32)
    ends = (0, 30, 50, 53)
    rows = [row for row in metrics(folder / "one") if "loss" in row]
    for step, row in enumerate(rows, 1):
        for source, name in enumerate(("train", "chat", "few")):
            seen = sum(ends[source] <= group < ends[source + 1] for group in drawn[: 8 * step])
            assert row[f"epoch/{name}"] == pytest.approx(seen / sizes[source])
    assert sum(group < 30 for group in drawn) == 16 and len(set(drawn[:16]) & set(range(50, 53))) == 2


def test_each_source_has_its_own_losses(trained):
    for row in (row for row in metrics(trained[0] / "two") if "loss" in row):
        assert row.keys() >= {"loss/align/train", "loss/align/chat", "loss/csd/train"}
        assert not {"loss/csd/chat", "loss/fcd/chat"} & row.keys()


def test_a_changed_mixture_is_refused(trained):
    for name, word in (("share", "'5/9'"), ("objectives", "the mixture"), ("name", "the mixture")):
        assert word in trained[1][name]


def test_what_is_shared_is_named_and_a_term_without_work_refused(trained, manifests):
    """The evaluation set is the training file, of which thirty rows are trained on; three sources without a negative."""
    folder, said = trained
    groups = read_manifest(manifests["train"])
    rows = [(sorted(each.text for each in group.candidates), sorted(image[0].read_bytes() for image in group.images)) for group in groups]
    pictures = [image[0].read_bytes() for group in groups for image in group.images]
    trained_on = {image[0].read_bytes() for group in groups[:30] for image in group.images}
    there, which = sum(row in rows[:30] for k, row in enumerate(rows) if row not in rows[:k]), len({str(row) for row in rows})
    counts = f"{there} of its {which} rows and {len(trained_on)} of its {len(set(pictures))} pictures"
    whole = f"warning: data.evaluation.half: {counts} also occur in the training set {manifests['train']}"
    assert len({line for line in said["two"].splitlines() if line.startswith(whole)}) == 1, "at the start, and with the results"
    described = {each["name"]: each["overlaps"] for each in read_json(folder / "two" / "data.json")}
    assert described.pop("half")[str(manifests["train"])] == counts and not any(described.values())
    refusal = "rank 0 raised ConfigError: no training group used by"
    assert f"{refusal} csd, fcd " in said["idle"]
    assert f"{refusal} fcd " in said["masked"], "for the source that has some does not count in it"
    assert "nothing to compare" not in said["two"] + said["meant"]
    assert losses(folder / "meant") and not any((folder / name / "metrics.jsonl").exists() for name in ("idle", "masked"))
