"""Attention over a row of trees: a tree is a prefix (prompt and images) and branches after it (texts) that see the prefix and themselves.

The back ends compute the same function and are registered with transformers' public attention interface. The forest reaches them as a
keyword argument that travels through every layer, also when a layer is computed again for its gradient: never as a mask or as restarted
positions, which several kernels silently misread.

    sdpa      trees of similar length padded to one length inside the attention; torch's kernel with a mask: for many short trees
    cascade   prefix on itself, branches on their prefix, branches on themselves, merged by log-sum-exp: nothing is computed twice
    flash_attention_2  one call of flash-attn's variable-length kernel; a branch's keys are its prefix's and its own, gathered
    varlen    the same through torch's own variable-length kernel

Shapes: T tokens of the row, H query heads, J key-value heads, D head size, S segments (prefixes and branches), B trees, L a padded length.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion
from transformers import AttentionInterface, AttentionMaskInterface

from cfvlm_ds.core.errors import ConfigError

BACKENDS = ("sdpa", "cascade", "flash_attention_2", "varlen")
_PADDED = 1.25  # trees are padded to one length while the longest has at most this many times the tokens of the shortest


@dataclass(frozen=True)
class Forest:
    """The trees of a row in their order: tokens of each prefix, and of each of its branches."""

    prefixes: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Tokens of each tree."""
        return [prefix + sum(branches) for prefix, branches in zip(self.prefixes, self.branches, strict=True)]

    @functools.cached_property
    def bounds(self) -> list[int]:
        """Where each tree begins and, last, where the row ends."""
        return list(itertools.accumulate(self.lengths, initial=0))

    @functools.cached_property
    def segments(self) -> list[tuple[int, int, int, int]]:
        """(start, stop, prefix start, prefix stop) of each prefix and branch; of a prefix, the prefix before it is empty."""
        found = []
        for start, prefix, branches in zip(self.bounds, self.prefixes, self.branches, strict=False):
            found.append((start, start + prefix, start, start))
            at = start + prefix
            for length in branches:
                found.append((at, at + length, start, start + prefix))
                at += length
        return found

    @functools.cached_property
    def _placed(self) -> dict[Any, Any]:
        return {}

    def on(self, build: Callable[[Forest], Any], device: torch.device) -> Any:
        """The result of ``build`` for the forest, on ``device``; computed once for all layers."""
        key = build, device
        if key not in self._placed:
            self._placed[key] = _move(build(self), device)
        return self._placed[key]


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    return type(value)(_move(item, device) for item in value) if isinstance(value, list | tuple) else value


# --- padded trees, with a mask ----------------------------------------------------------------------------------------------------------


def _padded(forest: Forest) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Buckets of trees as (tokens [B, L] by their place in the row, mask [B, 1, L, L] bool); each token's place in the padded buckets."""
    order = sorted(range(len(forest.lengths)), key=lambda tree: forest.lengths[tree])
    buckets: list[list[int]] = []
    for tree in order:
        if not buckets or forest.lengths[tree] > _PADDED * forest.lengths[buckets[-1][0]]:
            buckets.append([])
        buckets[-1].append(tree)
    found, back, offset = [], torch.empty(forest.bounds[-1], dtype=torch.int64), 0
    for bucket in buckets:
        width = forest.lengths[bucket[-1]]
        tokens, branch = torch.zeros(len(bucket), width, dtype=torch.int64), torch.full((len(bucket), width), -2)
        for b, tree in enumerate(bucket):
            start, length = forest.bounds[tree], forest.lengths[tree]
            tokens[b, :length] = torch.arange(start, start + length)
            sizes = torch.tensor([forest.prefixes[tree], *forest.branches[tree]])
            branch[b, :length] = torch.arange(-1, len(sizes) - 1).repeat_interleave(sizes)
            back[start : start + length] = torch.arange(offset + b * width, offset + b * width + length)
        found.append((tokens, _tree_mask(branch)))
        offset += tokens.numel()
    return found, back


def _tree_mask(branch: Tensor) -> Tensor:
    """[B, 1, L, L] bool, true where a query may see a key: ``branch`` [B, L] is -1 for the prefix, b for branch b, -2 for padding.

    A token sees the prefix and its own branch, never a sibling. Padding sees itself, because a row of nothing is NaN.
    """
    query, key = branch.unsqueeze(2), branch.unsqueeze(1)
    causal = torch.ones(branch.shape[1], branch.shape[1], dtype=torch.bool).tril()
    return ((causal & ((key == -1) | (key == query)) & (key >= -1)) | torch.eye(branch.shape[1], dtype=torch.bool)).unsqueeze(1)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float) -> Tensor:
    buckets, back = forest.on(_padded, query.device)
    group = query.shape[1] // key.shape[1]
    outputs = []
    for tokens, mask in buckets:
        q, k, v = (t[0].index_select(1, tokens.view(-1)).unflatten(1, tokens.shape).transpose(0, 1) for t in (query, key, value))
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, back).unsqueeze(0)


