"""The pretrained base of the demo, fine-tuned for sixty steps: the objectives teach it what stands where sooner than plain NLL does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import run

from cfvlm_ds.core.config import ScenesConfig
from cfvlm_ds.data.cfgroup import to_row
from cfvlm_ds.demo.base import write_base
from cfvlm_ds.demo.scenes.build import as_group, draw_group
from cfvlm_ds.demo.scenes.edits import EDITS
from cfvlm_ds.demo.scenes.render import render

STEPS, BATCH, TESTED = 60, 12, 200
NLL = ("--objective.align.counterfactual=1", "--objective.csd.weight=0", "--objective.fcd.weight=0")


def manifest(folder: Path, split: str, indices: range) -> Path:
    """Groups of relation edits of a split, with their pictures."""
    config = ScenesConfig(str(folder), edit_weights={"relation": 1.0})
    lines = []
    for index in indices:
        drawn = draw_group(config, split, index)
        pictures = tuple(folder / f"{split}-{index}-{number}.png" for number in range(len(drawn.pictured)))
        for scene, path in zip(drawn.pictured, pictures, strict=True):
            render(scene, config.image_size).save(path)
        group = as_group(drawn, f"{split}-{index}", pictures)
        assert [edit.type for edit in group.edits[:1]] == ["relation"]
        lines.append(json.dumps(to_row(group, folder)))
    path = folder / f"{split}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("relations")
    write_base(folder / "base")
    manifest(folder, "train", range(STEPS * BATCH))
    first = list(EDITS).index("relation")
    manifest(folder, "test_combo", range(first, first + TESTED * len(EDITS), len(EDITS)))
    return folder


def group_accuracy(data: Path, seed: int, *objective: str) -> float:
    """On relations of held-out combinations, in %, after the training."""
    out = data / f"run-{seed}-{len(objective)}"
    command = [sys.executable, "train.py", "--deepspeed", "ds_configs/z3.json", *objective]
    command += [
        f"--model.name_or_path={data / 'base'}",
        f"--data.train={data / 'train.jsonl'}",
        f"--data.evaluation.combo={data / 'test_combo.jsonl'}",
    ]
    command += [
        f"--train.output_dir={out}",
        f"--train.seed={seed}",
        f"--train.max_steps={STEPS}",
        f"--train.per_device_train_batch_size={BATCH}",
    ]
    command += [
        "--train.learning_rate=1e-3",
        "--train.adam_beta2=0.99",
        "--train.warmup_ratio=0.1",
        "--train.export=false",
        "--train.figures=false",
    ]
    command += ["--train.eval_shuffled=false", "--tracking.enabled=false", "--data.num_workers=0", "--train.save_steps=0"]
    run(command)
    (row,) = (row for row in json.loads((out / "results.json").read_text())["combo"] if row["name"] == "relation")
    assert row["num"] == TESTED
    return float(row["metrics"]["group"])


@pytest.mark.long
def test_the_objectives_teach_relations_sooner_than_nll(data):
    """Seeds 0, 1 and 2 ended at 81.0, 84.0 and 79.5 with the default objective, at 58.5, 62.5 and 62.0 with plain NLL; the base has 63."""
    assert group_accuracy(data, 0) > group_accuracy(data, 0, *NLL) + 10
