"""Gated delta nets over a row of trees (Qwen3.5). These layers carry a state from token to token, so no mask can separate the trees.

Every node starts from its parent's final state, and its convolution also reads the last tokens of its ancestors. A text therefore has the
same outputs as in a row of its own. The nodes of one level are computed together, and the next level starts from their states.

Shapes: T tokens of the row, N nodes of a batch, L their padded length, C channels of the convolution, H heads, D head size.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from cfvlm_ds.models.forest import Forest
from cfvlm_ds.models.forest_attention import sees_trees

_CHUNK = 64  # tokens per chunk in transformers' rule, which pads to whole chunks
_PADDED = 1.25  # largest ratio between the chunk counts of nodes that are padded together

Level = list[tuple[Tensor, Tensor, Tensor | None]]
"""Batches of nodes in one level of the trees. A batch has three parts: its tokens' indices in the row, [N, L] (T for padding); the indices
of its real tokens among the N * L; and the indices of its nodes' parents in the level above, [N] (None for roots).
"""


def fork_states(model: nn.Module) -> None:
    """Patch a model's gated delta nets to support packed prefix trees: each branch continues from the state at the end of its prefix. The
    patch has no effect while the model uses transformers' own attention.
    """
    text = model.config.get_text_config()  # type: ignore[operator, union-attr]
    for module in model.modules():
        if type(module).__name__.endswith("GatedDeltaNet") and "forward" not in vars(module):
            module.forward = functools.partial(_forward, module, module.forward, text)


def _forward(
    module: Any, original: Callable[..., Tensor], text: Any, hidden_states: Tensor, forest: Forest | None = None, **options: Any
) -> Tensor:
    if forest is None or not sees_trees(text):
        return original(hidden_states, **options)
    if options.get("cache") is not None or options.get("attention_mask") is not None:
        raise ValueError(
            "a model loaded for scoring needs a forest and accepts no cache or mask; for other uses, load it with transformers"
        )
    mixed = _convolved(module, module.in_proj_qkv(hidden_states), forest)
    sizes = [module.key_dim, module.key_dim, module.value_dim]
    query, key, value = (
        part.unflatten(-1, (-1, size))
        for part, size in zip(mixed.split(sizes, -1), (module.head_k_dim, module.head_k_dim, module.head_v_dim), strict=True)
    )
    gate = module.in_proj_z(hidden_states).reshape(-1, module.head_v_dim)
    beta = module.in_proj_b(hidden_states).sigmoid()
    decay = -module.A_log.float().exp() * nn.functional.softplus(module.in_proj_a(hidden_states).float() + module.dt_bias)
    out = _ruled(module, query, key, value, decay, beta, forest)
    projected: Tensor = module.out_proj(module.norm(out.reshape(-1, module.head_v_dim), gate).reshape(*hidden_states.shape[:2], -1))
    return projected


def _convolved(module: Any, mixed: Tensor, forest: Forest) -> Tensor:
    """Return the causal convolution of ``mixed`` [1, T, C] along each path. One call to the layer suffices, because a copy of its
    ancestors' last tokens is inserted before each node.
    """
    places, own = forest.on(_windows, mixed.device, module.conv_kernel_size)
    spread = _with_zeros(mixed).index_select(1, places).transpose(1, 2)
    out = ACT2FN[module.activation](module.conv1d(spread)[..., : len(places)])
    return out.index_select(2, own).transpose(1, 2).to(mixed.dtype)


def _windows(forest: Forest, size: int) -> tuple[Tensor, Tensor]:
    """Return two index tensors. The first lists all nodes' tokens, each node preceded by the ``size - 1`` tokens before it on its path (T
    where there is none). The second holds the positions of the nodes' own tokens in the first.
    """
    places, own, nothing = list[int](), list[int](), forest.bounds[-1]
    for node, ancestors in enumerate(forest.ancestors):
        before = list[int]()
        for above in reversed(ancestors):
            if len(before) < size - 1:
                before = [*range(forest.starts[above], forest.starts[above + 1]), *before]
        before = [*[nothing] * (size - 1), *before][len(before) :]
        places += before
        own += range(len(places), len(places) + forest.lengths[node])
        places += range(forest.starts[node], forest.starts[node + 1])
    return torch.tensor(places), torch.tensor(own)


def _ruled(module: Any, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, forest: Forest) -> Tensor:
    """Apply the gated delta rule along each path, level by level, and return the outputs [T, H, D]. A node's initial state is its parent's
    final state.

    Padding leaves a state unchanged: its key is zero, and nothing decays.
    """
    rule = sys.modules[type(module).__module__].torch_chunk_gated_delta_rule  # transformers substitutes a faster kernel if one is installed
    levels, back = forest.on(_levels, query.device)
    padded = [_with_zeros(padded_input)[0] for padded_input in (query, key, value, decay, beta)]
    outputs: list[Tensor] = []
    parent_states: Tensor | None = None
    for level in levels:
        states = []
        for places, real, parents in level:
            q, k, v, g, b = (padded_input.index_select(0, places.view(-1)).unflatten(0, places.shape) for padded_input in padded)
            initial = None if parent_states is None else parent_states.index_select(0, parents)
            out, state = rule(
                q, k, v, g=g, beta=b, initial_state=initial, output_final_state=level is not levels[-1], use_qk_l2norm_in_kernel=True
            )
            outputs.append(out.flatten(0, 1).index_select(0, real))
            states.append(state)
        parent_states = None if level is levels[-1] else torch.cat(states)
    return torch.cat(outputs).index_select(0, back)


def _levels(forest: Forest) -> tuple[list[Level], Tensor]:
    """Return each level's batches of nodes, from the roots down, and the index of each token in the concatenated outputs of all batches."""
    levels: list[Level] = []
    back, offset = torch.empty(forest.bounds[-1], dtype=torch.int64), 0
    above = dict[int, int]()  # node -> its index in the level above
    for depth in range(max(map(len, forest.ancestors)) + 1):
        nodes = sorted((n for n, ancestors in enumerate(forest.ancestors) if len(ancestors) == depth), key=lambda n: forest.lengths[n])
        batches: list[list[int]] = []
        for node in nodes:
            if not batches or _chunks(forest, node) > _PADDED * _chunks(forest, batches[-1][0]):
                batches.append([])
            batches[-1].append(node)
        level: Level = []
        for batch in batches:
            width = forest.lengths[batch[-1]]
            places = torch.full((len(batch), width), forest.bounds[-1])
            for row, node in enumerate(batch):
                start, stop = forest.starts[node], forest.starts[node + 1]
                places[row, : stop - start] = torch.arange(start, stop)
                back[start:stop] = torch.arange(offset, offset + stop - start)
                offset += stop - start
            real = (places.view(-1) < forest.bounds[-1]).nonzero().squeeze(1)
            parents = torch.tensor([above[forest.parents[node]] for node in batch]) if depth else None
            level.append((places, real, parents))
        levels.append(level)
        above = {node: place for place, node in enumerate(node for batch in batches for node in batch)}
    return levels, back


def _chunks(forest: Forest, node: int) -> int:
    return -(-forest.lengths[node] // _CHUNK)


def _with_zeros(row: Tensor) -> Tensor:
    """Append one token of zeros to a row [1, T, ...]."""
    return torch.cat([row, row.new_zeros(1, 1, *row.shape[2:])], 1)