# --- cascade ----------------------------------------------------------------------------------------------------------------------------

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_GROUPED = TorchVersion(torch.__version__) >= "2.9"  # they take fewer heads of keys and values than of queries (pytorch #157893)


class _Cascade(torch.autograd.Function):
    """Three partial attentions a tree, merged by their log-sum-exp.

    The gradient of a merged attention is the sum of the partial ones, each computed with the merged output and the merged log-sum-exp
    (Ring Attention, arXiv 2310.01889). Letting autograd go through the merge instead loses the gradient of the log-sum-exp.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float) -> Tensor:
        out = torch.empty_like(query)
        lse = query.new_empty(query.shape[:-1], dtype=torch.float64 if query.dtype == torch.float64 else torch.float32)
        for prefix, rest, branches in _tree_slices(forest):
            out[:, :, prefix], lse[:, :, prefix] = _forward(*(t[:, :, prefix] for t in (query, key, value)), is_causal=True, scale=scale)
            if not branches.lengths:
                continue
            q, k, v = (t[:, :, rest] for t in (query, key, value))
            before, before_lse = _forward(q, key[:, :, prefix], value[:, :, prefix], scale=scale)
            own, own_lse = _forward(*(branches.pad(t) for t in (q, k, v)), is_causal=True, scale=scale)
            own, own_lse = branches.flat(own), branches.flat(own_lse)
            merged = torch.logaddexp(before_lse, own_lse)
            out[:, :, rest] = (before_lse - merged).exp().unsqueeze(-1) * before + (own_lse - merged).exp().unsqueeze(-1) * own
            lse[:, :, rest] = merged
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.forest, ctx.scale = forest, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, out, lse = ctx.saved_tensors
        grads = tuple(torch.empty_like(t) for t in (query, key, value))
        for prefix, rest, branches in _tree_slices(ctx.forest):
            whole = tuple(t[:, :, prefix] for t in (grad, query, key, value, out, lse))
            of_prefix = _backward(*whole, 0.0, True, scale=ctx.scale)
            if not branches.lengths:
                for into, of in zip(grads, of_prefix, strict=True):
                    into[:, :, prefix] = of
                continue
            g, q, k, v, o, m = (t[:, :, rest] for t in (grad, query, key, value, out, lse))
            of_before = _backward(g, q, key[:, :, prefix], value[:, :, prefix], o, m, 0.0, False, scale=ctx.scale)
            of_own = _backward(*(branches.pad(t) for t in (g, q, k, v, o, m)), 0.0, True, scale=ctx.scale)
            grads[0][:, :, prefix] = of_prefix[0]
            grads[0][:, :, rest] = of_before[0] + branches.flat(of_own[0])
            for into, alone, shared, own in zip(grads[1:], of_prefix[1:], of_before[1:], of_own[1:], strict=True):
                into[:, :, prefix] = alone + shared
                into[:, :, rest] = branches.flat(own)
        return *grads, None, None


@dataclass(frozen=True)
class _Branches:
    """The branches of a tree, [1, heads, tokens, ...], as one batch padded at the end, [branches, heads, longest, ...], and back.

    A causal attention never looks at padding, and padding has a gradient of zero.
    """

    lengths: tuple[int, ...]

    def pad(self, flat: Tensor) -> Tensor:
        if len(set(self.lengths)) == 1:
            return flat[0].unflatten(1, (len(self.lengths), -1)).transpose(0, 1)
        padded = flat.new_zeros(len(self.lengths), flat.shape[1], max(self.lengths), *flat.shape[3:])
        for b, part in enumerate(flat[0].split(self.lengths, 1)):
            padded[b, :, : part.shape[1]] = part
        return padded

    def flat(self, padded: Tensor) -> Tensor:
        if len(set(self.lengths)) == 1:
            return padded.transpose(0, 1).flatten(1, 2).unsqueeze(0)
        return torch.cat([padded[b, :, :length] for b, length in enumerate(self.lengths)], 1).unsqueeze(0)


def _tree_slices(forest: Forest) -> Iterator[tuple[slice, slice, _Branches]]:
    """(prefix, all its branches, how they are padded) of each tree; a prefix with its only branch is an ordinary causal sequence."""
    for (start, stop), prefix, branches in zip(itertools.pairwise(forest.bounds), forest.prefixes, forest.branches, strict=True):
        border, several = (stop, ()) if len(branches) == 1 else (start + prefix, branches)
        yield slice(start, border), slice(border, stop), _Branches(several)


def _cascade(query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float) -> Tensor:
    group = query.shape[1] // key.shape[1]
    if group > 1 and not _GROUPED:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    out: Tensor = _Cascade.apply(query, key, value, forest, scale)
    return out.transpose(1, 2)


# --- variable-length kernels ------------------------------------------------------------------------------------------------------------

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float], Tensor]
"""(query [T, H, D], key and value [gathered, J, D], where queries and keys of each segment begin [S + 1] int32, longest of each, scale) ->
[T, H, D]; causal, with the last query of a segment at its last key."""


def _gathered(forest: Forest) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """(place of every key in the row, where the segments' queries and keys begin, longest of each)."""
    places, queries, keys = [], [0], [0]
    for start, stop, before, prefix in forest.segments:
        places += [torch.arange(before, prefix), torch.arange(start, stop)]
        queries.append(stop)
        keys.append(keys[-1] + prefix - before + stop - start)
    begins = (torch.tensor(queries, dtype=torch.int32), torch.tensor(keys, dtype=torch.int32))
    longest = (int(begins[0].diff().max()), int(begins[1].diff().max()))
    return torch.cat(places), *begins, *longest


def _variable_length(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float) -> Tensor:
    places, q_at, k_at, q_max, k_max = forest.on(_gathered, query.device)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    return kernel(q, k.index_select(0, places), v.index_select(0, places), q_at, k_at, q_max, k_max, scale).unsqueeze(0)


def _flash(query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    def kernel(q: Tensor, k: Tensor, v: Tensor, q_at: Tensor, k_at: Tensor, q_max: int, k_max: int, scale: float) -> Tensor:
        out: Tensor = flash_attn_varlen_func(q, k, v, q_at, k_at, q_max, k_max, softmax_scale=scale, causal=True)
        return out

    return _variable_length(kernel, query, key, value, forest, scale)


def _varlen(query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    def kernel(q: Tensor, k: Tensor, v: Tensor, q_at: Tensor, k_at: Tensor, q_max: int, k_max: int, scale: float) -> Tensor:
        causal = (-1, 0)
        out: Any = varlen_attn(q, k, v, q_at, k_at, q_max, k_max, scale=scale, window_size=causal, enable_gqa=q.shape[1] != k.shape[1])
        return out

    return _variable_length(kernel, query, key, value, forest, scale)


# --- transformers -----------------------------------------------------------------------------------------------------------------------


def registered(backend: str) -> str:
    """Register a back end with transformers and return its name there, which contains none of the names that the library treats
    specially."""
    name = f"forest_{BACKENDS.index(backend)}"
    attend = {"sdpa": _sdpa, "cascade": _cascade, "flash_attention_2": _flash, "varlen": _varlen}[backend]
    AttentionInterface.register(name, _interface(attend))
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    return name


@contextlib.contextmanager
def stock_attention(model: Any) -> Iterator[None]:
    """Inside the block the model's forward is the library's own, on ordinary rows: an independent reference for its scores."""
    text = model.config.get_text_config()
    chosen, text._attn_implementation = text._attn_implementation, "sdpa"
    try:
        yield
    finally:
        text._attn_implementation = chosen


def _interface(attend: Callable[[Tensor, Tensor, Tensor, Forest, float], Tensor]) -> Callable[..., tuple[Tensor, None]]:
    def function(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        forest: Forest | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Query [1, H, T, D], key and value [1, J, T, D] -> [1, T, H, D]."""
        if forest is None or attention_mask is not None:
            raise ValueError("a model loaded for scoring takes a forest and no mask; load it with transformers for anything else")
        if dropout:
            raise ConfigError(f"attention dropout of {dropout} makes scores depend on what is packed together; set it to 0 in config.json")
        if (window := options.get("sliding_window")) is not None and window < max(forest.lengths):
            raise ConfigError(f"a sliding window of {window} tokens cannot take rows of {max(forest.lengths)}; shorten prompts or images")
        return attend(query, key, value, forest, query.shape[-1] ** -0.5 if scaling is None else scaling), None

    return function
