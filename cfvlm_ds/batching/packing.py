"""Packing of trees into one row without padding. Only this module determines the order of tokens in a row. ``PackedSampler``
(data/sampler.py) chooses the groups that share a row.

A tree starts with the tokens that all prompts about its pictures share, including the pictures. Where the prompts differ, each continues as
a separate branch. Each scored text is a branch of its prompt. A branch attends to its ancestors and itself. A picture therefore occurs only
once in the row, however many questions refer to it.

Shapes: T tokens in the row, P tokens in a prompt, N scored tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from cfvlm_ds.batching.batch import Inputs
from cfvlm_ds.batching.image_source import PictureKey
from cfvlm_ds.batching.prompts import Encoded
from cfvlm_ds.core.layout import GroupLayout
from cfvlm_ds.core.sequences import shared_start
from cfvlm_ds.models import Family
from cfvlm_ds.models.forest import Forest


@dataclass
class Tree:
    """Pictures and the texts that are scored on them. A branch is a pair: the flat index of a cell, and its encoded text.

    If there are pictures, the prompts are identical up to and including the last picture.
    """

    pictures: tuple[PictureKey, ...]
    branches: list[tuple[int, Encoded]]

    @property
    def ordered(self) -> list[tuple[int, Encoded]]:
        """Branches sorted by the token ids of their prompts, so that prompts with a common beginning are neighbours."""
        return sorted(self.branches, key=lambda branch: branch[1].prompt_ids)


@dataclass(frozen=True)
class Material:
    """The contents of a row before packing: trees, the ``keys`` of their pictures, and each picture's placeholder ids."""

    trees: tuple[Tree, ...]
    keys: tuple[PictureKey, ...]
    placeholders: tuple[list[int], ...]

    def only(self, wanted: Sequence[bool]) -> tuple[Material, list[int]]:
        """Return the material reduced to the texts whose cells are ``wanted``, and the indices of the remaining pictures (at least one)."""
        kept = (Tree(tree.pictures, [branch for branch in tree.branches if wanted[branch[0]]]) for tree in self.trees)
        trees = tuple(tree for tree in kept if tree.branches)
        shown = {key for tree in trees for key in tree.pictures}
        left = [place for place, key in enumerate(self.keys) if key in shown] or [0]
        return Material(trees, tuple(self.keys[k] for k in left), tuple(self.placeholders[k] for k in left)), left


@dataclass(frozen=True)
class Row:
    """Trees packed into one row: the model's inputs and the scored tokens. The fields have the same meaning as in Batch."""

    model_inputs: Inputs
    cell: Tensor
    is_end: Tensor
    num_tokens: int
    num_scored: int


@dataclass
class _Prompt:
    """A prompt with its texts. ``expanded`` is ``ids`` with each picture's token replaced by its placeholder ids. ``begins`` [P + 1] maps
    each index in ``ids`` to its offset in ``expanded``, and ends with the length of ``expanded``. ``positions`` holds position ids, [T] or
    [axes, T].
    """

    ids: tuple[int, ...]
    begins: list[int]
    expanded: Tensor
    positions: Tensor
    texts: list[tuple[int, Encoded]]


