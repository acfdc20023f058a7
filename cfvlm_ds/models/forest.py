"""Forest: the structure of a row of trees. A tree's nodes contain tokens, which attend to their own node and its ancestors.

The forest is passed to every layer as a keyword argument. Attention back ends derive masks and indices from it, which are cached and shared
by all layers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sight:
    """Differences between a layer's attention and plain causal attention along a path.

    Args:
        window: number of most recent tokens along the path that a token attends to, including itself; None for all.
        blocks: True if the tokens of a block attend to each other in both directions.
    """

    window: int | None = None
    blocks: bool = False


@dataclass(frozen=True)
class Forest:
    """Row of trees, stored as the length and the parent (-1 for a root) of each node, in depth-first order.

    A node's tokens attend to its ancestors and, causally, to each other. A node's first child follows it directly, and each later child
    follows the previous child's subtree. In some families, attention is bidirectional within pictures: ``blocks`` lists their token ranges
    (begin, end), each inside one node. Unless ``blocks_everywhere`` is set, this applies only to sliding-window layers.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    blocks: tuple[tuple[int, int], ...] = ()
    blocks_everywhere: bool = True

    def __post_init__(self) -> None:
        for begin, end in self.blocks:
            if not any(start <= begin < end <= stop for start, stop in itertools.pairwise(self.starts)):
                raise ValueError(f"tokens {begin} to {end} attend to each other in both directions, but do not belong to one node")

    @functools.cached_property
    def starts(self) -> list[int]:
        """Index of each node's first token. The last entry is the number of tokens."""
        return list(itertools.accumulate(self.lengths, initial=0))

    @functools.cached_property
    def ancestors(self) -> list[tuple[int, ...]]:
        """Indices of each node's ancestors, from the root down."""
        ancestors: list[tuple[int, ...]] = []
        for parent in self.parents:
            ancestors.append(() if parent < 0 else (*ancestors[parent], parent))
        return ancestors

    @functools.cached_property
    def roots(self) -> list[int]:
        """Index of each tree's root node. The last entry is the number of nodes."""
        return [*(node for node, parent in enumerate(self.parents) if parent < 0), len(self.parents)]

    @functools.cached_property
    def bounds(self) -> list[int]:
        """Index of each tree's first token. The last entry is the number of tokens."""
        return [self.starts[root] for root in self.roots]

    @functools.cached_property
    def tree_lengths(self) -> list[int]:
        """Number of tokens in each tree."""
        return [stop - start for start, stop in itertools.pairwise(self.bounds)]

    @functools.cached_property
    def seen(self) -> list[int]:
        """Number of tokens in each node's ancestors."""
        return [sum(self.lengths[above] for above in ancestors) for ancestors in self.ancestors]

    @functools.cached_property
    def longest_path(self) -> int:
        """Number of tokens on the longest path from a root to the end of a text."""
        return max(seen + length for seen, length in zip(self.seen, self.lengths, strict=True))

    @functools.cached_property
    def depths(self) -> Tensor:
        """[T] number of tokens before each token on its path."""
        return torch.cat([torch.arange(seen, seen + length) for seen, length in zip(self.seen, self.lengths, strict=True)])

    @functools.cached_property
    def texts(self) -> Tensor:
        """[T] number of texts that each token belongs to: 1 for a token of a text, otherwise the number of texts that attend to it."""
        inner, counts = set(self.parents), [0] * len(self.lengths)
        for node, ancestors in enumerate(self.ancestors):
            for above in () if node in inner else (node, *ancestors):
                counts[above] += 1
        return torch.tensor(counts).repeat_interleave(torch.tensor(self.lengths))

    @functools.cached_property
    def block_of(self) -> Tensor:
        """[T] index of each token's block, or -1 outside blocks."""
        numbers = torch.full((self.bounds[-1],), -1)
        for number, (begin, end) in enumerate(self.blocks):
            numbers[begin:end] = number
        return numbers

    def sight(self, window: int | None) -> Sight:
        """Return the Sight of a layer with this sliding window. A window that excludes no token becomes None."""
        blocks = bool(self.blocks) and (self.blocks_everywhere or window is not None)
        return Sight(window if window is not None and window < self.longest_path else None, blocks)

    @functools.cached_property
    def _placed(self) -> dict[Any, Any]:
        return {}

    def on(self, build: Callable[..., Any], device: torch.device, *options: Any) -> Any:
        """Return the result of ``build(self, *options)``, moved to ``device``. It is cached and shared by all layers with the same
        arguments.
        """
        key = build, device, options
        if key not in self._placed:
            self._placed[key] = _move(build(self, *options), device)
        return self._placed[key]


def _move(value: Any, device: torch.device) -> Any:
    if hasattr(value, "to"):
        return value.to(device, non_blocking=True)
    return type(value)(_move(item, device) for item in value) if isinstance(value, list | tuple) else value
