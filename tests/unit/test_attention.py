"""Attention over trees: every back end equals a dense attention with an explicit mask, in values and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers import AttentionInterface
from two_levels import two_levels

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.models import flex_attention
from cfvlm_ds.models.flex_attention import Blocks, compiled_flex
from cfvlm_ds.models.flops import num_pairs
from cfvlm_ds.models.forest import Forest, Sight
from cfvlm_ds.models.forest_attention import BACKENDS, registered

pytestmark = pytest.mark.usefixtures("kernels")

FORESTS = {
    "ragged": two_levels((20, 1, 50, 3), ((3, 4, 1), (2,), (7, 7), (30,))),
    "one tree": two_levels((9,), ((4, 4, 4),)),
    "alike": two_levels((12, 12), ((2, 3), (2, 3))),
    "prefix shorter than its branches": two_levels((1, 2), ((9, 1), (8,))),
    "questions": Forest((12, 4, 2, 1, 5, 1, 1, 1, 3, 2), (-1, 0, 1, 1, 0, 4, 4, 4, 0, 8)),
    "questions of two pictures": Forest((12, 4, 2, 1, 4, 2, 1, 9, 3, 1, 3, 1), (-1, 0, 1, 1, 0, 4, 4, -1, 7, 8, 7, 10)),
    "answers after both question and image": Forest((6, 3, 4, 2, 2, 1, 3), (-1, 0, 0, 2, 2, 0, 5)),
    "deep": Forest((7, 2, 3, 1, 2, 4, 2, 2, 3, 1, 5), (-1, 0, 1, 2, 2, 1, 5, 5, 7, 8, 0)),
    "chains": Forest((5, 3, 2, 4, 2, 3, 1, 6, 2), (-1, 0, 1, 1, 3, 4, -1, 6, 7)),
}


SEVERAL_BLOCKS = Forest((150, 60, 20, 30, 7, 130, 9, 40), (-1, 0, 1, 1, 0, -1, 5, 5))
"""More tokens than a block of FlexAttention has, which is left out where no query of it sees a key."""


PICTURES = two_levels((20, 9), ((3, 4), (6,)), blocks=((2, 9), (9, 12), (28, 34)))  # two pictures side by side
NARROWED = {
    "a window": (FORESTS["ragged"], 5),
    "a window of one token": (FORESTS["deep"], 1),
    "a window over several questions": (FORESTS["questions of two pictures"], 6),
    "pictures": (PICTURES, None),
    "pictures and a window shorter than they": (PICTURES, 4),
    "pictures and a window longer than they": (PICTURES, 15),
    "pictures as such in windows alone": (replace(PICTURES, blocks_everywhere=False), 8),
    "a picture and nothing else": (Forest((7,), (-1,), ((0, 7),)), 3),
}
"""Rows, and the sliding window of the layer."""
ROWS = {**{name: (forest, None) for name, forest in FORESTS.items()}, **NARROWED}


def seen_by(forest: Forest, window: int | None = None) -> Tensor:
    """[T, T] bool, written token by token, each walking up from its node to the root."""
    owner = [node for node, length in enumerate(forest.lengths) for _ in range(length)]

    def path(query):
        nodes = [owner[query]]
        while forest.parents[nodes[-1]] >= 0:
            nodes.append(forest.parents[nodes[-1]])
        return [token for token, node in enumerate(owner) if node in nodes]

    def sees(own, query, key):
        if key not in own:
            return False
        whole = window is not None or forest.blocks_everywhere
        before = key <= query or (whole and any(begin <= min(query, key) and max(query, key) < end for begin, end in forest.blocks))
        return before and (window is None or own.index(query) - own.index(key) < window)

    return torch.tensor([[sees(own, i, j) for j in range(len(owner))] for i in range(len(owner)) for own in [path(i)]])


def dense(q: Tensor, k: Tensor, v: Tensor, forest: Forest, scale: float, window: int | None = None) -> Tensor:
    """The definition: one big attention with a mask."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    logits = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen_by(forest, window).to(q.device), -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2)


def call(backend: str, *tensors: Tensor, forest: Forest | None, **options: Any) -> Tensor:
    function = AttentionInterface()[registered(backend)]
    return function(None, *tensors, None, forest=forest, **options)[0]


def inputs(forest: Forest, heads: tuple[int, int], dtype: torch.dtype, size: int = 8) -> list[Tensor]:
    torch.manual_seed(0)
    return [
        (2 * torch.randn(1, n, forest.bounds[-1], size, dtype=torch.float64)).to(dtype).requires_grad_() for n in (heads[0], *heads[1:] * 2)
    ]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=["heads", "grouped"])
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_are_those_of_a_dense_attention(backend, name, heads):
    """A window counts tokens along the path, whatever lies between them in the row; a picture is seen as a whole by itself alone."""
    forest, window = ROWS[name]
    qkv = inputs(forest, heads, torch.float64)
    expected, found = dense(*qkv, forest, 0.3, window), call(backend, *qkv, forest=forest, scaling=0.3, sliding_window=window)
    weights = torch.randn_like(expected)
    gradients = zip(torch.autograd.grad((found * weights).sum(), qkv), torch.autograd.grad((expected * weights).sum(), qkv), strict=True)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in gradients:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ROWS)