@dataclass
class _Tokens:
    """A row's tokens, collected node by node. ``ends`` holds the index at which each node ends."""

    ids: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    predicts: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    cell: list[int] = field(default_factory=list)
    is_end: list[bool] = field(default_factory=list)

    def grow(self, prompts: Sequence[_Prompt], since: int = 0, parent: int = -1) -> None:
        """Add sorted prompts whose first ``since`` ids are equal and already in the row. The next ids that all prompts share become one
        node, and the rest of each prompt branches off it.
        """
        first, node = prompts[0], parent
        until = shared_start(first.ids, prompts[-1].ids)
        if until > since:  # False only if the prompts have no pictures and no common prefix
            place = slice(first.begins[since], first.begins[until])
            node = self._node(first.expanded[place], first.positions[..., place], parent)
        rest = list(prompts)
        if len(first.ids) == until:
            for index, text in rest.pop(0).texts:
                self._text(index, text, first, node)
        while rest:
            alike = [prompt for prompt in rest if prompt.ids[until] == rest[0].ids[until]]
            self.grow(alike, until, node)
            rest = rest[len(alike) :]

    def _text(self, index: int, text: Encoded, prompt: _Prompt, parent: int) -> None:
        response, last = [*text.text_ids, *text.end_ids], self.ends[parent] - 1
        begin, first = self.ends[-1], int(prompt.positions.max()) + 1
        positions = torch.arange(first, first + len(response)).expand(*prompt.positions.shape[:-1], -1)
        self._node(torch.tensor(response), positions, parent)
        # The prompt's last token predicts the text's first token, and each token of the text predicts the next.
        self.predicts += [last, *range(begin, begin + len(response) - 1)]
        self.targets += response
        self.cell += [index] * len(response)
        self.is_end += [False] * len(text.text_ids) + [True] * len(text.end_ids)

    def _node(self, ids: Tensor, positions: Tensor, parent: int) -> int:
        self.ids.append(ids)
        self.positions.append(positions)
        self.ends.append(sum(self.ends[-1:]) + len(ids))
        self.parents.append(parent)
        return len(self.parents) - 1


def pack(material: Material, image_inputs: Inputs, family: Family, config: PreTrainedConfig, image_token: int) -> Row:
    """Pack trees into a row.

    Args:
        material: the trees, with their pictures' keys and placeholder ids.
        image_inputs: the model's inputs for the pictures.
        family, config: the model's family record and configuration.
        image_token: id of the token that stands for a picture in a prompt.
    """
    shown = [tuple(material.keys.index(key) for key in tree.pictures) for tree in material.trees]
    tokens = _Tokens()
    grids = image_inputs[family.grid] if family.grid else torch.empty(0)
    for tree, pictures in zip(material.trees, shown, strict=True):
        tokens.grow(_prompts(tree, pictures, material.placeholders, grids, family, config, image_token))
    places, predicted_by = torch.tensor(tokens.predicts).unique(return_inverse=True)
    ids = torch.cat(tokens.ids)
    attended_whole = family.whole_pictures(config)
    blocks = () if attended_whole == "nowhere" else _runs(ids == config.image_token_id)
    model_inputs = {
        "input_ids": ids.unsqueeze(0),
        "position_ids": torch.cat(tokens.positions, -1).unsqueeze(-2),
        "forest": Forest(tuple(map(len, tokens.ids)), tuple(tokens.parents), blocks, attended_whole == "everywhere"),
        "visual": (ids == config.image_token_id).nonzero().squeeze(1),
        "scored": places,
        "predicted_by": predicted_by,
        "targets": torch.tensor(tokens.targets),
        "images_of_tree": shown,
        "visual_tokens": [ids.count(config.image_token_id) for ids in material.placeholders],
        "image_inputs": image_inputs,
    }
    return Row(model_inputs, torch.tensor(tokens.cell), torch.tensor(tokens.is_end), len(ids), len(places))


def _runs(marked: Tensor) -> tuple[tuple[int, int], ...]:
    """Return the (begin, end) of each run of consecutive True values."""
    edges = torch.nn.functional.pad(marked.int(), (1, 1)).diff().nonzero().squeeze(1).tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def _prompts(
    tree: Tree,
    pictures: Sequence[int],
    placeholders: Sequence[list[int]],
    grids: Tensor,
    family: Family,
    config: PreTrainedConfig,
    image_token: int,
) -> list[_Prompt]:
    """Return a tree's distinct prompts in sorted order, with placeholders expanded, each with its texts."""
    prompts: list[_Prompt] = []
    shown = grids[list(pictures)] if family.grid else grids
    for index, text in tree.ordered:
        if not prompts or prompts[-1].ids != text.prompt_ids:
            left, ids, begins = iter(pictures), list[int](), [0]
            for token in text.prompt_ids:
                ids += placeholders[next(left)] if token == image_token else [token]
                begins.append(len(ids))
            expanded = torch.tensor(ids)
            prompts.append(
                _Prompt(text.prompt_ids, begins, expanded, family.positions(config, expanded == config.image_token_id, shown), [])
            )
        prompts[-1].texts.append((index, text))
    return prompts


