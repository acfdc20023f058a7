"""Device code without a card: every family takes a step on a device that pretends, and kernels get the arguments that they require."""

# ruff: noqa: F401, F811  (fixtures of other tests)
from __future__ import annotations

import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pretend_device
import pytest
import torch
from PIL import Image
from test_attention import FORESTS, NARROWED, call, dense, inputs, relative
from test_families import groups as every_group
from two_levels import two_levels

from cfvlm_ds.batching.collator import load_collator
from cfvlm_ds.core.config import ModelConfig, ModuleConfig
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup
from cfvlm_ds.demo.family_checkpoints import SMALL, write_small
from cfvlm_ds.engine.setup import recompute_activations
from cfvlm_ds.models import Scorer, chunked_logprobs, family_of, load_model, loading
from cfvlm_ds.models.forest import Forest
from cfvlm_ds.objectives import Align, Csd, denominators, weighted_loss

AT_ONCE = ("llava", "qwen2_5_vl", "mistral3")


@pytest.fixture(scope="module")
def card():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=pretend_device.start) as process:
        yield process


@pytest.fixture(scope="module")
def groups(every_group):
    return [group for group in every_group if group.id in ("pair", "texts", "single")]


def step(folder: Path, groups: list[CounterfactualGroup], backend: str, dtype: torch.dtype, moved: bool, batch_moved: bool = True) -> Any:
    """A forward, backward and optimizer step with recomputed layers and everything trained; (loss, gradients, waits)."""
    torch.manual_seed(0)
    config = ModelConfig(str(folder), vision_tower=ModuleConfig("full"), attn_implementation=backend)
    with ExitStack() as patches:
        patches.enter_context(patch.object(loading, "attention", lambda *arguments: backend))
        patches.enter_context(patch.object(chunked_logprobs, "LOGITS", 1 << 12))  # the head in several parts
        model = load_model(config, dtype).train()
        recompute_activations(model)
        scorer, batch, objectives = (
            Scorer(model, family_of(model.config)),
            load_collator(config)(groups),
            {"a": Align(), "c": Csd()},
        )
        with ExitStack() as on_device:
            if moved:
                pretend_device.move(scorer)
                on_device.enter_context(pretend_device.used())
            trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
            optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
            batch = batch.to(pretend_device.device()) if moved and batch_moved else batch
            scores = batch.scores(scorer(**batch.model_inputs))
            below = {name: torch.atleast_1d(count) for name, count in denominators(objectives, batch.layout).items()}
            loss, _ = weighted_loss(objectives, scores, below)
            loss.backward()
            optimizer.step()
            waits = Counter(pretend_device.WAITS)
    assert all(each.grad is not None and each.grad.device == each.device == loss.device for each in trained.values())
    read = pretend_device.there if moved else torch.Tensor.detach
    return read(loss).item(), torch.cat([read(each.grad).float().flatten() for each in trained.values()]).numpy(), waits


TILES = {"pack_image_features": 1}  # numbers of tiles' features become a tensor
PADDED = {"get_image_features": 3, "_ignore_bidirectional_mask_sdpa": 1}  # pictures of zeros are padding, which its model looks for
WAITS: dict[str, dict[str, int]] = {kind: {} for kind in SMALL} | {
    "llava_next": TILES,
    "llava_onevision": TILES,
    "idefics3": PADDED,
    "smolvlm": PADDED,
    "mistral3": {"forward": 1, "get_image_features": 2},  # sizes of pictures become tensors, and a list again
    "gemma4": {"_ignore_bidirectional_mask_sdpa": 1, "get_image_features": 1, "forward": 1, "index_put": 1},  # patches that are padding
}
"""Where the host waits in a step, all of it in transformers; a step has as many with more pictures or layers."""


@pytest.mark.parametrize("kind", [pytest.param(name, marks=() if name in AT_ONCE else pytest.mark.long) for name in SMALL])
def test_a_step_of_every_family_mixes_no_devices_and_seldom_waits(kind, card, groups, tmp_path):
    """Tower and text through flash-attn, bfloat16. Waits are those of WAITS, by place."""
    folder = write_small(kind, tmp_path / kind)
    loss, grads, waits = card.submit(step, folder, groups, "flash_attention_2", torch.bfloat16, True).result()
    assert np.isfinite(loss) and np.isfinite(grads).all()
    assert waits == WAITS[kind] and sum(waits.values()) <= 6


def test_the_device_computes_what_a_cpu_does_and_refuses_what_is_not_on_it(card, groups, tmp_path):
    """With a tower that goes through its windows at once without flash-attn too, and as seldom waits."""
    folder = write_small("qwen2_5_vl", tmp_path / "model")
    found, expected = (card.submit(step, folder, groups, "sdpa", torch.float32, moved).result() for moved in (True, False))
    assert found[0] == pytest.approx(expected[0], rel=1e-5) and found[2] == WAITS["qwen2_5_vl"]
    assert np.linalg.norm(found[1] - expected[1]) < 1e-5 * np.linalg.norm(expected[1])
    with pytest.raises(RuntimeError, match="on the same device"):
        card.submit(step, folder, groups, "sdpa", torch.float32, True, False).result()


ROWS: dict[str, tuple[Forest, int | None]] = {
    "one text": (two_levels((40,), ((5,),)), None),
    "eight texts": (two_levels((40,), ((5, 1, 3, 8, 2, 2, 7, 4),)), None),
    "packed": (FORESTS["questions of two pictures"], None),
    **NARROWED,
}


@pytest.mark.parametrize("name", ROWS)
def test_flash_attn_takes_its_arguments(name, card):
    """The stub has the real signature and checks; values and gradients are a dense attention's within bfloat16."""
    off, calls, waits = card.submit(kernel, name).result()
    forest, window = ROWS[name]
    whole = bool(forest.sight(window).blocks)
    assert max(off) < 0.01 and not waits
    assert [each["causal"] for each in calls] == [True, False][: 1 + whole] or (name, whole) == ("a picture and nothing else", True)


def kernel(name: str) -> Any:
    forest, window = ROWS[name]
    qkv = inputs(forest, (4, 2), torch.bfloat16, 16)
    exact = [each.detach().double().requires_grad_() for each in qkv]
    truth = dense(*exact, forest, 0.3, window)
    weights = torch.randn_like(truth)
    expected = [truth, *torch.autograd.grad((truth * weights).sum(), exact)]
    pretend_device.CALLS.clear()
    with pretend_device.used():
        there = [each.detach().to(pretend_device.device(), non_blocking=True).requires_grad_() for each in qkv]
        out = call("flash_attention_2", *there, forest=forest, scaling=0.3, sliding_window=window)
        cost = (out * weights.to(out, non_blocking=True)).sum()
        found = [out.detach(), *torch.autograd.grad(cost, there)]
        waits = Counter(pretend_device.WAITS)
    off = [relative(pretend_device.there(ours), theirs) for ours, theirs in zip(found, expected, strict=True)]
    return off, list(pretend_device.CALLS), waits
