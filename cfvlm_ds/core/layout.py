"""Batch layout: scored cells, truth tables and token counts of a batch of groups. All are known before the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Divergence(NamedTuple):
    """A divergence, in nats, between two next-token distributions at each token of a text: p given the text's own image, and q given
    another image.

    ``against`` selects the other images (see ``GroupLayout.compared``). If ``sharpened`` is None, the divergence is KL(p || q), with
    gradients through p and q. If it is (alpha, beta), the divergence is KL(t || p), with gradients through p only. The target t is
    proportional to p (p / q)^alpha where p >= beta max p, and 0 elsewhere.
    """

    against: Literal["false", "blank", "sham"]
    sharpened: tuple[float, float] | None = None


@dataclass(frozen=True)
class InBatchNegatives:
    """For each group in a batch, N texts from other groups in the optimizer step. They are the layout's last N columns, and their truth is
    unknown.

    ``place`` [G] is each group's position in the step. ``source_group`` [G, N, 2] holds two numbers per text: the position of the text's
    own group in the step, and the text's index in that group. Both are -1 where a group has fewer than N negatives. ``share`` [G, N] is the
    text's weight in comparisons of images (see InBatchNegative).
    """

    place: Tensor
    source_group: Tensor
    share: Tensor


@dataclass(frozen=True)
class GroupLayout:
    """Layout of a batch with G groups, padded to the largest I and C in the batch.

    All tensors are [G, I, C] except ``weight`` [G] and ``prompt`` [G, C]. ``valid`` (bool) marks the scored cells. ``match`` (int8) is 1
    for true, 0 for false and -1 for unknown cells. ``num_tokens`` (int64) counts the response tokens of the cell's text without end-of-turn
    tokens. ``num_end_tokens`` (int64) counts the text's end-of-turn tokens, which only the NLL uses. ``prompt`` (int64) is the index of
    each text's prompt within its group, or None if every group has one prompt. ``sources`` and ``objectives`` have one entry per group (see
    CounterfactualGroup), or are empty in a layout built without them. If ``in_batch`` is set, C includes the texts of other groups.

    If an objective needs them, two more fields are set. ``changed`` [G, C, T] (bool) marks the tokens in which a text differs from the
    first text with the same prompt. In that first text, it marks every token in which another text differs. T is the number of tokens in
    the longest text. If ``blank`` is set, the last image is the blank picture. The group's own texts are scored on it, and their truth
    there is unknown.
    """

    valid: Tensor
    match: Tensor
    num_tokens: Tensor
    num_end_tokens: Tensor
    weight: Tensor
    ids: tuple[str, ...] = ()
    prompt: Tensor | None = None
    sources: tuple[str, ...] = ()
    objectives: tuple[tuple[str, ...] | None, ...] = ()
    in_batch: InBatchNegatives | None = None
    changed: Tensor | None = None
    blank: bool = False

    @property
    def num_own(self) -> int:
        """Number of columns for the groups' own texts."""
        return self.valid.shape[2] - (0 if self.in_batch is None else self.in_batch.source_group.shape[1])

    def seen(self, in_batch: bool, blank: bool) -> GroupLayout:
        """Return the layout without the in-batch negatives if ``in_batch`` is False, and without the blank picture if ``blank`` is
        False.
        """
        in_batch, blank = in_batch and self.in_batch is not None, blank and self.blank
        if in_batch == (self.in_batch is not None) and blank == self.blank:
            return self
        rows, columns = self.valid.shape[1] - (self.blank and not blank), self.valid.shape[2] if in_batch else self.num_own
        cut = {name: getattr(self, name)[:, :rows, :columns] for name in ("valid", "match", "num_tokens", "num_end_tokens")}
        cut |= {name: values[:, :columns] for name in ("prompt", "changed") if (values := getattr(self, name)) is not None}
        return replace(self, **cut, in_batch=self.in_batch if in_batch else None, blank=blank)

    @property
    def same_prompt(self) -> Tensor:
        """Pairs of texts that answer the same prompt, [G, C, C] bool. Answers to different questions are never compared."""
        if self.prompt is None:
            num_groups, _, num_texts = self.valid.shape
            return self.valid.new_ones(num_groups, num_texts, num_texts)
        return self.prompt.unsqueeze(2) == self.prompt.unsqueeze(1)

    @property
    def positive(self) -> Tensor:
        """Scored cells whose text is known to be true of the image, [G, I, C] bool."""
        return self.valid & (self.match == 1)

    @property
    def negative(self) -> Tensor:
        """Scored cells whose text is known to be false of the image, [G, I, C] bool."""
        return self.valid & (self.match == 0)

    @property
    def own(self) -> Tensor:
        """Each text's own image, [G, I, C] bool: the first image for which the text is true. For the factual text, this is the factual
        image, not its sham.
        """
        return self.positive & (self.positive.cumsum(1) == 1)

    def compared(self, against: str) -> Tensor:
        """Return the cells, [G, I, C] bool, whose distributions a ``Divergence`` compares with those of the same text on its own image.

        ``against`` selects the images of these cells. ``false``: images for which the text is false. ``blank``: the blank image. ``sham``:
        images whose known truth values agree with those of the factual image, if the text is true of both images.
        """
        own = self.own
        if against == "sham":
            factual = self.match[:, :1]
            differs = (self.match != factual) & (self.match >= 0) & (factual >= 0)
            return self.positive & ~own & own[:, :1] & ~differs.any(2, keepdim=True)
        others = self.negative
        if against == "blank":
            others = torch.zeros_like(self.valid)
            others[:, -1] = self.valid[:, -1] & self.blank
        return others & own.any(1, keepdim=True)

    def only(self, groups: Sequence[bool]) -> GroupLayout:
        """Return a copy of the layout that masks out groups with a False entry in ``groups``: their cells and weights are left out of all
        sums.
        """
        keep = torch.tensor(groups, device=self.valid.device)
        return replace(self, valid=self.valid & keep.view(-1, 1, 1), weight=self.weight * keep)

    def of_objective(self, name: str) -> GroupLayout:
        """Return the layout that the objective ``name`` uses: groups that list only other objectives are masked out."""
        if all(named is None for named in self.objectives):
            return self
        return self.only([named is None or name in named for named in self.objectives])

    def of_source(self, name: str) -> GroupLayout:
        """Return the layout with the groups of all other sources masked out."""
        return self.only([source == name for source in self.sources])