def compared(row: Row, layout: GroupLayout, against: str) -> Tensor:
    """Return the indices [3, D] for a divergence, one column per token of a text. Rows 0 and 1 hold the indices of the hidden states that
    predict the token given the text's own image and given another image. Row 2 holds the flat index of the text's cell on that other image.
    """
    tokens = defaultdict[int, list[int]](list)
    for place, (cell, is_end) in enumerate(zip(row.cell.tolist(), row.is_end.tolist(), strict=True)):
        if not is_end:
            tokens[cell].append(place)
    (_, images, texts), own = layout.valid.shape, layout.own.byte().argmax(1).tolist()
    pairs = []
    for g, other, c in layout.compared(against).nonzero().tolist():
        first, second = ((g * images + i) * texts + c for i in (own[g][c], other))
        pairs += [(*states, second) for states in zip(tokens[first], tokens[second], strict=True)]
    found = torch.tensor(pairs, dtype=torch.int64).view(-1, 3).T
    return torch.stack([*row.model_inputs["predicted_by"][found[:2]], found[2]])


PromptLength = Callable[[Tree, Encoded], int]
"""(tree, one of its texts) -> number of tokens in the text's prompt after placeholders are expanded."""


def num_tokens(tree: Tree, prompt_length: PromptLength) -> int:
    """Count the tokens that a tree occupies in a row."""
    return sum(tokens for _, tokens in _added(tree, prompt_length))


def _added(tree: Tree, prompt_length: PromptLength) -> Iterator[tuple[tuple[int, Encoded], int]]:
    """Yield the branches in order, each with the number of tokens that it adds to the tree (its text and the new part of its prompt)."""
    before: tuple[int, ...] | None = None
    for branch in tree.ordered:
        text = branch[1]
        new = prompt_length(tree, text) if before is None else len(text.prompt_ids) - shared_start(before, text.prompt_ids)
        before = text.prompt_ids
        yield branch, new + text.length


def divide(trees: Sequence[Tree], prompt_length: PromptLength, max_tokens: int | None) -> list[list[Tree]]:
    """Divide trees into parts of at most ``max_tokens`` tokens. A tree that exceeds the limit is split at text boundaries. A single text
    that exceeds the limit gets its own part.
    """
    if max_tokens is None:
        return [list(trees)]
    parts: list[list[Tree]] = []
    room = 0
    for tree in sorted(trees, key=lambda tree: tree.pictures):  # makes trees with the same picture adjacent, so that a part encodes it once
        for piece in _pieces(tree, prompt_length, max_tokens):
            tokens = num_tokens(piece, prompt_length)
            if tokens > room:
                parts.append([])
                room = max_tokens
            parts[-1].append(piece)
            room -= tokens
    return parts


def _pieces(tree: Tree, prompt_length: PromptLength, max_tokens: int) -> list[Tree]:
    """Split a tree into trees of at most ``max_tokens`` tokens, keeping the order of its texts. A text that exceeds the limit together with
    its prompt gets its own tree.
    """
    pieces = [Tree(tree.pictures, [])]
    left = max_tokens
    for branch, tokens in _added(tree, prompt_length):
        if tokens > left and pieces[-1].branches:
            pieces.append(Tree(tree.pictures, []))
            left, tokens = max_tokens, prompt_length(tree, branch[1]) + branch[1].length
        pieces[-1].branches.append(branch)
        left -= tokens
    return pieces
