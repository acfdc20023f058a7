"""The shape of a row of trees: nodes of tokens, each of which sees its ancestors and itself.

It reaches every layer as a keyword argument, and carries what a back end of attention derives from it, once for all layers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sight:
    """What the tokens of a layer see of their paths, where that is not simply what comes before them.

    Args:
        window: only so many of the nearest tokens, counted along the path, itself included; None for all.
        blocks: whether the tokens of a block see each other in both directions.
    """

    window: int | None = None
    blocks: bool = False


@dataclass(frozen=True)
class Forest:
    """The trees of a row as nodes in depth-first order: the tokens of each, and the node that it comes after (-1: it begins a tree).

    A node's tokens see its ancestors and, causally, themselves. Its first child follows it, and each further one the subtree before it.
    ``blocks`` are runs of tokens (begin, end), each inside one node, that see each other in both directions: the pictures of some families.
    Unless ``blocks_everywhere`` they do so only in layers with a sliding window.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    blocks: tuple[tuple[int, int], ...] = ()
    blocks_everywhere: bool = True

    def __post_init__(self) -> None:
        for begin, end in self.blocks:
            if not any(start <= begin < end <= stop for start, stop in itertools.pairwise(self.starts)):
                raise ValueError(f"tokens {begin} to {end} see each other in both directions, and are not of one node")

    @classmethod
    def of(cls, prefixes: Sequence[int], branches: Sequence[Sequence[int]], blocks: tuple[tuple[int, int], ...] = ()) -> Forest:
        """Trees of two levels: tokens of each prefix, and of each of its branches; ``blocks`` as above."""
        lengths, parents = list[int](), list[int]()
        for prefix, each in zip(prefixes, branches, strict=True):
            root = len(lengths)
            lengths += [prefix, *each]
            parents += [-1, *[root] * len(each)]
        return cls(tuple(lengths), tuple(parents), blocks)

    @functools.cached_property
    def starts(self) -> list[int]:
        """Where each node begins and, last, where the row ends."""
        return list(itertools.accumulate(self.lengths, initial=0))

    @functools.cached_property
    def ancestors(self) -> list[tuple[int, ...]]:
        """The nodes above each, from the root down."""
        found: list[tuple[int, ...]] = []
        for parent in self.parents:
            found.append(() if parent < 0 else (*found[parent], parent))
        return found

    @functools.cached_property
    def roots(self) -> list[int]:
        """The node that begins each tree and, last, the number of nodes."""
        return [*(node for node, parent in enumerate(self.parents) if parent < 0), len(self.parents)]

    @functools.cached_property
    def bounds(self) -> list[int]:
        """Where each tree begins and, last, where the row ends."""
        return [self.starts[root] for root in self.roots]

    @functools.cached_property
    def tree_lengths(self) -> list[int]:
        """Tokens of each tree."""
        return [stop - start for start, stop in itertools.pairwise(self.bounds)]

    @functools.cached_property
    def seen(self) -> list[int]:
        """Tokens of the ancestors of each node."""
        return [sum(self.lengths[above] for above in ancestors) for ancestors in self.ancestors]

    @functools.cached_property
    def longest_path(self) -> int:
        """Tokens from the beginning of a tree to the end of a text, the most of all."""
        return max(seen + length for seen, length in zip(self.seen, self.lengths, strict=True))

    @functools.cached_property
    def depths(self) -> Tensor:
        """[T] how many tokens come before each on its path."""
        return torch.cat([torch.arange(seen, seen + length) for seen, length in zip(self.seen, self.lengths, strict=True)])

    @functools.cached_property
    def texts(self) -> Tensor:
        """[T] how many texts each token belongs to: those of the tree that see it, or 1 for a token of a text."""
        inner, counts = set(self.parents), [0] * len(self.lengths)
        for node, ancestors in enumerate(self.ancestors):
            for each in () if node in inner else (node, *ancestors):
                counts[each] += 1
        return torch.tensor(counts).repeat_interleave(torch.tensor(self.lengths))

    @functools.cached_property
    def block_of(self) -> Tensor:
        """[T] the number of the block that each token is in, or -1."""
        found = torch.full((self.bounds[-1],), -1)
        for number, (begin, end) in enumerate(self.blocks):
            found[begin:end] = number
        return found

    def sight(self, window: int | None) -> Sight:
        """What the tokens of a layer with this sliding window see. Windows that cut nothing off are left out."""
        blocks = bool(self.blocks) and (self.blocks_everywhere or window is not None)
        return Sight(window if window is not None and window < self.longest_path else None, blocks)

    @functools.cached_property
    def _placed(self) -> dict[Any, Any]:
        return {}

    def on(self, build: Callable[..., Any], device: torch.device, *options: Any) -> Any:
        """The result of ``build`` for the forest and ``options``, on ``device``; computed once for all layers that ask for the same."""
        key = build, device, options
        if key not in self._placed:
            self._placed[key] = _move(build(self, *options), device)
        return self._placed[key]


def _move(value: Any, device: torch.device) -> Any:
    if hasattr(value, "to"):
        return value.to(device, non_blocking=True)
    return type(value)(_move(item, device) for item in value) if isinstance(value, list | tuple) else value
