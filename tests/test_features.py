"""The feature cache, for every family: with it scores, losses and gradients are those of the tower, which never runs again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import configured, groups  # noqa: F401  (a fixture)

from cfvlm_ds.collate import Collator, blinded, load_collator
from cfvlm_ds.config import ModelConfig, ModuleConfig
from cfvlm_ds.distributed import World
from cfvlm_ds.groups import CounterfactualGroup
from cfvlm_ds.models import Scorer, family_of, load_model
from cfvlm_ds.models.small import SMALL, write_small
from cfvlm_ds.tower_pass import feature_cache

ALONE = World(0, 1, 0, torch.device("cpu"))


class Engine:
    """A Scorer with what the pass asks of DeepSpeed's engine; counts the runs of its tower."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        loaded = load_model(replace(model, vision_tower=ModuleConfig("frozen")), dtype)
        self.module = Scorer(loaded, family_of(loaded.config))
        self.tower_runs = 0
        self.training, self.train, self.eval = True, self.module.train, self.module.eval
        self.module.model.get_submodule(self.module.family.vision_tower[0]).register_forward_hook(self._count)

    def _count(self, *arguments: Any) -> None:
        self.tower_runs += 1

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)


@pytest.fixture(scope="module", params=list(SMALL))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(request.param, tmp_path_factory.mktemp("families") / request.param)


def filled(where: Path, model: ModelConfig, engine: Engine, groups: list[CounterfactualGroup]) -> Collator:  # noqa: F811
    collator = load_collator(model, "full")
    collator.features = feature_cache(where, model, engine, collator, groups, ALONE, 0)
    return collator


def test_scores_and_gradients_are_those_of_the_tower(folder: Path, groups: list[CounterfactualGroup], tmp_path: Path) -> None:  # noqa: F811
    """Sizes, tiles, several pictures in a prompt and text alone mixed in a batch; in one row and in parts; fp32, relative 1e-5."""
    model = configured(folder)
    engine, plain = Engine(model), load_collator(model, "full")
    cached = filled(tmp_path, model, engine, groups)
    passed = engine.tower_runs
    found = []
    for collator in (plain, cached):
        before = engine.tower_runs
        whole = collator(groups)
        parts = collator.parts(groups, whole.num_tokens // 3)
        assert len(parts) > 1
        logp = sum(part.scores(engine(**part.model_inputs)).logp for part in parts)
        scores = whole.scores(engine(**whole.model_inputs))
        torch.testing.assert_close(logp, scores.logp, rtol=1e-5, atol=1e-5)
        weights = torch.randn(scores.logp.shape, generator=torch.Generator().manual_seed(0))
        trained = {name: p for name, p in engine.module.model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad((weights * scores.logp).sum(), list(trained.values()))
        found.append((scores.logp.detach(), dict(zip(trained, grads, strict=True)), engine.tower_runs - before, whole))
    (logp, grads, runs, whole), (own_logp, own_grads, own_runs, own) = found
    assert runs > 0 and own_runs == 0 and passed == len(cached.pictures(groups)), "each picture once, and then never"
    torch.testing.assert_close(own_logp, logp, rtol=1e-5, atol=1e-5)
    projector = [name for name in grads if engine.module.family.module_of(name) == "projector"]
    assert projector and all(grads[name].any() for name in projector)
    for name, grad in grads.items():
        assert (own_grads[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-7, name
    for name in ("input_ids", "position_ids", "images_of_tree", "visual_tokens"):
        assert str(own.model_inputs[name]) == str(whole.model_inputs[name]), name


def test_the_blank_control_is_that_of_the_tower(folder: Path, groups: list[CounterfactualGroup], tmp_path: Path) -> None:  # noqa: F811
    model = configured(folder)
    engine, plain = Engine(model), load_collator(model, "full")
    blind = [blinded(group) for group in groups]
    with torch.no_grad():
        first, second = (
            (batch := collator(blind)).scores(engine(**batch.model_inputs)).logp
            for collator in (plain, filled(tmp_path, model, engine, groups))
        )
    torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-5)


def test_a_second_run_does_not_run_the_tower_and_bfloat16_stays_apart(
    folder: Path,
    groups: list[CounterfactualGroup],  # noqa: F811
    tmp_path: Path,
) -> None:
    """In bfloat16 scores with and without are equal bit for bit."""
    model, engine = configured(folder), Engine(configured(folder))
    filled(tmp_path / "cache", model, engine, groups)
    again = Engine(model)
    filled(tmp_path / "cache", model, again, groups)
    assert engine.tower_runs > 0 and again.tower_runs == 0
    narrow = Engine(model, torch.bfloat16)
    batch = filled(tmp_path / "cache", model, narrow, groups)(groups[1:2])
    assert narrow.tower_runs == engine.tower_runs
    assert {tensor.dtype for tensor in batch.model_inputs["image_inputs"]["tower_features"].values()} == {torch.bfloat16}
    assert torch.equal(narrow(**batch.model_inputs), narrow(**load_collator(model, "full")(groups[1:2]).model_inputs))
