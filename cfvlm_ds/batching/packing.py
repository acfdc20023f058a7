"""Trees packed into one row without padding: the only place that knows how cells are laid out as tokens.

A tree is a prefix (the chat template's prompt with its image) followed by every text that the image is scored with. Each text is a
branch: it sees the prefix and itself. Shapes: T tokens of the row, P tokens of a prompt, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from cfvlm_ds.batching.image_source import PictureKey
from cfvlm_ds.batching.prompts import Encoded
from cfvlm_ds.models import Family
from cfvlm_ds.models.forest_attention import Forest


@dataclass
class Tree:
    """A prompt with its pictures, and a branch for each text: (flat cell index, text)."""

    pictures: tuple[PictureKey, ...]
    branches: list[tuple[int, Encoded]]


@dataclass(frozen=True)
class Row:
    """Trees as one row: the model's inputs, and which tokens are scored.

    ``cell`` [N] and ``is_end`` [N] as in Batch; ``num_tokens`` of the row; ``num_scored`` positions from which something is predicted.
    """

    model_inputs: dict[str, Any]
    cell: Tensor
    is_end: Tensor
    num_tokens: int
    num_scored: int


@dataclass
class _Prefix:
    """A tree's prompt, placeholders expanded: its token ids [P], and their positions, [P] or [axes, P]."""

    ids: Tensor
    positions: Tensor


@dataclass
class _Tokens:
    """The tokens of a row, as they are laid out one tree after the other."""

    ids: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    predicts: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    cell: list[int] = field(default_factory=list)
    is_end: list[bool] = field(default_factory=list)
    length: int = 0

    def add(self, tree: Tree, prefix: _Prefix) -> None:
        last, first = self.length + len(prefix.ids) - 1, int(prefix.positions.max()) + 1
        self.length = last + 1
        self.ids.append(prefix.ids)
        self.positions.append(prefix.positions)
        for index, text in tree.branches:
            response = [*text.text_ids, *text.end_ids]
            stop = self.length + len(response)
            self.ids.append(torch.tensor(response))
            self.positions.append(torch.arange(first, first + len(response)).expand(*prefix.positions.shape[:-1], -1))
            # A branch's first token is predicted at the end of the prompt, every other one at the token before it.
            self.predicts += [last, *range(self.length, stop - 1)]
            self.targets += response
            self.cell += [index] * len(response)
            self.is_end += [False] * len(text.text_ids) + [True] * len(text.end_ids)
            self.length = stop


def pack(
    trees: Sequence[Tree],
    keys: Sequence[PictureKey],
    placeholders: Sequence[list[int]],
    image_inputs: dict[str, Any],
    family: Family,
    config: PreTrainedConfig,
    image_token: int,
) -> Row:
    """The row of ``trees``, whose pictures are among ``keys``.

    Args:
        placeholders: for each picture the ids that stand for it in a prompt; ``image_token`` is the id of the visual ones.
        image_inputs: the model's inputs for the pictures.
        family, config: the model's, for its position rules.
    """
    shown = [tuple(keys.index(key) for key in tree.pictures) for tree in trees]
    tokens, prefixes = _Tokens(), []
    for tree, pictures in zip(trees, shown, strict=True):
        prefixes.append(_prefix(tree, pictures, placeholders, image_inputs, family, config, image_token))
        tokens.add(tree, prefixes[-1])
    places, predicted_by = torch.tensor(tokens.predicts).unique(return_inverse=True)
    model_inputs = {
        "input_ids": torch.cat(tokens.ids).unsqueeze(0),
        "position_ids": torch.cat(tokens.positions, -1).unsqueeze(-2),
        "forest": Forest(
            tuple(len(prefix.ids) for prefix in prefixes), tuple(tuple(text.length for _, text in tree.branches) for tree in trees)
        ),
        "scored": torch.zeros(1, tokens.length, dtype=torch.bool).index_fill(1, places, True),
        "predicted_by": predicted_by,
        "targets": torch.tensor(tokens.targets),
        "images_of_tree": shown,
        "visual_tokens": [ids.count(image_token) for ids in placeholders],
        "image_inputs": image_inputs,
    }
    return Row(model_inputs, torch.tensor(tokens.cell), torch.tensor(tokens.is_end), tokens.length, len(places))


def _prefix(
    tree: Tree,
    pictures: Sequence[int],
    placeholders: Sequence[list[int]],
    image_inputs: dict[str, Any],
    family: Family,
    config: PreTrainedConfig,
    image_token: int,
) -> _Prefix:
    left, ids = iter(pictures), []
    for token in tree.branches[0][1].prompt_ids:
        ids += placeholders[next(left)] if token == image_token else [token]
    expanded = torch.tensor(ids)
    grids = image_inputs[family.grid][list(pictures)] if family.grid else torch.empty(0)
    return _Prefix(expanded, family.positions(config, expanded == image_token, grids))


def divide(trees: Sequence[Tree], prefix_length: Callable[[Tree], int], max_tokens: int | None) -> list[list[Tree]]:
    """The trees in parts of at most ``max_tokens`` tokens. A larger tree is cut between its texts; one of a single text is a part alone."""
    if max_tokens is None:
        return [list(trees)]
    parts: list[list[Tree]] = []
    room = 0
    for tree in sorted(trees, key=lambda tree: tree.pictures):  # a picture whose trees are neighbours is encoded once
        prefix = prefix_length(tree)
        for piece in _pieces(tree, max_tokens - prefix):
            tokens = prefix + sum(text.length for _, text in piece.branches)
            if tokens > room:
                parts.append([])
                room = max_tokens
            parts[-1].append(piece)
            room -= tokens
    return parts


def _pieces(tree: Tree, room: int) -> list[Tree]:
    """The tree's texts in as few trees as possible, with at most ``room`` tokens after the prefix; a longer text has its own tree."""
    pieces = [Tree(tree.pictures, [])]
    left = room
    for branch in tree.branches:
        if branch[1].length > left and pieces[-1].branches:
            pieces.append(Tree(tree.pictures, []))
            left = room
        pieces[-1].branches.append(branch)
        left -= branch[1].length
    return pieces
