"""What training does to the likelihoods: it learns the pairs, holds the truth up, and avoids two published defects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ONE, metrics, run_trainings, train_arguments, write_manifest
from torch import Tensor

from cfvlm_ds.batching.batch import Batch
from cfvlm_ds.batching.collator import Collator, load_collator
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.data import read_manifest
from cfvlm_ds.evaluation import accuracies, score_groups
from cfvlm_ds.models import Scorer, family_of, load_model
from cfvlm_ds.objectives import Align, Csd, Fcd, Objective, denominators, likelihood_report, weighted_loss

Loss = Callable[[Scores], Tensor]
CF_VLM: dict[str, Objective] = {"align": Align(), "csd": Csd(), "fcd": Fcd()}


def model_config(model_dir: Path) -> ModelConfig:
    return ModelConfig(str(model_dir), attn_implementation="sdpa")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_manifest(tmp_path_factory.mktemp("eight") / "eight.jsonl", 8, ragged=False)


@pytest.fixture(scope="module")
def groups(manifest):
    return read_manifest(manifest)


@pytest.fixture(scope="module")
def collator(model_dir):
    return load_collator(model_config(model_dir))


@pytest.fixture(scope="module")
def batch(collator, groups):
    return collator(groups)


def weighted(objectives: dict[str, Objective], batch: Batch) -> Loss:
    units = denominators(objectives, batch.layout)
    return lambda scores: weighted_loss(objectives, scores, units)[0]


def load(model_dir: Path) -> Scorer:
    model = load_model(model_config(model_dir), torch.float32).train()
    return Scorer(model, family_of(model.config))


def fit(model_dir: Path, batch: Batch, loss: Loss, steps: int) -> tuple[Scorer, dict[str, list[float]]]:
    """A plain loop over one batch; the model, and nats per token of every kind of cell before each step and at the end."""
    scorer = load(model_dir)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=3e-3, weight_decay=0.0)
    history: dict[str, list[float]] = {}

    def scored() -> Scores:
        scores = batch.scores(scorer(**batch.model_inputs))
        for name, (total, count) in likelihood_report(scores).items():
            history.setdefault(name.removeprefix("logp/"), []).append(float(total / count))
        return scores

    for _ in range(steps):
        optimizer.zero_grad()
        loss(scored()).backward()
        torch.nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        scored()
    return scorer.eval(), history


def group_accuracy(scorer: Scorer, collator: Collator, groups: list[CounterfactualGroup]) -> float:
    scores = score_groups(scorer, collator, groups, ONE)
    return accuracies(groups, scores)[-1].metrics["group"]


# What is learned ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_factual_text_becomes_less_likely_on_the_other_image(model_dir, collator, groups, batch):
    """The published code adds NLL(T_0 | I_k) to NLL(T_0 | I_0), which raises both: no gap, and no pair that is told apart."""

    def as_published(scores: Scores) -> Tensor:
        tokens = scores.layout.num_tokens[:, :, 0].sum(0)
        return -(scores.logp[:, 0, 0].sum() / tokens[0] + scores.logp[:, 1, 0].sum() / tokens[1])

    def gap(history: dict[str, list[float]]) -> float:
        return history["lp_00"][-1] - history["lp_k0"][-1]

    ours, good = fit(model_dir, batch, weighted(CF_VLM, batch), 60)
    theirs, bad = fit(model_dir, batch, as_published, 60)
    assert abs(good["lp_00"][0] - good["lp_k0"][0]) < 0.1
    assert gap(good) > 1.0, "nats per token"
    assert min(bad["lp_00"][-1] - bad["lp_00"][0], bad["lp_k0"][-1] - bad["lp_k0"][0]) > 3.0 and gap(bad) < 0.3
    assert group_accuracy(ours, collator, groups) == 100 and group_accuracy(theirs, collator, groups) < 50


@pytest.mark.long
def test_the_papers_matched_form_pushes_true_captions_down(model_dir, batch):
    """The documented defect of mode ``matched``: T_k, true of I_k, is made less likely there, more so than the false T_0."""
    change = {}
    for mode in ("matched", "matched_sg", "cross"):
        _, history = fit(model_dir, batch, weighted({"csd": Csd(mode=mode)}, batch), 30)  # type: ignore[arg-type]
        change[mode] = {name: values[-1] - values[0] for name, values in history.items()}
    assert change["matched"]["lp_kk"] < -0.5 and change["matched"]["lp_kk"] < change["matched"]["lp_k0"] - 0.2
    assert change["matched_sg"]["lp_kk"] > 1.0, "detached, it rises along with S_00"
    assert change["cross"]["lp_kk"] > change["cross"]["lp_k0"] + 0.5


def test_the_displacement_warning(model_dir, manifest, tmp_path):
    """A real training without align, in which the factual text falls; an option that does nothing is named once."""
    options = ["--objective.align.weight=0", "--objective.fcd.weight=0", "--train.hard_negatives=9", "--train.displacement_warning=0.01"]
    options += ["--train.per_device_train_batch_size=8", "--train.max_steps=12"]
    said = run_trainings(1, train_arguments(model_dir, {"train": manifest}, tmp_path / "run", *options))
    lp = [row["logp/lp_00"] for row in metrics(tmp_path / "run") if "logp/lp_00" in row]
    assert min(lp) < lp[0] - 0.01
    assert "warning: likelihood displacement: the factual log-likelihood fell" in said
    assert said.count("train.hard_negatives 9 left nothing out") == 1
