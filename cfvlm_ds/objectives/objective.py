"""The objective protocol, comparisons within a group, and the margin term that several objectives share.

Shapes: G groups, I images, C candidates, P parts of one objective. The truth table defines two kinds of comparison:

- text side: a true and a false text on one image, both answers to the same prompt;
- image side: one text on an image for which it is true and on an image for which it is false. The text's prior and length cancel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cfvlm_ds.core.groups import Cells
from cfvlm_ds.core.layout import Divergence, GroupLayout
from cfvlm_ds.core.scores import LengthNorm, Scores, normalised_scores
from cfvlm_ds.objectives.token_credit import credit_report, token_credit

Report = dict[str, tuple[Tensor, Tensor]]
"""Metric name -> (sum, count). Unlike means, sums and counts can be added over micro-batches and ranks."""


class Objective(Protocol):
    """A loss term: a pure function of score matrices, independent of devices, tokenizers and ranks.

    The term's loss is ``weight * sum_p numerator_p / denominator_p`` over its parts p. Numerator and denominator are scalars, or [P] for a
    term with P parts. The denominator must depend only on the layout, because it is summed over all ranks and accumulation steps before the
    first forward pass.

    A subclass must define numerator, denominator and ``weight``; everything else has a default.
    """

    @property
    def weight(self) -> float: ...

    @property
    def warmup(self) -> float:
        """Fraction of all steps over which the weight rises linearly from 0."""
        return 0.0

    @property
    def cells(self) -> Cells:
        """Set of cells that the objective needs. A smaller set costs less."""
        return "full"

    @property
    def needs_reference(self) -> bool:
        """True if the objective needs reference scores."""
        return False

    @property
    def needs_prior(self) -> bool:
        """True if the objective needs prior scores."""
        return False

    @property
    def needs_tokens(self) -> bool:
        """True if the objective needs ``Scores.tokens`` and ``GroupLayout.changed``."""
        return False

    @property
    def needs_blank(self) -> bool:
        """True if the objective needs scores on the blank picture. The blank picture is added as the last image and costs as much as any
        other image.
        """
        return False

    @property
    def divergence(self) -> Divergence | None:
        """Divergence that the objective needs, or None. Computing it applies the output head twice more to the compared tokens."""
        return None

    def denominator(self, layout: GroupLayout) -> Tensor:
        """Return the number of tokens or groups over which the loss is averaged: a scalar, or [P] for a loss that is a sum of P means."""
        ...

    def numerator(self, scores: Scores) -> Tensor:
        """Return the differentiable sum over tokens or groups, in nats, in the shape of ``denominator``."""
        ...

    def report(self, scores: Scores) -> Report:
        """Return the term's additional metrics, each as (sum, count)."""
        return {}


