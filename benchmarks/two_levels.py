"""Forests of two levels (prefixes with branches), for benchmarks and tests."""

from __future__ import annotations

from collections.abc import Sequence

from cfvlm_ds.models.forest import Forest


def two_levels(prefixes: Sequence[int], branches: Sequence[Sequence[int]], blocks: tuple[tuple[int, int], ...] = ()) -> Forest:
    """Build a forest from the token counts of prefixes and their branches. ``blocks`` is passed on unchanged."""
    lengths, parents = list[int](), list[int]()
    for prefix, lengths_of_branches in zip(prefixes, branches, strict=True):
        root = len(lengths)
        lengths += [prefix, *lengths_of_branches]
        parents += [-1, *[root] * len(lengths_of_branches)]
    return Forest(tuple(lengths), tuple(parents), blocks)
