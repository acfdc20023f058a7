"""Attention over a row of trees: images and what comes before every prompt, after them prompts, after those texts. Each node of a tree
sees its ancestors and itself.

The back ends compute the same function and are registered with transformers' public attention interface. The forest reaches them as a
keyword argument that travels through every layer, also when a layer is computed again for its gradient: never as a mask or as restarted
positions, which several kernels silently misread.

A layer may narrow this to a sliding window, which reaches back along a token's own path, and let the tokens of a picture see each other in
both directions; ``Sight`` says so, and each back end computes it exactly or refuses.

    sdpa      trees of similar length padded to one length inside the attention; torch's kernel with a mask: for many short trees
    cascade   root on itself, the rest on the root, the rest's paths on themselves, merged by log-sum-exp: no root is computed twice
    flash_attention_2  one call of flash-attn's variable-length kernel; a node's keys are its ancestors' and its own, gathered
    varlen    the same through torch's own variable-length kernel
    flex      torch's FlexAttention under a block mask: blocks of keys that no query of a block sees are left out, nothing is gathered

Shapes: T tokens of the row, H query heads, J key-value heads, D head size, S segments (nodes), B trees, L a padded length.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion
from transformers import AttentionInterface, AttentionMaskInterface

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.models.flex_attention import flex
from cfvlm_ds.models.forest import Forest, Sight
from cfvlm_ds.models.variable_length import flash, varlen

BACKENDS = ("sdpa", "cascade", "flash_attention_2", "varlen", "flex")
_PADDED = 1.25  # trees are padded to one length while the longest has at most this many times the tokens of the shortest


# --- padded trees, with a mask ----------------------------------------------------------------------------------------------------------


def _padded(forest: Forest, sight: Sight) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Buckets of trees as (tokens [B, L] by their place in the row, mask [B, 1, L, L] bool); each token's place in the padded buckets."""
    lengths = forest.tree_lengths
    order = sorted(range(len(lengths)), key=lambda tree: lengths[tree])
    buckets: list[list[int]] = []
    for tree in order:
        if not buckets or lengths[tree] > _PADDED * lengths[buckets[-1][0]]:
            buckets.append([])
        buckets[-1].append(tree)
    found, back, offset = [], torch.empty(forest.bounds[-1], dtype=torch.int64), 0
    node_of = torch.arange(len(forest.lengths)).repeat_interleave(torch.tensor(forest.lengths))
    for bucket in buckets:
        width = lengths[bucket[-1]]
        tokens, nodes = torch.zeros(len(bucket), width, dtype=torch.int64), torch.full((len(bucket), width), len(forest.lengths))
        for b, tree in enumerate(bucket):
            start, length = forest.bounds[tree], lengths[tree]
            tokens[b, :length] = torch.arange(start, start + length)
            nodes[b, :length] = node_of[start : start + length]
            back[start : start + length] = torch.arange(offset + b * width, offset + b * width + length)
        found.append((tokens, _tree_mask(forest, sight, tokens, nodes)))
        offset += tokens.numel()
    return found, back


