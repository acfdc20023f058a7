"""The pretrained base of the demo: a copy of it is a model, and it is as right about the world as is claimed here."""

from __future__ import annotations

from conftest import ONE, contents

from cfvlm_ds.cli.models import load_scorer
from cfvlm_ds.core.config import HabitsConfig, ModelConfig
from cfvlm_ds.data import read_manifest
from cfvlm_ds.data.decoding import MAX_PIXELS
from cfvlm_ds.demo.base import FOLDER, write_base
from cfvlm_ds.demo.habits import build_habits
from cfvlm_ds.evaluation import accuracies, score_groups

GROUPS = 28
LEAST = {
    "test_agrees": 90.0, "test_contradicts": 60.0, "test_combo": 60.0, "test_yes_no_agrees": 60.0, "test_yes_no_contradicts": 35.0,
    "test_choice": 40.0, "test_count": 25.0, "test_colour": 70.0,
}  # fmt: skip
"""Least group accuracy (%) of the base on GROUPS groups of each test set: the place for what is claimed of it."""


def test_a_copy_of_the_base_is_as_right_as_claimed(tmp_path):
    base = write_base(tmp_path / "base")
    assert contents(base) == contents(FOLDER)
    world = build_habits(HabitsConfig(str(tmp_path / "world"), num_train=1, num_test=GROUPS), lambda line: None)
    scorer, collator, _ = load_scorer(ModelConfig(str(base)), max_pixels=MAX_PIXELS)
    for split, least in LEAST.items():
        groups = read_manifest(world / f"{split}.jsonl")
        scores = score_groups(scorer, collator, groups, ONE)
        assert len(scores) == GROUPS and all(each.logp.isfinite().all() and (each.logp < 0).all() for each in scores), split
        assert accuracies(groups, scores)[-1].metrics["group"] >= least, split