def test_as_many_pairs_are_counted_as_see_each_other(name):
    """What a model's floating-point operations are counted by."""
    forest, window = ROWS[name]
    assert num_pairs(forest, forest.sight(window)) == seen_by(forest, window).sum()


def test_a_block_across_nodes_is_refused():
    with pytest.raises(ValueError, match="tokens 7 to 10 attend to each other in both directions, but do not belong to one node"):
        two_levels((9,), ((4,),), blocks=((7, 10),))


@pytest.mark.parametrize("name", ROWS)
def test_blocks_leave_nothing_out(name, monkeypatch):
    """torch asks the mask of every pair of tokens, we the ends of subtrees. What torch finds is at least in part among ours, and what we
    call full is full; without a window they are the same, for queries and for keys."""
    monkeypatch.setattr(flex_attention, "BLOCK", 4)
    forest, window = replace(ROWS[name][0]), ROWS[name][1]  # nothing of it is placed yet
    length, ours = forest.bounds[-1], forest.on(Blocks.of, torch.device("cpu"), forest.sight(window))
    theirs = create_block_mask(ours.mask_mod, None, None, length, length, device="cpu", BLOCK_SIZE=4)
    assert torch.equal(create_mask(ours.mask_mod, None, None, length, length, device="cpu")[0, 0], seen_by(forest, window))
    assert ours.shape == theirs.shape

    def places(mask, kind):
        counts, listed = getattr(mask, f"{kind}_num_blocks")[0, 0], getattr(mask, f"{kind}_indices")[0, 0]
        return {(row, column) for row, count in enumerate(counts.tolist()) for column in listed[row, :count].tolist()}

    (some, full), (their_some, their_full) = ([places(mask, kind) for kind in ("kv", "full_kv")] for mask in (ours, theirs))
    assert full <= their_full and their_some | their_full <= some | full and not some & full and bool(full) == bool(their_full)
    assert window is not None or (some, full) == (their_some, their_full)
    for kind, found in (("q", some), ("full_q", full)):
        assert places(ours, kind) == {(column, row) for row, column in found}


@pytest.mark.parametrize("name", ["ragged", "deep", "questions of two pictures"])
def test_flex_attention_itself_computes_the_same(name):
    """Without gradients, which it has on a GPU alone: there it is torch's function that gets the mask, and not its definition."""
    forest = FORESTS[name]
    qkv = [t.detach() for t in inputs(forest, (6, 2), torch.float64, 16)]
    torch.testing.assert_close(call("flex", *qkv, forest=forest, scaling=0.3), dense(*qkv, forest, 0.3), rtol=1e-10, atol=1e-10)


@pytest.mark.long
def test_flex_attention_compiled_for_this_machine():
    """As on a GPU: with blocks that are left out, and one compilation for rows of several lengths; another for a row of less than a block.

    That one starts afresh: compiled once more for other lengths, torch 2.13 writes C++ with undeclared names.
    """
    several, short = (SEVERAL_BLOCKS, Forest(SEVERAL_BLOCKS.lengths[:5], SEVERAL_BLOCKS.parents[:5])), (FORESTS["deep"],)
    for forests in (several, short):
        torch.compiler.reset()
        compiled = compiled_flex()
        for forest in forests:
            q, k, v = (t.detach() for t in inputs(forest, (6, 2), torch.float32, 16))
            mask = forest.on(Blocks.of, torch.device("cpu"), Sight())
            out = compiled(q, k, v, block_mask=mask, scale=0.3, enable_gqa=True).transpose(1, 2)
            torch.testing.assert_close(out, dense(q, k, v, forest, 0.3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["ragged", "deep"])
def test_half_precision_is_as_near_as_a_dense_attention_in_it(backend, name):
    """bfloat16: at most twice as far from float64 as the dense attention computed in bfloat16, values and gradients."""
    forest = FORESTS[name]
    qkv = inputs(forest, (4, 2), torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in qkv]
    truth = dense(*exact, forest, 0.3)
    weights = torch.randn_like(truth)
    true = [truth, *torch.autograd.grad((truth * weights).sum(), exact)]

    def off(out):
        assert out.dtype == torch.bfloat16
        grads = torch.autograd.grad((out * weights.bfloat16()).sum(), qkv)
        return [relative(a, b) for a, b in zip([out, *grads], true, strict=True)]

    for ours, theirs in zip(off(call(backend, *qkv, forest=forest, scaling=0.3)), off(dense(*qkv, forest, 0.3)), strict=True):
        assert ours < 2 * theirs


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_would_change_scores_without_an_error_is_refused(backend):
    forest = FORESTS["one tree"]
    qkv = inputs(forest, (2, 2), torch.float64)
    with pytest.raises(ValueError, match="needs a forest and accepts no mask"):
        call(backend, *qkv, forest=None)
    with pytest.raises(ConfigError, match=r"attention dropout \(0\.1\) must be 0"):
        call(backend, *qkv, forest=forest, dropout=0.1)
