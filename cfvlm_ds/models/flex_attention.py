"""FlexAttention over a row of trees, with a block mask."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cfvlm_ds.models.forest import Forest, Sight

BLOCK = 128  # side of a block in tokens


@dataclass(frozen=True)
class Blocks:
    """Block mask of a forest: the blocks of keys that each block of queries attends to, in part or in full.

    For each token, ``stops`` [T] holds the index at which the subtree of its node ends. Nodes are in depth-first order, so a query attends
    to a key if the key does not come after the query and the query comes before the key's stop. ``sight`` can add a sliding window,
    measured in ``depths`` [T], and bidirectional attention among tokens with the same index in ``pictures`` [T]. These are the forest's
    ``depths`` and ``block_of``.

    With a sliding window, ``partial`` can contain unnecessary blocks, because only the smallest and largest depths of each block are
    compared. They do not change the result, because the mask is evaluated token by token within them.
    """

    sight: Sight
    stops: Tensor
    depths: Tensor
    pictures: Tensor
    partial: Tensor
    full: Tensor

    @classmethod
    def of(cls, forest: Forest, sight: Sight) -> Blocks:
        ends = list(forest.starts[1:])
        for node in reversed(range(len(ends))):
            if (parent := forest.parents[node]) >= 0:
                ends[parent] = max(ends[parent], ends[node])
        stops = torch.tensor(ends).repeat_interleave(torch.tensor(forest.lengths))
        length, blocks = len(stops), -(-len(stops) // BLOCK)

        def by_block(values: Tensor, padding: int) -> Tensor:
            return torch.nn.functional.pad(values, (0, blocks * BLOCK - length), value=padding).view(blocks, BLOCK)

        padded = by_block(stops, 0)
        begin = torch.arange(blocks).unsqueeze(1) * BLOCK  # first token of each query block
        before = begin > begin.T
        full = before & (padded.amin(1) >= begin + BLOCK) & (begin + BLOCK <= length)
        some = before & (padded.amax(1) > begin) | (begin == begin.T)
        for start, stop in forest.blocks if sight.blocks else ():
            some[start // BLOCK : -(-stop // BLOCK), start // BLOCK : -(-stop // BLOCK)] = True
            full[-(-start // BLOCK) : stop // BLOCK, -(-start // BLOCK) : stop // BLOCK] = True
        if sight.window is not None:
            nearest, farthest = by_block(forest.depths, length).amin(1), by_block(forest.depths, -1).amax(1)
            some &= nearest.unsqueeze(1) - farthest < sight.window
            full &= farthest.unsqueeze(1) - nearest < sight.window
        return cls(sight, stops, forest.depths, forest.block_of, some & ~full, full)

    def to(self, device: torch.device, **options: Any) -> Any:
        """Build torch's BlockMask on the device."""
        from torch.nn.attention.flex_attention import BlockMask

        stops, depths, pictures = (tensor.to(device) for tensor in (self.stops, self.depths, self.pictures))
        window, bidirectional = self.sight.window, self.sight.blocks

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            visible = (key <= query) & (query < stops[key])
            if bidirectional:
                visible = visible | ((pictures[query] == pictures[key]) & (pictures[query] >= 0))
            return visible if window is None else visible & (depths[query] - depths[key] < window)

        (partial, of_partial), (full, of_full) = (
            (
                kind.sum(1, dtype=torch.int32)[None, None].to(device),
                kind.int().argsort(dim=1, descending=True, stable=True).int()[None, None].to(device),
            )
            for kind in (self.partial, self.full)
        )
        lengths = (len(stops), len(stops))
        return BlockMask.from_kv_blocks(partial, of_partial, full, of_full, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=lengths)


@functools.cache
def compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)  # dynamic: no recompilation for every row length


def flex(query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float, sight: Sight) -> Tensor:
    """Return the attention output [1, T, H, D] for query [1, H, T, D], and key and value [1, J, T, D]."""
    mask = forest.on(Blocks.of, query.device, sight)
    out: Tensor = compiled_flex()(query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2)
