"""Attention over trees: every back end equals a dense attention with an explicit mask, in values and gradients; faults are noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.models import forest_attention as attention
from cfvlm_ds.models.forest_attention import BACKENDS, Forest, registered

pytestmark = pytest.mark.usefixtures("kernels")

FORESTS = {
    "ragged": Forest((20, 1, 50, 3), ((3, 4, 1), (2,), (7, 7), (30,))),
    "one tree": Forest((9,), ((4, 4, 4),)),
    "alike": Forest((12, 12), ((2, 3), (2, 3))),
    "prefix shorter than its branches": Forest((1, 2), ((9, 1), (8,))),
}


def dense(q: Tensor, k: Tensor, v: Tensor, forest: Forest, scale: float) -> Tensor:
    """The definition: one big attention with a mask written token by token."""
    owner = []  # (tree, branch) of every token; the prefix is branch -1
    for t, (prefix, branches) in enumerate(zip(forest.prefixes, forest.branches, strict=True)):
        owner += [(t, -1)] * prefix + [(t, b) for b, size in enumerate(branches) for _ in range(size)]
    seen = [
        [j <= i and owner[i][0] == owner[j][0] and owner[j][1] in (-1, owner[i][1]) for j in range(len(owner))] for i in range(len(owner))
    ]
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    logits = (q @ k.transpose(-1, -2) * scale).masked_fill(~torch.tensor(seen, device=q.device), -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2)


def call(backend: str, *tensors: Tensor, forest: Forest | None, **options: Any) -> Tensor:
    function: Callable[..., Any] = AttentionInterface()[registered(backend)]
    return function(None, *tensors, None, forest=forest, **options)[0]


def inputs(forest: Forest, heads: tuple[int, int], dtype: torch.dtype, size: int = 8) -> list[Tensor]:
    torch.manual_seed(0)
    return [
        (2 * torch.randn(1, n, forest.bounds[-1], size, dtype=torch.float64)).to(dtype).requires_grad_() for n in (heads[0], *heads[1:] * 2)
    ]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=["heads", "grouped"])
@pytest.mark.parametrize("name", FORESTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_are_those_of_a_dense_attention(backend: str, name: str, heads: tuple[int, int]) -> None:
    forest = FORESTS[name]
    qkv = inputs(forest, heads, torch.float64)
    expected = dense(*qkv, forest, 0.3)
    found = call(backend, *qkv, forest=forest, scaling=0.3)
    weights = torch.randn_like(expected)
    gradients = zip(torch.autograd.grad((found * weights).sum(), qkv), torch.autograd.grad((expected * weights).sum(), qkv), strict=True)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in gradients:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_the_cascade_on_an_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_GROUPED", False)
    test_values_and_gradients_are_those_of_a_dense_attention("cascade", "ragged", (6, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_as_near_as_a_dense_attention_in_it(backend: str) -> None:
    """bfloat16: at most twice as far from float64 as the dense attention computed in bfloat16, values and gradients."""
    forest = FORESTS["ragged"]
    qkv = inputs(forest, (4, 2), torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in qkv]
    truth = dense(*exact, forest, 0.3)
    weights = torch.randn_like(truth)
    true = [truth, *torch.autograd.grad((truth * weights).sum(), exact)]

    def off(out: Tensor) -> list[float]:
        assert out.dtype == torch.bfloat16
        grads = torch.autograd.grad((out * weights.bfloat16()).sum(), qkv)
        return [relative(a, b) for a, b in zip([out, *grads], true, strict=True)]

    for ours, theirs in zip(off(call(backend, *qkv, forest=forest, scaling=0.3)), off(dense(*qkv, forest, 0.3)), strict=True):
        assert ours < 2 * theirs


def test_the_cascades_backward_by_finite_differences() -> None:
    forest = Forest((3, 1), ((2, 1), (2,)))
    qkv = inputs(forest, (2, 1), torch.float64)
    assert torch.autograd.gradcheck(lambda *t: call("cascade", *t, forest=forest), qkv)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_forest_would_be_noticed(backend: str) -> None:
    """Siblings that see each other, a branch cut elsewhere, trees that see each other: each moves the output by 1e-3 at least."""
    forest = Forest((20, 5), ((3, 4), (6,)))
    qkv = inputs(forest, (4, 2), torch.float64)
    right = call(backend, *qkv, forest=forest)
    for wrong in (
        Forest((20, 5), ((7,), (6,))),
        Forest((20, 5), ((2, 5), (6,))),
        Forest((20,), ((3, 4, 11),)),
        Forest((19, 5), ((4, 4), (6,))),
    ):
        assert (call(backend, *qkv, forest=wrong) - right).abs().max() > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_would_change_scores_without_an_error_is_refused(backend: str) -> None:
    forest = FORESTS["one tree"]
    qkv = inputs(forest, (2, 2), torch.float64)
    with pytest.raises(ValueError, match="takes a forest and no mask"):
        call(backend, *qkv, forest=None)
    with pytest.raises(ConfigError, match=r"attention dropout of 0\.1 makes"):
        call(backend, *qkv, forest=forest, dropout=0.1)
    with pytest.raises(ConfigError, match="sliding window of 20 tokens cannot take rows of 21"):
        call(backend, *qkv, forest=forest, sliding_window=20)
    call(backend, *qkv, forest=forest, sliding_window=21)
