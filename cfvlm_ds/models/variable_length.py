"""Attention with variable-length kernels, over a row of trees or within the pictures or windows of a vision tower.

In a row of trees, a segment consists of a node's queries and the keys gathered along its path. One causal call of the kernel handles all
segments. It aligns a segment's last query with its last key, so a sliding window extends back along the path. If attention within pictures
is bidirectional, a node's queries are split around its pictures. Each picture's queries then form a segment of a separate, non-causal call,
and the keys of this segment end with the picture's last token.

Shapes: T tokens of the row, H query heads, J key-value heads, D head size, S segments.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cfvlm_ds.models.forest import Forest, Sight

Kernel = Callable[..., Tensor]
"""(number of keys that a query attends to before and after its own key, -1 for all; scale; query [T, H, D], key and value [gathered, J, D];
starts of each segment's queries and keys [S + 1] int32; lengths of the longest queries and keys) -> [T, H, D].
"""


def _calls(forest: Forest, sight: Sight) -> tuple[list[Any], Tensor | None]:
    """Return the kernel calls, and the index of each token in their concatenated outputs (None if they are in row order).

    A call consists of the row indices of its queries (None for all, in order), those of its keys, and the kernel's other arguments.
    """
    blocks = dict(forest.blocks) if sight.blocks else {}
    causal, bidirectional = list[tuple[int, int, int]](), list[tuple[int, int, int]]()  # (node, begin, end)
    for node in range(len(forest.lengths)):
        at, stop = forest.starts[node], forest.starts[node + 1]
        for begin in sorted(begin for begin in blocks if at <= begin < stop):
            causal += [(node, at, begin)] * (at < begin)
            bidirectional.append((node, begin, blocks[begin]))
            at = blocks[begin]
        causal += [(node, at, stop)] * (at < stop)
    before = -1 if sight.window is None else sight.window - 1
    calls = [_call(forest, causal, sight.window, (before, 0))] if causal else []
    if not bidirectional:
        return [(None, *calls[0][1:])], None
    after = -1 if sight.window is None else max(end - begin for _, begin, end in bidirectional)
    calls.append(_call(forest, bidirectional, sight.window, (before, after)))
    return calls, torch.tensor([place for _, begin, end in causal + bidirectional for place in range(begin, end)]).argsort()


def _call(forest: Forest, segments: list[tuple[int, int, int]], window: int | None, reach: tuple[int, int]) -> Any:
    queries, keys = [torch.arange(begin, end) for _, begin, end in segments], []
    for node, begin, end in segments:
        path = [torch.arange(forest.starts[ancestor], forest.starts[ancestor + 1]) for ancestor in forest.ancestors[node]]
        key_places = torch.cat([*path, torch.arange(forest.starts[node], end)])
        keys.append(key_places if window is None else key_places[-(window - 1 + end - begin) :])

    def begins(parts: list[Tensor]) -> Tensor:
        return torch.tensor([0, *map(len, parts)]).cumsum(0).int()

    longest, most = max(map(len, queries)), max(map(len, keys))
    return torch.cat(queries), torch.cat(keys), begins(queries), begins(keys), longest, most, reach


def _attend(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float, sight: Sight) -> Tensor:
    """Return the attention output [1, T, H, D] for query [1, H, T, D], and key and value [1, J, T, D]."""
    calls, back = forest.on(_calls, query.device, sight)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    outputs = [
        kernel(reach, scale, q if queries is None else q.index_select(0, queries), *(t.index_select(0, keys) for t in (k, v)), *rest)
        for queries, keys, *rest, reach in calls
    ]
    return (outputs[0] if back is None else torch.cat(outputs).index_select(0, back)).unsqueeze(0)


def _flash(window: tuple[int, int], scale: float, *segments: Any) -> Any:
    function = flash_attention()
    assert function is not None
    reach = window if window[0] >= 0 else (-1, -1)
    return function(*segments, softmax_scale=scale, causal=window[1] == 0, window_size=reach)


def _varlen(window: tuple[int, int], scale: float, *segments: Any) -> Any:
    from torch.nn.attention.varlen import varlen_attn

    grouped = segments[0].shape[1] != segments[1].shape[1]
    return varlen_attn(*segments, scale=scale, window_size=window, enable_gqa=grouped)


def _padded(window: tuple[int, int], scale: float, q: Tensor, k: Tensor, v: Tensor, at: Tensor, _: Tensor, longest: int, __: int) -> Tensor:
    """Compute bidirectional attention within segments, which are padded to the longest. Segment boundaries are never copied to the host."""
    tokens = torch.arange(len(q), dtype=at.dtype, device=q.device)
    places = at[:-1].unsqueeze(1) + torch.arange(longest, device=q.device)
    query, key, value = (tensor[places.clamp(max=len(q) - 1)].transpose(1, 2) for tensor in (q, k, v))
    is_real = (places < at[1:].unsqueeze(1))[:, None, None]
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=is_real, scale=scale)
    segment = torch.searchsorted(at[1:], tokens, right=True)
    return out.transpose(1, 2).flatten(0, 1)[segment * longest + tokens - at[segment]]


KERNELS: dict[str, Kernel] = {"flash_attention_2": _flash, "varlen": _varlen, "sdpa": _padded}
flash: Kernel = functools.partial(_attend, _flash)
varlen: Kernel = functools.partial(_attend, _varlen)


def takes(dtype: torch.dtype, heads: Collection[int]) -> bool:
    """Return True if flash attention supports this dtype and these head sizes. Some heads of Gemma 4, for example, are too large."""
    return dtype in (torch.float16, torch.bfloat16) and all(head <= 256 and head % 8 == 0 for head in heads)


def flash_attention() -> Callable[..., Any] | None:
    """Return ``flash_attn_varlen_func`` from flash-attn 2 or, failing that, flash-attn 3. Return None if neither is installed."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if is_flash_attn_2_available():
        from flash_attn import flash_attn_varlen_func
    elif is_flash_attn_3_available():
        from flash_attn_interface import flash_attn_varlen_func
    else:
        return None
    function: Callable[..., Any] = flash_attn_varlen_func
    return function


def fastest(dtype: torch.dtype, heads: Collection[int], on_gpu: bool) -> str:
    """Return the name of the first kernel in KERNELS that is installed and supports this dtype and these head sizes."""
    if not on_gpu or not takes(dtype, heads):
        return "sdpa"
    return "flash_attention_2" if flash_attention() is not None else "varlen" if has_varlen() else "sdpa"


def has_varlen() -> bool:
    """Return True if torch's variable-length kernel accepts a scale and a window. In torch 2.10, it does not."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"scale", "window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()


def tower(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **options: Any,
) -> Any:
    """Compute a tower's attention, [B, H, T, D] -> [B, T, H, D]: standard SDPA or, if the tower supplies segment boundaries
    (``cu_seq_lens_q``), attention within each segment.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    kernel = KERNELS[fastest(query.dtype, query.shape[-1:], query.device.type != "cpu")]
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    out = kernel((-1, -1), scaling, q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    return out.unsqueeze(0), None
