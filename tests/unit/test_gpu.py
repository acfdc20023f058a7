"""What only a GPU shows: the variable-length kernels themselves, a run in bfloat16, and what commands and the check of a node do there."""

from __future__ import annotations

import importlib.util
import sys
from datetime import timedelta

import pytest
import torch
from conftest import COLOURS, SHAPES, free_port, losses, run, train_arguments
from test_attention import FORESTS, NARROWED, SEVERAL_BLOCKS, call, dense, inputs, relative
from tiny_llava import TinyLlavaConfig, build_tiny_llava

from cfvlm_ds.cli.models import load_scorer
from cfvlm_ds.cluster.node_check import _collective, gpu_fault
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.distributed import World
from cfvlm_ds.data import read_manifest
from cfvlm_ds.data.decoding import MAX_PIXELS
from cfvlm_ds.models.forest import Forest
from cfvlm_ds.models.variable_length import has_varlen

pytestmark = pytest.mark.gpu
BACKENDS = [
    "sdpa",
    pytest.param(
        "varlen",
        marks=pytest.mark.skipif(not has_varlen(), reason="needs torch 2.11 or newer"),
    ),
    "flex",
    pytest.param(
        "flash_attention_2", marks=pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash-attn and a GPU")
    ),
]

ROWS: dict[str, tuple[Forest, int | None]] = {name: (row, None) for name, row in {**FORESTS, "several blocks": SEVERAL_BLOCKS}.items()}
ROWS |= NARROWED
"""Rows, and the layer's sliding window."""


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=["heads", "grouped"])
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_are_as_near_as_a_dense_attention(backend, name, heads):
    """bfloat16: at most twice as far from float64 as a dense attention computed in bfloat16, values and gradients."""
    forest, window = ROWS[name]
    qkv = [t.detach().cuda().requires_grad_() for t in inputs(forest, heads, torch.bfloat16, 64)]
    exact = [t.detach().double().requires_grad_() for t in qkv]
    truth = dense(*exact, forest, 0.3, window)
    weights = torch.randn_like(truth)
    true = [truth, *torch.autograd.grad((truth * weights).sum(), exact)]
    off = []
    for out in (call(backend, *qkv, forest=forest, scaling=0.3, sliding_window=window), dense(*qkv, forest, 0.3, window)):
        grads = torch.autograd.grad((out * weights.bfloat16()).sum(), qkv)
        off.append([relative(a, b) for a, b in zip([out, *grads], true, strict=True)])
    for ours, theirs in zip(*off, strict=True):
        assert ours < 2 * theirs


@pytest.fixture(scope="module")
def wider(tmp_path_factory):
    """A LLaVA with heads of 32, for the kernels take none as small as those of the other tests' model."""
    captions = [f"a {c} {s} and a {d} {t}" for c in COLOURS for d in COLOURS for s in SHAPES for t in SHAPES]
    config = TinyLlavaConfig(out_dir=str(tmp_path_factory.mktemp("model") / "llava"), hidden_size=128, vision_hidden_size=64)
    return build_tiny_llava(config, captions)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_in_bfloat16(backend, wider, manifests, tmp_path):
    """ZeRO-3 over NCCL; the run itself compares its packed scores with single-row forwards, and its losses fall near those of float32."""
    common = ["--data.max_tokens_per_micro_batch", "500", "--train.max_steps", "5", "--train.self_check", "error"]
    half = train_arguments(wider, manifests, tmp_path / "half", *common, "--model.attn_implementation", backend, "--train.bf16", "true")
    full = train_arguments(wider, manifests, tmp_path / "full", *common, "--model.attn_implementation", "sdpa", "--train.bf16", "false")
    output = "".join(run([sys.executable, "train.py", *arguments]) for arguments in (half, full))
    assert f"nats per token ({backend})" in output
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "full"), rel=0.02)


def test_commands_score_near_a_cpu(wider, manifests):
    groups, found = list(read_manifest(manifests["train"]))[:4], []
    for world in (None, World(0, 1, torch.device("cpu"))):
        scorer, collator, place = load_scorer(ModelConfig(str(wider)), max_pixels=MAX_PIXELS, world=world)
        batch = collator.scoring_everything()(groups).to(place.device)
        with torch.no_grad():
            found.append(batch.scores(scorer(**batch.model_inputs)).logp.cpu())
    torch.testing.assert_close(*found, rtol=0.02, atol=0.02)


def test_a_node_is_checked():
    assert gpu_fault(torch.cuda.device_count()) is None
    store = torch.distributed.TCPStore("127.0.0.1", free_port(), 1, is_master=True)
    assert _collective(store, 0, 1, timedelta(minutes=1)) == 0, "one rank sends nothing"
