"""The benchmark of layouts: all of them compute one loss; and the model's operations are those that torch counts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import scoring
import torch
from conftest import read_json, run_ranks
from torch.utils.flop_counter import FlopCounterMode

from cfvlm_ds.models import FAMILIES, MODULES, ModelFlops, Scorer
from cfvlm_ds.models.flops import _operations_per_pair
from cfvlm_ds.models.forest_attention import registered

SIZE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.convolution", "aten.convolution_backward")


@pytest.mark.parametrize("family", ["llava", *(pytest.param(name, marks=pytest.mark.long) for name in ("qwen2_5_vl", "qwen3_5"))])
def test_all_layouts_compute_one_loss(family):
    """fp32, relative 1e-5; the supervised step sees other texts before its own and is another one."""
    model = scoring.build(family, 64, SIZE, torch.device("cpu"), torch.float32)
    of = scoring.case(model, family, 64, 3)
    model.config.get_text_config()._attn_implementation = registered("sdpa")
    found = {name: scoring.step(layout, of) for name, layout in scoring.LAYOUTS.items()}
    supervised = found.pop("supervised")
    assert list(found.values()) == pytest.approx([found["concatenated"]] * 3, rel=1e-5)
    assert abs(supervised - found["concatenated"]) > 1e-4


@pytest.mark.parametrize("frozen", [(), ("vision_tower",), ("vision_tower", "projector"), ("language_model",)])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_model_flops_are_those_that_torch_counts(family, frozen):
    """Every matrix product of a forward and backward pass, attention aside; 1 %. The output head is frozen, for torch does not count the
    product that adds to its gradient in place; and all of the tower is used, for the library runs also what it does not use."""
    model = scoring.build(family, 256, SIZE, torch.device("cpu"), torch.float32)
    model.config.vision_feature_layer = -1
    record = FAMILIES[family]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(record.module_of(name) not in frozen and not name.startswith("lm_head"))
    model.config.get_text_config()._attn_implementation = registered("sdpa")
    inputs = scoring.packed_inputs(scoring.case(model, family, 256, 4))
    with FlopCounterMode(display=False) as counter:
        Scorer(model, record)(**inputs).sum().backward()
    products = sum(count for op, count in counter.get_flop_counts()["Global"].items() if str(op) in PRODUCTS)
    flops = ModelFlops(model, record)
    flops._pairs = {}
    assert {record.module_of(name) for name, p in model.named_parameters() if p.requires_grad} == set(MODULES) - set(frozen)
    counted = flops.of(inputs, len(inputs["scored"]))
    assert counted == pytest.approx(products, rel=0.01)
    model.lm_head.requires_grad_()
    flops = ModelFlops(model, record)
    flops._pairs = {}
    assert flops.of(inputs, len(inputs["scored"])) - counted == 2 * len(inputs["scored"]) * model.lm_head.weight.numel()


@pytest.mark.long
def test_zero3_gathers_no_more_for_eight_texts_than_for_one(tmp_path):
    """Two real ranks; elements and collectives of a step equal those of a plain supervised step on the same tokens."""
    options = ["--layouts", "supervised", "shared prefix", "--recompute", "0", "--json", str(tmp_path / "found.json")]
    ended = run_ranks(2, "forkserver_ranks:script", "benchmarks/zero3_comm.py", options)
    assert [code for code, _ in ended] == [0, 0], ended
    rows = read_json(tmp_path / "found.json")
    assert [(row["layout"], row["texts"]) for row in rows] == [(name, k) for k in (1, 8) for name in ("supervised", "shared prefix")]
    assert len({(row["elements"], row["collectives"]) for row in rows}) == 1
    assert 1.9 < rows[0]["elements"] < 2.05


@pytest.mark.parametrize(
    ("window", "kinds", "head_dim"), [(None, None, None), (8, None, 6), (8, ["full_attention", "sliding_attention"], 6)]
)
def test_operations_of_attention_by_hand(window, kinds, head_dim):
    """Two products of 2 operations per head and width, per layer; the width of a head is that of the model by the heads, if not given."""
    layer = SimpleNamespace(num_attention_heads=4, hidden_size=20, head_dim=head_dim)
    text = SimpleNamespace(sliding_window=window, layer_types=kinds, num_hidden_layers=2, per_layer_config=[layer, layer])
    each = 4 * 4 * (head_dim or 5)
    assert _operations_per_pair(text) == ({None: each, 8: each} if kinds else {window: 2 * each})
