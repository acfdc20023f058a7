"""Attention over a row of trees. The root of a tree holds the pictures and the beginning that its prompts share, its children hold the rest
of each prompt, and the leaves hold the texts. Each node attends to its ancestors and itself.

The back ends compute the same function and are registered with transformers' public attention interface. They receive the forest as a
keyword argument that passes through every layer, also when gradient checkpointing recomputes the layer. transformers never infers the trees
from a mask or from position ids that restart, because several kernels silently misinterpret these.

A layer can limit attention to a sliding window along a token's path, and can allow bidirectional attention among a picture's tokens.
``Sight`` describes both. Every back end implements both exactly.

    sdpa      torch's kernel with a mask, on trees of similar length that are padded to the longest; suited to many short trees
    flash_attention_2  one call to flash-attn's variable-length kernel; the keys of each node and its ancestors are gathered
    varlen    the same with torch's own variable-length kernel
    flex      torch's FlexAttention with a block mask, which skips pairs of blocks without attention; no keys are gathered

Shapes: T tokens of the row, H query heads, J key-value heads, D head size, S segments (nodes), B trees, L a padded length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.models.flex_attention import flex
from cfvlm_ds.models.forest import Forest, Sight
from cfvlm_ds.models.variable_length import flash, tower, varlen

BACKENDS = ("sdpa", "flash_attention_2", "varlen", "flex")
_PADDED = 1.25  # largest ratio between the lengths of trees that are padded together


# --- padded trees, with a mask ----------------------------------------------------------------------------------------------------------


def _padded(forest: Forest, sight: Sight) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Sort the trees into buckets of similar length. Return the buckets as (indices of the tokens in the row [B, L], mask [B, 1, L, L]
    bool), and the index of each token in the concatenated buckets.
    """
    lengths = forest.tree_lengths
    order = sorted(range(len(lengths)), key=lambda tree: lengths[tree])
    buckets: list[list[int]] = []
    for tree in order:
        if not buckets or lengths[tree] > _PADDED * lengths[buckets[-1][0]]:
            buckets.append([])
        buckets[-1].append(tree)
    padded_buckets, back, offset = [], torch.empty(forest.bounds[-1], dtype=torch.int64), 0
    node_of = torch.arange(len(forest.lengths)).repeat_interleave(torch.tensor(forest.lengths))
    for bucket in buckets:
        width = lengths[bucket[-1]]
        tokens, nodes = torch.zeros(len(bucket), width, dtype=torch.int64), torch.full((len(bucket), width), len(forest.lengths))
        for b, tree in enumerate(bucket):
            start, length = forest.bounds[tree], lengths[tree]
            tokens[b, :length] = torch.arange(start, start + length)
            nodes[b, :length] = node_of[start : start + length]
            back[start : start + length] = torch.arange(offset + b * width, offset + b * width + length)
        padded_buckets.append((tokens, _tree_mask(forest, sight, tokens, nodes)))
        offset += tokens.numel()
    return padded_buckets, back


def _tree_mask(forest: Forest, sight: Sight, tokens: Tensor, nodes: Tensor) -> Tensor:
    """Return a mask [B, 1, L, L] bool, True where a query may attend to a key.

    ``tokens`` and ``nodes`` [B, L] hold each token's index in the row and its node. For padding, ``nodes`` is the number of nodes. A token
    attends to its own node and the node's ancestors, never to a sibling. Padding attends to itself, because a softmax over no keys is NaN.
    """
    attends = torch.eye(len(forest.lengths) + 1, dtype=torch.bool)
    for node, ancestors in enumerate(forest.ancestors):
        attends[node, list(ancestors)] = True
    attends[-1] = False
    visible = torch.ones(nodes.shape[1], nodes.shape[1], dtype=torch.bool).tril()
    if sight.blocks:
        block = forest.block_of[tokens]
        visible = visible | (block.unsqueeze(2) == block.unsqueeze(1)) & (block >= 0).unsqueeze(1)
    visible = visible & attends[nodes.unsqueeze(2), nodes.unsqueeze(1)]
    if sight.window is not None:
        depth = forest.depths[tokens]
        visible = visible & (depth.unsqueeze(2) - depth.unsqueeze(1) < sight.window)
    return (visible | torch.eye(nodes.shape[1], dtype=torch.bool)).unsqueeze(1)


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


# --- transformers -----------------------------------------------------------------------------------------------------------------------


_PREFIX = "forest_"


def sees_trees(text: Any) -> bool:
    """Return True if a language model with this configuration uses a back end of this module instead of transformers' own attention."""
    return str(text._attn_implementation).startswith(_PREFIX)


def registered(backend: str) -> str:
    """Register a back end with transformers and return its registered name.

    The name is not one that transformers treats specially, so transformers builds no mask for it.
    """
    name = f"{_PREFIX}{BACKENDS.index(backend)}"
    attend = {"sdpa": _sdpa, "flash_attention_2": flash, "varlen": varlen, "flex": flex}[backend]
    AttentionInterface.register(name, _interface(attend))
    return name


def by_segments(vision: Any) -> None:
    """Configure a vision tower to compute the attention within all its pictures or windows in one call to a variable-length kernel.

    transformers passes the segment boundaries to a back end only if its name contains "flash". This name is set only after loading, because
    transformers would otherwise look for the flash-attn package.
    """
    AttentionInterface.register("pictures_flash", tower)
    AttentionMaskInterface.register("pictures_flash", sdpa_mask)
    if not getattr(vision, "attention_dropout", 0):
        vision._attn_implementation = "pictures_flash"


@contextlib.contextmanager
def stock_attention(model: Any) -> Iterator[None]:
    """Use transformers' own attention within the block. It supports only rows with one text, whose scores serve as an independent
    reference.
    """
    parts = model.config.get_text_config(), model.config.vision_config
    backends = [part._attn_implementation for part in parts]
    for part in parts:
        part._attn_implementation = "sdpa"
    try:
        yield
    finally:
        for part, backend in zip(parts, backends, strict=True):
            part._attn_implementation = backend


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
        """Return the attention output [1, T, H, D] for query [1, H, T, D], and key and value [1, J, T, D]."""
        if forest is None or attention_mask is not None:
            raise ValueError("a model loaded for scoring needs a forest and accepts no mask; for other uses, load it with transformers")
        if dropout:
            raise ConfigError(
                f"attention dropout ({dropout}) must be 0, since packed rows would share its noise; set it to 0 in config.json"
            )
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attend(query, key, value, forest, scale, forest.sight(sliding_window)), None

    return function
