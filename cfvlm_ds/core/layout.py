"""What is known of a batch of groups before a model runs: which cells are scored, which are true, how many tokens they have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class InBatchNegatives:
    """Texts of other groups of an optimizer step, N for each group: the last N columns of a layout, whose truth is unknown.

    ``place`` [G] is each group's place in the step; ``source_group`` [G, N, 2] the place of a text's own group, and which of its texts it
    is (-1 where a group has fewer than N); ``share`` [G, N] the weight of its comparison between images, see InBatchNegative.
    """

    place: Tensor
    source_group: Tensor
    share: Tensor


@dataclass(frozen=True)
class GroupLayout:
    """What is known of a batch of G groups before the forward; groups are padded to the largest I and C of the batch.

    All tensors are [G, I, C] except ``weight`` [G] and ``prompt`` [G, C]:
    ``valid`` (bool) the cells that are scored; ``match`` (int8) 1 true, 0 false, -1 unknown; ``num_tokens`` (int64) response tokens of the
    cell's text, end-of-turn excluded; ``num_end_tokens`` (int64) its end-of-turn tokens, which count in the NLL and nowhere else;
    ``prompt`` (int64) numbers the prompt of each text within its group; None where every group has one. ``sources`` and ``objectives`` are
    those of each group (see CounterfactualGroup); empty where no group names any. With ``in_batch``, C counts them too.
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

    @property
    def num_own(self) -> int:
        """Columns that are texts of the groups themselves."""
        return self.valid.shape[2] - (0 if self.in_batch is None else self.in_batch.source_group.shape[1])

    @property
    def own(self) -> GroupLayout:
        """The layout without texts of other groups."""
        if self.in_batch is None:
            return self
        cut = {name: getattr(self, name)[..., : self.num_own] for name in ("valid", "match", "num_tokens", "num_end_tokens")}
        return replace(self, **cut, prompt=None if self.prompt is None else self.prompt[:, : self.num_own], in_batch=None)

    @property
    def same_prompt(self) -> Tensor:
        """[G, C, C] bool: pairs of texts that answer one prompt. An answer is never compared with one to another question."""
        if self.prompt is None:
            num_groups, _, num_texts = self.valid.shape
            return self.valid.new_ones(num_groups, num_texts, num_texts)
        return self.prompt.unsqueeze(2) == self.prompt.unsqueeze(1)

    @property
    def positive(self) -> Tensor:
        """[G, I, C] bool: scored cells whose text is true of their image."""
        return self.valid & (self.match == 1)

    @property
    def negative(self) -> Tensor:
        """[G, I, C] bool: scored cells whose text is known to be false of their image."""
        return self.valid & (self.match == 0)

    def only(self, groups: Sequence[bool]) -> GroupLayout:
        """The same layout in which the other groups have no scored cell, and so count in nothing."""
        keep = torch.tensor(groups, device=self.valid.device)
        return replace(self, valid=self.valid & keep.view(-1, 1, 1), weight=self.weight * keep)

    def of_objective(self, name: str) -> GroupLayout:
        """The layout that an objective sees: without the groups that name others only."""
        if all(named is None for named in self.objectives):
            return self
        return self.only([named is None or name in named for named in self.objectives])

    def of_source(self, name: str) -> GroupLayout:
        """The layout of the groups of one source."""
        return self.only([source == name for source in self.sources])
