"""torch's FlexAttention over a row of trees: a mask as a function of two places, and the blocks of it that hold anything."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cfvlm_ds.models.forest import Forest

BLOCK = 128  # tokens of a side of a block


@dataclass(frozen=True)
class Blocks:
    """Which blocks of keys each block of queries sees, in part or in full. ``stops`` [T] is where the subtree of each token's node ends: in
    depth-first order a query sees a key when it is not before the key and before that."""

    stops: Tensor
    partial: Tensor
    full: Tensor

    @classmethod
    def of(cls, forest: Forest) -> Blocks:
        ends = list(forest.starts[1:])
        for node in reversed(range(len(ends))):
            if (parent := forest.parents[node]) >= 0:
                ends[parent] = max(ends[parent], ends[node])
        stops = torch.tensor(ends).repeat_interleave(torch.tensor(forest.lengths))
        length, blocks = len(stops), -(-len(stops) // BLOCK)
        padded = torch.nn.functional.pad(stops, (0, blocks * BLOCK - length)).view(blocks, BLOCK)
        begin = torch.arange(blocks).unsqueeze(1) * BLOCK  # of each block of queries
        before = begin > begin.T
        full = before & (padded.amin(1) >= begin + BLOCK) & (begin + BLOCK <= length)
        partial = (before & (padded.amax(1) > begin) | (begin == begin.T)) & ~full
        return cls(stops, partial, full)

    def to(self, device: torch.device, **options: Any) -> Any:
        """torch's BlockMask there."""
        from torch.nn.attention.flex_attention import BlockMask

        stops = self.stops.to(device)

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (query < stops[key])

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

    return torch.compile(flex_attention, dynamic=True)  # rows differ in length, and are not to be compiled for each


def flex(query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float) -> Tensor:
    """Query [1, H, T, D], key and value [1, J, T, D] -> [1, T, H, D]. On CPUs, which have no backward of it, gradients are those of a dense
    attention under the same mask."""
    from torch.nn.attention.flex_attention import create_mask, flex_attention

    mask = forest.on(Blocks.of, query.device)
    grouped = query.shape[1] != key.shape[1]
    if query.device.type != "cpu":
        out: Tensor = compiled_flex()(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped)
    elif torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        seen = create_mask(mask.mask_mod, None, None, query.shape[2], key.shape[2], device="cpu")
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale, enable_gqa=grouped)
    else:
        q, k, v = (t.detach() for t in (query, key, value))  # which it asks for also where there are no gradients
        out = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)