def _tree_mask(forest: Forest, sight: Sight, tokens: Tensor, nodes: Tensor) -> Tensor:
    """[B, 1, L, L] bool, true where a query may see a key: ``tokens`` and ``nodes`` [B, L] are each token's place in the row and its node,
    one past the last for padding.

    A token sees its ancestors and its own node, never a sibling. Padding sees itself, because a row of nothing is NaN.
    """
    sees = torch.eye(len(forest.lengths) + 1, dtype=torch.bool)
    for node, ancestors in enumerate(forest.ancestors):
        sees[node, list(ancestors)] = True
    sees[-1] = False
    seen = torch.ones(nodes.shape[1], nodes.shape[1], dtype=torch.bool).tril()
    if sight.blocks:
        block = forest.block_of[tokens]
        seen = seen | (block.unsqueeze(2) == block.unsqueeze(1)) & (block >= 0).unsqueeze(1)
    seen = seen & sees[nodes.unsqueeze(2), nodes.unsqueeze(1)]
    if sight.window is not None:
        depth = forest.depths[tokens]
        seen = seen & (depth.unsqueeze(2) - depth.unsqueeze(1) < sight.window)
    return (seen | torch.eye(nodes.shape[1], dtype=torch.bool)).unsqueeze(1)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float, sight: Sight) -> Tensor:
    buckets, back = forest.on(_padded, query.device, sight)
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
    """Three partial attentions a tree, merged by their log-sum-exp: the root on itself, all that is below it on the root, and the paths
    from there to the leaves on themselves.

    The gradient of a merged attention is the sum of the partial ones, each computed with the merged output and the merged log-sum-exp
    (Ring Attention, arXiv 2310.01889). Letting autograd go through the merge instead loses the gradient of the log-sum-exp.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float) -> Tensor:
        out = torch.empty_like(query)
        lse = query.new_empty(query.shape[:-1], dtype=torch.float64 if query.dtype == torch.float64 else torch.float32)
        for root, rest, paths in forest.on(_tree_slices, query.device):
            out[:, :, root], lse[:, :, root] = _forward(*(t[:, :, root] for t in (query, key, value)), is_causal=True, scale=scale)
            if paths is None:
                continue
            q, k, v = (t[:, :, rest] for t in (query, key, value))
            before, before_lse = _forward(q, key[:, :, root], value[:, :, root], scale=scale)
            own, own_lse = _forward(*(paths.pad(t) for t in (q, k, v)), is_causal=True, scale=scale)
            own, own_lse = paths.first(own), paths.first(own_lse)
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
        for root, rest, paths in ctx.forest.on(_tree_slices, query.device):
            whole = tuple(t[:, :, root] for t in (grad, query, key, value, out, lse))
            of_root = _backward(*whole, 0.0, True, scale=ctx.scale)
            if paths is None:
                for into, of in zip(grads, of_root, strict=True):
                    into[:, :, root] = of
                continue
            g, q, k, v, o, m = (t[:, :, rest] for t in (grad, query, key, value, out, lse))
            of_before = _backward(g, q, key[:, :, root], value[:, :, root], o, m, 0.0, False, scale=ctx.scale)
            of_own = _backward(paths.pad_once(g), *(paths.pad(t) for t in (q, k, v, o, m)), 0.0, True, scale=ctx.scale)
            grads[0][:, :, root] = of_root[0]
            grads[0][:, :, rest] = of_before[0] + paths.total(of_own[0])
            for into, alone, shared, own in zip(grads[1:], of_root[1:], of_before[1:], of_own[1:], strict=True):
                into[:, :, root] = alone + shared
                into[:, :, rest] = paths.total(own)
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

    def first(self, padded: Tensor) -> Tensor:
        if len(set(self.lengths)) == 1:
            return padded.transpose(0, 1).flatten(1, 2).unsqueeze(0)
        return torch.cat([padded[b, :, :length] for b, length in enumerate(self.lengths)], 1).unsqueeze(0)

    pad_once, total = pad, first


class _Paths:
    """The same where branches have branches: a path for each leaf, from below the root, so that a node with several leaves is in several.

    What a node computes it computes in each of its paths; it is taken from the ``first``. There alone it has a gradient (``pad_once``),
    while its keys and values have one in every path (``total``). This repeats attention among few tokens and nothing else.

    Args:
        paths: places of each path's tokens, counted from the first token below the root.
    """

    def __init__(self, paths: Sequence[Sequence[int]]) -> None:
        width = max(map(len, paths))
        self.places = torch.tensor([[*path, *[0] * (width - len(path))] for path in paths])
        self.real = torch.tensor([[True] * len(path) + [False] * (width - len(path)) for path in paths])
        firsts: dict[int, int] = {}
        for row, path in enumerate(paths):
            for column, place in enumerate(path):
                firsts.setdefault(place, row * width + column)
        self.firsts = torch.tensor([firsts[place] for place in range(len(firsts))])
        self.once = torch.zeros(self.places.numel(), dtype=torch.bool).index_fill(0, self.firsts, True).view_as(self.places)

    def pad(self, flat: Tensor) -> Tensor:
        return self._padded(flat, self.real)

    def pad_once(self, flat: Tensor) -> Tensor:
        return self._padded(flat, self.once)

    def first(self, padded: Tensor) -> Tensor:
        return padded.transpose(0, 1).flatten(1, 2).index_select(1, self.firsts).unsqueeze(0)

    def total(self, padded: Tensor) -> Tensor:
        flat = padded.transpose(0, 1).flatten(1, 2)[:, self.real.view(-1)]
        into = flat.new_zeros(flat.shape[0], len(self.firsts), *flat.shape[2:])
        return into.index_add_(1, self.places[self.real], flat).unsqueeze(0)

    def _padded(self, flat: Tensor, kept: Tensor) -> Tensor:
        taken = flat[0].index_select(1, self.places.view(-1)).unflatten(1, self.places.shape).transpose(0, 1)
        return taken.masked_fill(~kept.view(len(kept), 1, -1, *[1] * (taken.dim() - 3)), 0)


def _tree_slices(forest: Forest) -> list[tuple[slice, slice, _Branches | _Paths | None]]:
    """(root, all that is below it, how that is padded; None for nothing) of each tree; a root with one child makes one root of both."""
    found: list[tuple[slice, slice, _Branches | _Paths | None]] = []
    inner = set(forest.parents)
    for root, after in itertools.pairwise(forest.roots):
        start, stop, top = forest.starts[root], forest.starts[after], root
        while top + 1 < after and forest.parents[root:after].count(top) == 1:
            top += 1
        border = forest.starts[top + 1]
        leaves = [node for node in range(top + 1, after) if node not in inner]
        nodes = [[*(above for above in forest.ancestors[leaf] if above > top), leaf] for leaf in leaves]
        paths: _Branches | _Paths | None = None
        if leaves:
            of_two_levels = all(len(path) == 1 for path in nodes)
            paths = (
                _Branches(tuple(forest.lengths[leaf] for leaf in leaves))
                if of_two_levels
                else _Paths(
                    [[place - border for node in path for place in range(forest.starts[node], forest.starts[node + 1])] for path in nodes]
                )
            )
        found.append((slice(start, border), slice(border, stop), paths))
    return found


def _cascade(query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float, sight: Sight) -> Tensor:
    if sight != Sight():
        what = "sliding windows" if sight.window is not None else "pictures whose tokens see each other in both directions"
        raise ConfigError(f"model.attn_implementation cascade cannot compute {what}; use auto or sdpa")
    group = query.shape[1] // key.shape[1]
    if group > 1 and not _GROUPED:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    out: Tensor = _Cascade.apply(query, key, value, forest, scale)
    return out.transpose(1, 2)


# --- transformers -----------------------------------------------------------------------------------------------------------------------


_PREFIX = "forest_"


def sees_trees(text: Any) -> bool:
    """Whether the language model of this configuration has one of these back ends, and not a stock one."""
    return str(text._attn_implementation).startswith(_PREFIX)


def registered(backend: str) -> str:
    """Register a back end with transformers and return its name there, which contains none of the names that the library treats
    specially."""
    name = f"{_PREFIX}{BACKENDS.index(backend)}"
    attend = {"sdpa": _sdpa, "cascade": _cascade, "flash_attention_2": flash, "varlen": varlen, "flex": flex}[backend]
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


def _interface(attend: Callable[[Tensor, Tensor, Tensor, Forest, float, Sight], Tensor]) -> Callable[..., tuple[Tensor, None]]:
    def function(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        forest: Forest | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Query [1, H, T, D], key and value [1, J, T, D] -> [1, T, H, D]."""
        if forest is None or attention_mask is not None:
            raise ValueError("a model loaded for scoring takes a forest and no mask; load it with transformers for anything else")
        if dropout:
            raise ConfigError(f"attention dropout of {dropout} makes scores depend on what is packed together; set it to 0 in config.json")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attend(query, key, value, forest, scale, forest.sight(sliding_window)), None

    return function
