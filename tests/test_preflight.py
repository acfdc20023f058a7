"""The check before a run: what it may skip, what it keeps, how ranks share it, and what a run's data are recognised by."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_manifest

from cfvlm_ds import preflight
from cfvlm_ds.config import DataSet, RunConfig, parse_config
from cfvlm_ds.distributed import World
from cfvlm_ds.objectives import OBJECTIVES

ONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def config(model_dir: Path) -> RunConfig:
    return parse_config(["--config", "tests/train.yaml", "--model.name_or_path", str(model_dir)], OBJECTIVES)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_manifest(tmp_path / "data" / "train.jsonl", 6, seed=2, ragged=False)


def configured(config: RunConfig, run: Path, **changes: Any) -> RunConfig:
    given = {"train": config.data.train, "evaluation": {}} | changes
    return replace(config, data=replace(config.data, **given), train=replace(config.train, output_dir=str(run)))


def test_every_set_has_its_own_root_and_format(config: RunConfig, data: Path, tmp_path: Path) -> None:
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
    (lists / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    moved = shutil.copy(data, lists / "train.jsonl")
    evaluation = {"train": DataSet(str(lists / "pairs.jsonl"), str(other), "pairs"), "same": str(moved)}
    groups, splits = preflight.read_data(
        configured(config, tmp_path / "run", train=str(moved), root=[str(data.parent)], evaluation=evaluation), ONE
    )
    assert len(groups) == 6 and groups == splits["same"] and groups[0].images[0][0].parent.parent == data.parent
    assert [group.id for group in splits["train"]] == ["0", "2"] and splits["train"][0].images[0] == (other / names[0],)
