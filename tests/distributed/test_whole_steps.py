"""What depends on the whole optimizer step, or on the model at that step, in real runs: in-batch alignment, hard negatives, and scores of
tokens and of the blank picture."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ONE, assert_same_trajectory, losses, metrics, run_trainings, selected, train_arguments

from cfvlm_ds.batching.collator import load_collator
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.parsing import parse_config
from cfvlm_ds.data import GroupSampler, open_groups, read_manifest
from cfvlm_ds.data.identity import data_identity
from cfvlm_ds.data.stored_scores import StoredScores, read_scores, write_scores
from cfvlm_ds.models import Scorer, family_of, fingerprint, load_model
from cfvlm_ds.objectives import OBJECTIVES, BatchAlign, denominators, weighted_loss
from cfvlm_ds.training.in_batch_negatives import CrossRankScores, WholeSteps, WithNegatives

GLOBAL_BATCH = 16
FORWARD = 300  # tokens: an image with its texts and those of others is divided
LONG = ((1, 2), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (4, 4), (1, 4), (1, 2, FORWARD))
LAYOUTS = [
    pytest.param(layout, marks=pytest.mark.long if layout in LONG else ())
    for layout in ((1, 2), (1, 4), (1, 2, FORWARD), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (4, 4), (2, 2, FORWARD))
]
"""Ranks, accumulation steps and, where it is bounded, tokens of a forward."""
HARD = ["--train.hard_negatives=1", "--train.max_steps=3", "--objective.csd.warmup=0", "--objective.fcd.warmup=0"]
DISTILLED = ["--objective.contrast_distill.weight=0.5", "--objective.sham.weight=0.5", *HARD]
SPREAD = ["--train.per_device_train_batch_size=4", "--train.gradient_accumulation_steps=2", "--data.max_tokens_per_forward=120"]


def write_priors(path: Path, model_dir: Path, manifest: Path) -> Path:
    """A scores file whose scores of a blank image differ from text to text."""
    groups, rng = open_groups(str(manifest)), random.Random(0)
    stored = {
        group.id: StoredScores(
            tuple(tuple(-9.0 for _ in group.candidates) for _ in group.images), tuple(rng.uniform(-30, -20) for _ in group.candidates)
        )
        for group in groups
    }
    made_by = fingerprint(ModelConfig(str(model_dir)))
    write_scores(path, groups, stored, "m", data_identity(groups, groups.roots), made_by=made_by)
    return path


@pytest.fixture(scope="module")
def trajectories(model_dir, manifests, tmp_path_factory, request):
    """Layout -> run folder, three steps of 16 groups, with scores of a blank image that are as good as any; beside it "hard-1" and
    "hard-2", of hard negatives on as many ranks, and "distilled-1" and "distilled-2", with divergences."""
    folder = tmp_path_factory.mktemp("batch")
    scores = write_priors(folder / "scores.jsonl", model_dir, manifests["train"])
    layouts = list(dict.fromkeys([(1, 1), (2, 2, FORWARD), *selected(request, "layout")]))
    folders = {layout: folder / "x".join(map(str, layout)) for layout in layouts}
    for ranks in sorted({layout[0] for layout in layouts}):
        trainings = []
        for layout in (layout for layout in layouts if layout[0] == ranks):
            _, steps, *limit = layout
            extra = [f"--train.per_device_train_batch_size={GLOBAL_BATCH // (ranks * steps)}", "--train.max_steps=3"]
            extra += [f"--train.gradient_accumulation_steps={steps}", f"--data.scores={scores}"]
            extra += [part for tokens in limit for part in ("--data.max_tokens_per_forward", str(tokens))]
            extra += ["--objective.batch_align.weight=0.5", "--objective.batch_align.texts=4", "--objective.batch_align.warmup=0"]
            extra += ["--objective.svco.weight=0.5", "--objective.csd.token_credit=true", f"--data.num_workers={int(steps == 2)}"]
            trainings.append(train_arguments(model_dir, manifests, folders[layout], *extra))
        spread = [] if ranks == 1 else SPREAD
        if ranks < 4:
            trainings.append(train_arguments(model_dir, manifests, folder / f"hard-{ranks}", *HARD, *spread))
            trainings.append(train_arguments(model_dir, manifests, folder / f"distilled-{ranks}", *DISTILLED, *spread[:2]))
        run_trainings(ranks, *trainings)
    return folders


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_and_accumulation_give_one_trajectory(layout, trajectories):
    """Which texts meet which images, and what each costs: fp32, relative 2e-4. Data workers where there are two steps."""
    expected = metrics(trajectories[1, 1])
    assert len(losses(trajectories[1, 1])) == 3
    assert all(row["loss/batch_align"] > 0.3 and 3 < row["batch_align/texts"] <= 4 for row in expected if "loss" in row)
    assert 0 < expected[0]["violated/batch_align"] < 1 and expected[0]["loss/svco"] > 0 and expected[0]["credit/csd"] != 1
    assert_same_trajectory(trajectories[1, 1], trajectories[layout], "violated/", "batch_align/", "credit/", "svco/")


def test_the_first_loss_is_that_of_the_whole_step_at_once(trajectories, model_dir, manifests):
    """All 16 groups in one row, outside of a run: what each text scores on images of other groups counts."""
    groups = open_groups(str(manifests["train"]))
    stored = read_scores(trajectories[1, 1].parent / "scores.jsonl", groups, data_identity(groups, groups.roots))
    model = load_model(config := ModelConfig(str(model_dir), attn_implementation="sdpa"), torch.float32)
    place: dict[str, Any] = {"gradient_accumulation_steps": 1, "rank": 0, "world_size": 1, "seed": 0}
    sampler = GroupSampler(num_groups=len(groups), groups_per_micro_batch=GLOBAL_BATCH, **place)
    step = WithNegatives(groups, {"batch_align": 4}, 0).__getitems__(next(iter(WholeSteps(sampler))))
    batch = load_collator(config).building("star", stored)(step)
    with torch.no_grad():
        scores = batch.scores(Scorer(model, family_of(model.config)).eval()(**batch.model_inputs))
    objective = {"batch_align": BatchAlign(texts=4)}
    below = denominators(objective, batch.layout)
    shares = [
        weighted_loss(objective, each, below)[1]["batch_align"].sum().item()
        for each in (scores, CrossRankScores([scores], ONE).added_to(scores))
    ]
    assert metrics(trajectories[1, 1])[0]["loss/batch_align"] == pytest.approx(shares[1], rel=1e-4) and shares[1] > shares[0] + 0.1


def test_hard_negatives_give_one_trajectory(trajectories):
    """Two ranks with unequally many forwards in two micro-batches each; fp32, relative 2e-4."""
    one, two = (trajectories[1, 1].parent / f"hard-{ranks}" for ranks in (1, 2))
    assert len(losses(one)) == 3
    assert all(0 < row["hard_negatives/entered"] < row["hard_negatives/proposed"] for row in metrics(one) if "loss" in row)
    assert_same_trajectory(one, two, "hard_negatives/")


def test_divergences_give_one_trajectory(trajectories):
    """Of hard negatives, on two ranks with two micro-batches each; fp32, relative 2e-4."""
    one, two = (trajectories[1, 1].parent / f"distilled-{ranks}" for ranks in (1, 2))
    assert len(losses(one)) == 3
    assert all(row["loss/contrast_distill"] > 0 and row["loss/sham"] > 0 for row in metrics(one) if "loss" in row)
    assert_same_trajectory(one, two, "hard_negatives/")


def test_the_first_step_is_that_of_the_hardest(trajectories, model_dir, manifests):
    """Of groups that have no other counterfactual, chosen here by scores of plain rows: losses of every term."""
    groups, config = read_manifest(manifests["train"]), ModelConfig(str(model_dir), attn_implementation="sdpa")
    sampler = GroupSampler(num_groups=48, groups_per_micro_batch=16, gradient_accumulation_steps=1, rank=0, world_size=1, seed=0)
    step = [groups[index] for index in next(iter(sampler))]
    collator, model = load_collator(config).building("star", None), load_model(config, torch.float32)
    scorer = Scorer(model, family_of(model.config)).eval()
    objective: Any = parse_config(["--config", "tests/support/train.yaml"], OBJECTIVES).objective

    def shares(chosen: list[CounterfactualGroup]) -> dict[str, float]:
        batch = collator(chosen)
        scores = batch.scores(scorer(**batch.model_inputs))
        return {
            name: float(share.sum()) for name, share in weighted_loss(objective, scores, denominators(objective, batch.layout))[1].items()
        }

    with torch.no_grad():
        found = shares([hardest(group, collator, scorer) for group in step])
        everything = shares(step)
    first = metrics(trajectories[1, 1].parent / "hard-1")[0]
    assert {name: first[f"loss/{name}"] for name in found} == pytest.approx(found, rel=1e-4)
    assert abs(found["csd"] - everything["csd"]) > 1e-3, "the other counterfactuals must matter, or this proves nothing"


def hardest(group: CounterfactualGroup, collator: Any, scorer: Scorer) -> CounterfactualGroup:
    """The group with the pair (image k, text k) that has the largest violation of its four comparisons; a sham, the last image, stays."""
    pairs = len(group.candidates) - 1
    if pairs < 2:
        return group
    batch = collator([group])
    s = batch.scores(scorer(**batch.model_inputs)).logp[0].tolist()
    violations = [max(s[0][k] - s[0][0], s[k][0] - s[0][0], s[k][0] - s[k][k], s[0][k] - s[k][k]) for k in range(1, pairs + 1)]
    k = 1 + violations.index(max(violations))
    images = [0, k, *range(pairs + 1, len(group.images))]
    match = tuple(tuple(group.match[i][c] for c in (0, k)) for i in images)
    return CounterfactualGroup(group.id, tuple(group.images[i] for i in images), tuple(group.candidates[c] for c in (0, k)), match)
