"""Gated delta nets over rows of trees: what each text computes after its prefix is what the library's own layer computes of it alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_attention import FORESTS, SEVERAL_BLOCKS
from torch import Tensor, nn
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
from two_levels import two_levels

from cfvlm_ds.models.flops import _operations_per_pair
from cfvlm_ds.models.forest import Forest
from cfvlm_ds.models.forest_attention import registered
from cfvlm_ds.models.gated_delta_net import fork_states

ROWS = {**FORESTS, "several chunks": SEVERAL_BLOCKS, "roots of several lengths": two_levels((150, 70, 3), ((2, 80), (5,), (1, 1)))}


class Model(nn.Module):
    """One layer, and the configuration in which a back end is chosen."""

    def __init__(self) -> None:
        super().__init__()
        text = Qwen3_5TextConfig(
            hidden_size=16,
            num_hidden_layers=4,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=4,
        )
        text._attn_implementation = registered("sdpa")
        self.config: Any = SimpleNamespace(get_text_config=lambda: text)
        torch.manual_seed(0)
        self.layer = Qwen3_5GatedDeltaNet(text, 0)
        with torch.no_grad():
            self.layer.A_log.fill_(-2.0)  # a memory of many tokens
            self.layer.dt_bias.normal_()
            self.layer.conv1d.weight.normal_()
        fork_states(self)


@pytest.fixture(scope="module")
def model():
    return Model()


def path_by_path(model: Model, hidden: Tensor, forest: Forest) -> Tensor:
    """The library's layer on the tokens of each node's ancestors and its own, of which its own are taken."""
    outputs = []
    model.config.get_text_config()._attn_implementation = "sdpa"
    for node, ancestors in enumerate(forest.ancestors):
        parts = [hidden[:, forest.starts[each] : forest.starts[each + 1]] for each in (*ancestors, node)]
        outputs.append(model.layer(torch.cat(parts, 1))[:, forest.seen[node] :])
    model.config.get_text_config()._attn_implementation = registered("sdpa")
    return torch.cat(outputs, 1)


def row(forest: Forest) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(1, forest.bounds[-1], 16, requires_grad=True)


@pytest.mark.parametrize("name", ROWS)
def test_values_and_gradients_are_those_of_each_path_alone(name, model):
    """float32, in which the library's rule always computes: relative 1e-5."""
    forest = ROWS[name]
    hidden = row(forest)
    found, expected = model.layer(hidden, forest=forest), path_by_path(model, hidden, forest)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    weights, leaves = torch.randn_like(found), [hidden, *model.layer.parameters()]
    ours, theirs = (torch.autograd.grad((out * weights).sum(), leaves) for out in (found, expected))
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() < 1e-5 * other.norm()


def test_a_leak_at_any_level_would_be_noticed(model):
    """Siblings one after the other, a text after another question, or a state that nobody has handed on."""
    lengths, parents = (9, 4, 2, 2, 4, 2, 2), (-1, 0, 1, 1, 0, 4, 4)
    hidden = row(Forest(lengths, parents))
    right = model.layer(hidden, forest=Forest(lengths, parents))
    for wrong in ((-1, 0, 1, 2, 0, 4, 4), (-1, 0, 1, 1, 1, 4, 4), (-1, 0, 1, 1, 0, 4, 0), (-1, 0, 1, 1, -1, 4, 4), (-1, 0, 1, 1, 3, 4, 4)):
        assert (model.layer(hidden, forest=Forest(lengths, wrong)) - right).abs().max() > 1e-3


def test_what_would_change_scores_without_an_error_is_refused(model):
    forest = FORESTS["one tree"]
    with pytest.raises(ValueError, match="needs a forest and accepts no cache or mask"):
        model.layer(row(forest), forest=forest, attention_mask=torch.ones(1, forest.bounds[-1]))


def test_operations_per_pair_are_those_of_full_attention_alone():
    """By hand: one layer of four attends to pairs, with 3 heads of 5, a product of queries and keys and one of weights and values."""
    text = Qwen3_5TextConfig(num_hidden_layers=4, num_attention_heads=3, head_dim=5)
    assert text.layer_types == ["linear_attention"] * 3 + ["full_attention"]
    assert _operations_per_pair(text) == {None: 2 * 2 * 3 * 5}
