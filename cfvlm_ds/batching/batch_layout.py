"""What is known of a batch of groups before the forward: its cells, their tokens, and the scores that are stored for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cfvlm_ds.batching.prompts import Encoded
from cfvlm_ds.core.groups import Cells, CounterfactualGroup
from cfvlm_ds.core.layout import GroupLayout
from cfvlm_ds.data.stored_scores import StoredScores


def group_layout(groups: Sequence[CounterfactualGroup], texts: Sequence[Sequence[Encoded]], cells: Cells) -> GroupLayout:
    """The layout of groups whose candidates are encoded as ``texts``, with those of their cells that ``cells`` means."""
    shape = (len(groups), max(len(g.images) for g in groups), max(len(g.candidates) for g in groups))
    match = torch.full(shape, -1, dtype=torch.int8)
    tokens, end_tokens = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    exists = torch.zeros(shape, dtype=torch.bool)
    prompt = torch.full(shape[::2], -1, dtype=torch.int64)
    for g, (group, encoded) in enumerate(zip(groups, texts, strict=True)):
        size = (len(group.images), len(group.candidates))
        match[g, : size[0], : size[1]] = torch.tensor([[-1 if m is None else m for m in row] for row in group.match], dtype=torch.int8)
        exists[g, : size[0], : size[1]] = True
        prompt[g, : size[1]] = torch.tensor(group.prompt_ids)
        tokens[g, : size[0], : size[1]] = torch.tensor([len(t.text_ids) for t in encoded])
        end_tokens[g, : size[0], : size[1]] = torch.tensor([len(t.end_ids) for t in encoded])
    valid = exists & wanted_cells(groups, match, prompt, cells)
    weight = torch.tensor([group.weight for group in groups], dtype=torch.float32)
    named = tuple(group.objectives for group in groups)
    return GroupLayout(
        valid,
        match,
        tokens,
        end_tokens,
        weight,
        ids=tuple(group.id for group in groups),
        prompt=prompt,
        sources=tuple(group.source for group in groups),
        objectives=named if any(each is not None for each in named) else (),
    )


def wanted_cells(groups: Sequence[CounterfactualGroup], match: Tensor, prompt: Tensor, cells: Cells) -> Tensor:
    """[G, I, C] bool: the cells of ``cells``; unknown cells only under ``full``, since no objective uses them."""
    wanted = torch.full_like(match, cells == "full", dtype=torch.bool)
    wanted[:, 0, 0] = True
    if cells in ("matched", "star"):
        wanted |= match == 1
    if cells == "star":
        star = torch.zeros_like(wanted)
        star[:, 0, :] = True
        for g, group in enumerate(groups):
            for number, (i, c) in group.anchors.items():
                star[g, i] |= prompt[g] == number
                star[g, :, c] = True
        wanted |= star & (match >= 0)
    return wanted


def stored_scores(stored: Mapping[str, StoredScores], groups: Sequence[CounterfactualGroup], layout: GroupLayout) -> tuple[Tensor, Tensor]:
    """(reference [G, I, C], prior [G, C]) of the groups; 0 where they have no such cell, and for groups of a source that needs none."""
    reference = torch.zeros(layout.valid.shape)
    prior = torch.zeros(layout.valid.shape[0], layout.valid.shape[2])
    for g, group in enumerate(groups):
        if group.objectives is not None and group.id not in stored:
            continue
        scores = stored[group.id]
        reference[g, : len(group.images), : len(group.candidates)] = torch.tensor(scores.logp)
        prior[g, : len(group.candidates)] = torch.tensor(scores.blank)
    return reference, prior
