"""What objectives that compare with a reference model share: the log-ratio, and the comparisons that the factual pair has to win."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cfvlm_ds.core.groups import Cells
from cfvlm_ds.core.layout import GroupLayout
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.objectives.base import Report, comparisons

Compared = tuple[Tensor, Tensor]
"""(violation, mask) of comparisons, in nats of log-ratio."""


@dataclass(frozen=True, kw_only=True)
class ReferenceTerm:
    """A term over r = log p - log p_reference, the reference read from ``--data.scores``.

    Args:
        weight: factor of the term in the loss.
        warmup: share of all steps over which the weight rises linearly from 0.
        beta: inverse temperature, per nat of log-ratio.
    """

    weight: float = 1.0
    warmup: float = 0.0
    beta: float = 0.1

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, not {self.beta}")

    @property
    def cells(self) -> Cells:
        return "star"

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def needs_prior(self) -> bool:
        return False

    def ratio(self, scores: Scores) -> Tensor:
        """r [G, I, C], nats. Raises ValueError where the scores have no reference."""
        if scores.reference is None:
            name = type(self).__name__.lower()
            raise ValueError(f"{name} needs reference scores: write them with `cfvlm-ds score` and pass --data.scores")
        return scores.logp - scores.reference.detach().to(scores.logp)

    def compared(self, name: str, *found: Compared) -> Report:
        """Share of the comparisons that are won, and the mean of beta (r_true - r_false) over them."""
        won = torch.stack([((violation < 0) & mask).sum() for violation, mask in found]).sum()
        margin = torch.stack([torch.where(mask, -self.beta * violation, 0).sum() for violation, mask in found]).sum()
        count = torch.stack([mask.sum() for _, mask in found]).sum()
        return {f"{name}/accuracy": (won, count), f"{name}/margin": (margin, count)}


def no_ratio(layout: GroupLayout) -> Tensor:
    """A ratio of 0 everywhere: comparisons of it are those that the layout has."""
    return torch.zeros_like(layout.num_tokens, dtype=layout.weight.dtype)


def factual_texts(ratio: Tensor, layout: GroupLayout) -> Compared:
    """The factual text against each false one of its prompt on the factual image, [G, 1, C true, C false]."""
    return comparisons(ratio[:, :1, :], _factual(layout)[:, :1, :], layout.negative[:, :1, :], layout.same_prompt)


def factual_images(ratio: Tensor, layout: GroupLayout) -> Compared:
    """The factual text on the factual image against the same text on each image it is false of, [G, 1, I true, I false]."""
    return comparisons(*(each.transpose(1, 2)[:, :1] for each in (ratio, _factual(layout), layout.negative)))


def _factual(layout: GroupLayout) -> Tensor:
    chosen = torch.zeros_like(layout.valid)
    chosen[:, 0, 0] = layout.positive[:, 0, 0]
    return chosen
