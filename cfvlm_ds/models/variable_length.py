"""Attention over a row of trees by variable-length kernels: a node's queries, and gathered for them the keys of their path.

Such a kernel is causal, with the last query of a segment at its last key, so that a sliding window reaches back along the path. A picture
whose tokens see each other in both directions is a segment of a second call, which is not causal and ends with the picture.

Shapes: T tokens of the row, H query heads, J key-value heads, D head size, S segments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cfvlm_ds.models.forest import Forest, Sight

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, tuple[int, int]], Tensor]
"""(query [T, H, D], key and value [gathered, J, D], where queries and keys of each segment begin [S + 1] int32, longest of each, how many
keys a query sees before and after its own, -1 for all) -> [T, H, D]."""


_Call = tuple[Tensor | None, Tensor, Tensor, Tensor, int, int, tuple[int, int]]
"""Places in the row of a call's queries (None: all of them, in order) and keys, and what the kernel takes besides."""


def _calls(forest: Forest, sight: Sight) -> tuple[list[_Call], Tensor | None]:
    """What the kernel is called with; each token's place in what the calls give, one after the other, if that is not its own."""
    blocks = dict(forest.blocks) if sight.blocks else {}
    causal, whole = list[tuple[int, int, int]](), list[tuple[int, int, int]]()  # (node, begin, end)
    for node in range(len(forest.lengths)):
        at, stop = forest.starts[node], forest.starts[node + 1]
        for begin in sorted(begin for begin in blocks if at <= begin < stop):
            causal += [(node, at, begin)] * (at < begin)
            whole.append((node, begin, blocks[begin]))
            at = blocks[begin]
        causal += [(node, at, stop)] * (at < stop)
    before = -1 if sight.window is None else sight.window - 1
    calls = [_call(forest, causal, sight.window, (before, 0))] if causal else []
    if not whole:
        return [(None, *calls[0][1:])], None
    after = -1 if sight.window is None else max(end - begin for _, begin, end in whole)
    calls.append(_call(forest, whole, sight.window, (before, after)))
    return calls, torch.tensor([place for _, begin, end in causal + whole for place in range(begin, end)]).argsort()


def _call(forest: Forest, segments: list[tuple[int, int, int]], window: int | None, reach: tuple[int, int]) -> _Call:
    queries, keys = [torch.arange(begin, end) for _, begin, end in segments], []
    for node, begin, end in segments:
        path = [torch.arange(forest.starts[each], forest.starts[each + 1]) for each in forest.ancestors[node]]
        seen = torch.cat([*path, torch.arange(forest.starts[node], end)])
        keys.append(seen if window is None else seen[-(window - 1 + end - begin) :])

    def begins(parts: list[Tensor]) -> Tensor:
        return torch.tensor([0, *map(len, parts)]).cumsum(0).int()

    longest, most = max(map(len, queries)), max(map(len, keys))
    return torch.cat(queries), torch.cat(keys), begins(queries), begins(keys), longest, most, reach


def _attend(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, forest: Forest, sight: Sight) -> Tensor:
    calls, back = forest.on(_calls, query.device, sight)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    outputs = [
        kernel(q if queries is None else q.index_select(0, queries), k.index_select(0, keys), v.index_select(0, keys), *rest)
        for queries, keys, *rest in calls
    ]
    return (outputs[0] if back is None else torch.cat(outputs).index_select(0, back)).unsqueeze(0)


def flash(query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float, sight: Sight) -> Tensor:
    """By flash-attn's kernel. Query [1, H, T, D], key and value [1, J, T, D] -> [1, T, H, D]."""
    from flash_attn import flash_attn_varlen_func

    def kernel(q: Tensor, k: Tensor, v: Tensor, q_at: Tensor, k_at: Tensor, q_max: int, k_max: int, window: tuple[int, int]) -> Tensor:
        options = {"causal": window[1] == 0, "window_size": window if window[0] >= 0 else (-1, -1)}
        out: Tensor = flash_attn_varlen_func(q, k, v, q_at, k_at, q_max, k_max, softmax_scale=scale, **options)
        return out

    return _attend(kernel, query, key, value, forest, sight)


def varlen(query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float, sight: Sight) -> Tensor:
    """The same by torch's own kernel."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scale}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # before, it took fewer heads of keys unasked
        options["enable_gqa"] = query.shape[1] != key.shape[1]

    def kernel(q: Tensor, k: Tensor, v: Tensor, q_at: Tensor, k_at: Tensor, q_max: int, k_max: int, window: tuple[int, int]) -> Tensor:
        out: Any = varlen_attn(q, k, v, q_at, k_at, q_max, k_max, window_size=window, **options)
        return out

    return _attend(kernel, query, key, value, forest, sight)
