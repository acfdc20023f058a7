"""In-batch alignment in real runs: a loss over the whole optimizer step that does not depend on who computes which part of it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import losses, metrics, run_trainings, selected, train_arguments

from cfvlm_ds.batching.collator import load_collator
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.distributed import World
from cfvlm_ds.data import GroupSampler, open_groups
from cfvlm_ds.data.identity import data_identity
from cfvlm_ds.data.stored_scores import StoredScores, read_scores, write_scores
from cfvlm_ds.models import Scorer, family_of, fingerprint, load_model
from cfvlm_ds.objectives import BatchAlign, denominators, weighted_loss
from cfvlm_ds.training.elsewhere import exchange
from cfvlm_ds.training.guests import WholeSteps, WithGuests

GLOBAL_BATCH = 16
FORWARD = 300  # tokens: an image with its texts and those of others is divided
LONG = ((1, 2), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (4, 4), (1, 4), (1, 2, FORWARD))
LAYOUTS = [
    pytest.param(layout, marks=pytest.mark.long if layout in LONG else ())
    for layout in ((1, 2), (1, 4), (1, 2, FORWARD), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (4, 4), (2, 2, FORWARD))
]
"""Ranks, accumulation steps and, where it is bounded, tokens of a forward."""


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
def trajectories(
    model_dir: Path, manifests: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[tuple[int, ...], Path]:
    """Layout -> run folder, three steps of 16 groups, with scores of a blank image that are as good as any."""
    folder = tmp_path_factory.mktemp("batch")
    scores = write_priors(folder / "scores.jsonl", model_dir, manifests["train"])
    layouts = list(dict.fromkeys([(1, 1), *selected(request, "layout")]))
    folders = {layout: folder / "x".join(map(str, layout)) for layout in layouts}
    for ranks in sorted({layout[0] for layout in layouts}):
        trainings = []
        for layout in (layout for layout in layouts if layout[0] == ranks):
            _, steps, *limit = layout
            extra = ["--train.per_device_train_batch_size", str(GLOBAL_BATCH // (ranks * steps)), "--train.max_steps", "3"]
            extra += ["--train.gradient_accumulation_steps", str(steps), "--data.scores", str(scores)]
            extra += [part for tokens in limit for part in ("--data.max_tokens_per_forward", str(tokens))]
            extra += ["--objective.batch_align.weight", "0.5", "--objective.batch_align.texts", "4", "--objective.batch_align.warmup", "0"]
            extra += ["--data.num_workers", str(int(steps == 2))]
            trainings.append(train_arguments(model_dir, manifests, folders[layout], *extra))
        run_trainings(ranks, *trainings, said=folder / f"said-{ranks}")
    return folders


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_and_accumulation_give_one_trajectory(layout: tuple[int, ...], trajectories: dict[tuple[int, ...], Path]) -> None:
    """Which texts meet which images, and what each costs: fp32, relative 2e-4. Data workers where there are two steps."""
    expected = metrics(trajectories[1, 1])
    assert len(losses(trajectories[1, 1])) == 3
    assert all(row["loss/batch_align"] > 0.3 and 3 < row["batch_align/texts"] <= 4 for row in expected if "loss" in row)
    assert 0 < expected[0]["violated/batch_align"] < 1
    for want, have in zip(expected, metrics(trajectories[layout]), strict=True):
        for name in want:
            if name.startswith(("loss", "logp/", "grad_norm", "violated/", "batch_align/")):
                assert have[name] == pytest.approx(want[name], rel=2e-4, abs=2e-5), f"{name} at step {want['step']} with {layout}"


def test_the_first_loss_is_that_of_the_whole_step_at_once(
    trajectories: dict[tuple[int, ...], Path], model_dir: Path, manifests: dict[str, Path]
) -> None:
    """All 16 groups in one row, outside of a run: what each text scores on images of other groups counts."""
    groups = open_groups(str(manifests["train"]))
    stored = read_scores(trajectories[1, 1].parent / "scores.jsonl", groups, data_identity(groups, groups.roots))
    model = load_model(config := ModelConfig(str(model_dir), attn_implementation="sdpa"), torch.float32)
    place: dict[str, Any] = {"gradient_accumulation_steps": 1, "rank": 0, "world_size": 1, "seed": 0}
    sampler = GroupSampler(num_groups=len(groups), groups_per_micro_batch=GLOBAL_BATCH, **place)
    step = WithGuests(groups, {"batch_align": 4}, 0).__getitems__(next(iter(WholeSteps(sampler))))
    batch = load_collator(config, "star", stored=stored)(step)
    with torch.no_grad():
        scores = batch.scores(Scorer(model, family_of(model.config)).eval()(**batch.model_inputs))
    objective = {"batch_align": BatchAlign(texts=4)}
    below = denominators(objective, batch.layout)
    shares = [
        weighted_loss(objective, each, below)[1]["batch_align"].item()
        for each in (scores, exchange([scores], World(0, 1, 0, torch.device("cpu")))(scores))
    ]
    assert metrics(trajectories[1, 1])[0]["loss/batch_align"] == pytest.approx(shares[1], rel=1e-4) and shares[1] > shares[0] + 0.1