def comparisons(scores: Tensor, positive: Tensor, negative: Tensor, together: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compare each true entry with each false entry along the last axis of ``scores`` [G, R, X].

    Returns (violation, mask), each [G, R, X true, X false]. violation = S[false] - S[true] is positive if the model prefers the false
    entry. For the text side, pass scores [G, I, C] and, as ``together``, the layout's ``same_prompt`` [G, C, C], which marks the pairs of
    texts to compare. For the image side, pass transposed scores [G, C, I].
    """
    violation = scores.unsqueeze(-2) - scores.unsqueeze(-1)
    mask = positive.unsqueeze(-1) & negative.unsqueeze(-2)
    return violation, mask if together is None else mask & together.unsqueeze(1)


def mean_over(values: Tensor, mask: Tensor) -> Tensor:
    """Average the ``values`` in ``mask`` over all axes but the first. The result [G] is 0 for a group without values in the mask."""
    dims = tuple(range(1, values.dim()))
    return torch.where(mask, values, 0).sum(dims) / mask.sum(dims).clamp(min=1)


def has_any(mask: Tensor) -> Tensor:
    """Return a mask [G] of the groups with at least one True entry in ``mask``."""
    return mask.flatten(1).any(1)


def no_scores(layout: GroupLayout) -> Tensor:
    """Return scores of 0 for all cells. Denominators use them to count comparisons, because the count does not depend on the scores."""
    return torch.zeros_like(layout.num_tokens, dtype=layout.weight.dtype)


def masked_max(values: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Return the maximum over ``dim`` of the entries in ``mask``, or 0 if there are none."""
    some = mask.any(dim)
    # not amax, which would split the gradient between ties: only one comparison should receive it
    top = torch.where(mask, values, float("-inf")).max(dim).values
    return torch.where(some, top, 0)


@dataclass(frozen=True, kw_only=True)
class MarginTerm(Objective):
    """Loss and options of the terms that require a margin between two likelihoods.

    By default, the terms compare summed log-likelihoods, because an edit changes only a few words and a mean over the whole text would
    divide their gradient by the text's length. As in align, the loss is then divided by the token counts of the factual texts, but groups
    without a comparison do not count. If every group has one, a group's comparisons weigh ``weight`` times as much as the NLL of its
    factual text, however long the text is. The default link saturates when a true text leads by a few nats, which keeps true texts likely.
    The paper uses a hinge link, len_norm anchor, weight 0.5, and margins of 0.25 (csd) and 0.30 (fcd).

    Args:
        weight: factor of the term in the loss; 0 leaves the term out.
        warmup: fraction of all steps over which the weight rises linearly from 0.
        margin: difference by which the true cell must win, in nats or, with ``len_norm``, in nats per token.
        link: ``hinge``, max(0, margin + violation), or ``logsigmoid``, log(1 + exp(beta (margin + violation))) / beta, whose gradient
            shrinks as the true cell's lead grows but never reaches 0. Both are applied after ``len_norm``.
        beta: sharpness of ``logsigmoid``: around the margin, its gradient falls from almost 1 to almost 0 over a score range of about
            4 / beta.
        hinge_cap: maximum of the hinge, as a multiple of the margin, so that a pair with a very large violation has no gradient; 0 for no
            maximum.
        len_norm: ``anchor`` divides all log-likelihoods of a group by the token count of its factual text, ``own`` divides each by its
            text's own token count, and ``none`` does not divide. ``anchor`` and ``own`` average the loss over groups instead of tokens.
        pmi: weight of the blind score log p(text | blank), which is subtracted; needs ``--data.scores`` unless it is 0.
        token_credit: replace log p(text) = sum_t log p_t by sum_t w_t log p_t. The weights w_t lie between 1/2 and 3/2 and are larger for
            tokens that are more likely on images for which the text is true (TPO, arXiv 2412.14487). They are 1 if the text is true of all
            images or false of all images.
    """

    weight: float = 8.0
    warmup: float = 0.05
    margin: float = 1.0
    link: Literal["hinge", "logsigmoid"] = "logsigmoid"
    beta: float = 1.0
    hinge_cap: float = 4.0
    len_norm: LengthNorm = "none"
    pmi: float = 0.0
    token_credit: bool = False

    def __post_init__(self) -> None:
        if self.margin <= 0:
            raise ValueError(f"margin must be positive, not {self.margin}; to disable the term, set its weight to 0")
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, not {self.beta}")
        if self.hinge_cap < 0:
            raise ValueError(f"hinge_cap must not be negative, but is {self.hinge_cap}; use 0 for no cap")

    @property
    def needs_prior(self) -> bool:
        return self.pmi != 0

    @property
    def needs_tokens(self) -> bool:
        return self.token_credit

    def violations(self, similarity: Tensor, layout: GroupLayout) -> tuple[Tensor, Tensor]:
        """Return (violation, mask), each [G, ...], for scores ``similarity`` [G, I, C] after ``len_norm`` and ``pmi``."""
        raise NotImplementedError

    def denominator(self, layout: GroupLayout) -> Tensor:
        groups = layout.weight * has_any(self.violations(no_scores(layout), layout)[1])
        if self.len_norm == "none":
            groups = groups * (layout.num_tokens + layout.num_end_tokens)[:, 0, 0].clamp(min=1)
        return groups.sum()

    def numerator(self, scores: Scores) -> Tensor:
        violation, mask = self._violations_of(scores)
        per_group = mean_over(self.penalty(violation), mask)
        return (scores.layout.weight.to(per_group) * per_group).sum()

    def report(self, scores: Scores) -> Report:
        with torch.no_grad():
            violation, mask = self._violations_of(scores)
        active, name = self.penalty(violation) > 0, type(self).__name__.lower()
        credit = credit_report(scores, name) if self.token_credit else {}
        shares = (("active", active), ("violated", violation >= 0))
        return credit | {f"{kind}/{name}": ((each & mask).sum(), mask.sum()) for kind, each in shares}

    def _violations_of(self, scores: Scores) -> tuple[Tensor, Tensor]:
        if self.token_credit:
            scores = replace(scores, logp=scores.logp + token_credit(scores))
        return self.violations(normalised_scores(scores, self.len_norm, self.pmi), scores.layout)

    def penalty(self, violation: Tensor) -> Tensor:
        """Return the link's value at margin + ``violation`` [G, ...]."""
        if self.link == "logsigmoid":
            return F.softplus(self.margin + violation, beta=self.beta)
        return (self.margin + violation).clamp(0, self.hinge_cap * self.margin or None)
