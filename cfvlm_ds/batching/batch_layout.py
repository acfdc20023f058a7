"""Layout of a batch (scored cells, true cells, token counts), built before the forward pass, and lookup of stored scores."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cfvlm_ds.batching.prompts import Encoded, Prompts
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import Cells, CounterfactualGroup, Groups
from cfvlm_ds.core.layout import GroupLayout, InBatchNegatives
from cfvlm_ds.core.sequences import differing
from cfvlm_ds.data.stored_scores import ScoresById


def group_layout(groups: Groups, texts: Sequence[Sequence[Encoded]], cells: Cells) -> GroupLayout:
    """Build the layout of a batch. ``texts`` holds each group's encoded candidates, and ``cells`` is the set of cells to score."""
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
    return GroupLayout(
        valid,
        match,
        tokens,
        end_tokens,
        weight,
        ids=tuple(group.id for group in groups),
        prompt=prompt,
        sources=tuple(group.source for group in groups),
        objectives=tuple(group.objectives for group in groups),
    )


def in_batch_texts(group: CounterfactualGroup, prompts: Prompts) -> list[Encoded]:
    """Encode a group's in-batch negatives as answers to the factual text's prompt. Raises DataError if a text cannot be encoded."""
    prompt, in_batch = group.candidates[0].prompt, () if group.in_step is None else group.in_step.in_batch
    where = f"group {group.id!r}: text of group"
    return [prompts.encoded(prompt, negative.text, group.num_pictures, f"{where} {negative.group!r}") for negative in in_batch]


def without_broken_negatives(group: CounterfactualGroup, prompts: Prompts) -> CounterfactualGroup:
    """Remove the in-batch negatives that cannot be encoded from a group. Their errors are reported for the groups that they come from."""
    if group.in_step is None:
        return group
    kept = []
    for negative in group.in_step.in_batch:
        with contextlib.suppress(DataError):
            prompts.encoded(group.candidates[0].prompt, negative.text, group.num_pictures, "")
            kept.append(negative)
    return group.in_the_step(group.in_step.place, tuple(kept))


def with_in_batch_negatives(layout: GroupLayout, groups: Groups, texts: Sequence[Sequence[Encoded]]) -> GroupLayout:
    """Append the in-batch negatives to the layout's texts. ``texts`` holds each group's encoded negatives.

    The negatives are scored on every image that has a scored answer to the factual text's prompt. If no group belongs to a training step,
    the layout is returned unchanged.
    """
    steps = [group.in_step for group in groups]
    if all(step is None for step in steps):
        return layout
    assert layout.prompt is not None
    num_groups, num_images, _ = layout.valid.shape
    shape = (num_groups, max(map(len, texts)))
    exists, tokens, ends = (torch.zeros(shape, dtype=kind) for kind in (torch.bool, torch.int64, torch.int64))
    place, source_group, share = torch.full((num_groups,), -1), torch.full((*shape, 2), -1), torch.zeros(shape)
    for g, (step, encoded) in enumerate(zip(steps, texts, strict=True)):
        if step is None:
            continue
        place[g], columns = step.place, slice(0, len(encoded))
        exists[g, columns] = True
        tokens[g, columns], ends[g, columns] = (
            torch.tensor([[len(t.text_ids), len(t.end_ids)] for t in encoded], dtype=torch.int64).view(-1, 2).T
        )
        source_group[g, columns] = torch.tensor(
            [[negative.source_group, negative.number] for negative in step.in_batch], dtype=torch.int64
        ).view(-1, 2)
        share[g, columns] = torch.tensor([negative.share for negative in step.in_batch])
    shown = (layout.valid & layout.same_prompt[:, :1]).any(2, keepdim=True)

    def extended(own: Tensor, in_batch: Tensor) -> Tensor:
        return torch.cat([own, in_batch.expand(-1, num_images, -1)], 2)

    return replace(
        layout,
        valid=extended(layout.valid, exists.unsqueeze(1) & shown),
        match=extended(layout.match, torch.full((num_groups, 1, shape[1]), -1, dtype=torch.int8)),
        num_tokens=extended(layout.num_tokens, tokens.unsqueeze(1)),
        num_end_tokens=extended(layout.num_end_tokens, ends.unsqueeze(1)),
        prompt=torch.cat([layout.prompt, torch.where(exists, layout.prompt[:, :1], -1)], 1),
        in_batch=InBatchNegatives(place, source_group, share),
    )


def with_blank_picture(layout: GroupLayout, groups: Groups) -> GroupLayout:
    """Append the blank image to the layout's images. If a group has pictures, its own texts are scored on the blank image, but its
    in-batch negatives are not.
    """
    last = {name: getattr(layout, name).amax(1, keepdim=True) for name in ("valid", "num_tokens", "num_end_tokens")}
    last["valid"] &= torch.tensor([group.num_pictures > 0 for group in groups]).view(-1, 1, 1)
    last["valid"][:, :, layout.num_own :] = False
    last["match"] = torch.full_like(layout.match[:, :1], -1)
    rows: dict[str, Any] = {name: torch.cat([getattr(layout, name), row], 1) for name, row in last.items()}
    return replace(layout, blank=True, **rows)


def with_changed_tokens(layout: GroupLayout, groups: Groups, texts: Sequence[Sequence[Encoded]]) -> GroupLayout:
    """Add the mask ``changed`` [G, C, T] to the layout. Each text is compared with the first text that has the same prompt. In both, the
    tokens from the first to the last difference are marked.
    """
    changed = torch.zeros((*layout.valid.shape[::2], int(layout.num_tokens.max())), dtype=torch.bool)
    for g, (group, encoded) in enumerate(zip(groups, texts, strict=True)):
        for c, number in enumerate(group.prompt_ids):
            partner = group.prompt_ids.index(number)
            for one, other in ((c, partner), (partner, c)):
                changed[g, one, differing(encoded[one].text_ids, encoded[other].text_ids)[0]] = True
    return replace(layout, changed=changed)


def wanted_cells(groups: Groups, match: Tensor, prompt: Tensor, cells: Cells) -> Tensor:
    """Return a mask [G, I, C] of the cells in the set ``cells``. Only ``full`` includes unknown cells; no objective uses them."""
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


def stored_scores(stored: ScoresById, groups: Groups, layout: GroupLayout) -> tuple[Tensor, Tensor]:
    """Return the groups' stored reference scores [G, I, C] and prior scores [G, C] in nats. Cells without a stored score are 0. In-batch
    negatives have a prior score, but no reference score.
    """
    reference = torch.zeros(layout.valid.shape)  # on the blank image, the reference score is the prior score
    prior = torch.zeros(layout.valid.shape[0], layout.valid.shape[2])
    for g, group in enumerate(groups):
        if group.objectives is not None and group.id not in stored:
            continue
        scores = stored[group.id]
        reference[g, : len(group.images), : len(group.candidates)] = torch.tensor(scores.logp)
        prior[g, : len(group.candidates)] = torch.tensor(scores.blank)
        if layout.blank:
            reference[g, -1, : len(group.candidates)] = prior[g, : len(group.candidates)]
        for column, negative in enumerate(group.in_step.in_batch if group.in_step else (), layout.num_own):
            if (of_source_group := stored.get(negative.group)) is not None:  # a source without scores has no term that needs a prior
                prior[g, column] = of_source_group.blank[negative.number]
    return reference, prior
