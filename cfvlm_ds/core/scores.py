"""Score matrices from logits, computed in float32 or higher precision for every compute dtype.

S[g, i, c] = sum over response tokens t of log p(y_t | y_<t, image i, prompt), in nats. Shapes: N scored tokens, V vocabulary, G groups, I
images, C candidates, T tokens of the longest text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cfvlm_ds.core.layout import Divergence, GroupLayout

LengthNorm = Literal["anchor", "own", "none"]


@dataclass(frozen=True)
class Scores:
    """Log-likelihoods of every scored cell in a batch of groups, in nats; 0 where ``layout.valid`` is false.

    ``logp`` [G, I, C] is summed over the text's tokens, and ``end_logp`` [G, I, C] over its end-of-turn tokens. ``reference`` [G, I, C] is
    ``logp`` under the reference model, and ``prior`` [G, C] is log p(text | blank image) under the reference model. Both are stored data
    without a gradient.

    ``cross_group`` [G, C, R] holds scores of the same texts on images of other groups in the optimizer step, padded with -inf to R. They
    are detached here; their gradient is computed with the groups that the images belong to.

    ``tokens`` [G, I, C, T] are the token log-probs whose sum is ``logp``, padded with 0 after the last token of a text. It is None unless
    an objective needs it.

    ``divergences`` maps each divergence that an objective needs to its sum over the tokens of each cell's text, [G, I, C]. The sum is 0 in
    cells that are not compared.
    """

    layout: GroupLayout
    logp: Tensor
    end_logp: Tensor
    reference: Tensor | None = None
    prior: Tensor | None = None
    cross_group: Tensor | None = None
    tokens: Tensor | None = None
    divergences: Mapping[Divergence, Tensor] = field(default_factory=dict)

    def seen(self, in_batch: bool, blank: bool) -> Scores:
        """Return the scores without the in-batch negatives if ``in_batch`` is False, and without the blank picture if ``blank`` is
        False.
        """
        layout = self.layout.seen(in_batch, blank)
        if layout is self.layout:
            return self
        _, rows, columns = layout.valid.shape
        cut = {name: getattr(self, name) for name in ("logp", "end_logp", "reference", "tokens")}
        cut = {name: None if values is None else values[:, :rows, :columns] for name, values in cut.items()}
        prior = None if self.prior is None else self.prior[:, :columns]
        divergences = {kind: values[:, :rows, :columns] for kind, values in self.divergences.items()}
        cross_group = self.cross_group if in_batch else None
        return replace(self, layout=layout, prior=prior, cross_group=cross_group, divergences=divergences, **cut)

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """Add up scores that have the same layout but cover different cells."""
        names = ("logp", "end_logp") if parts[0].tokens is None else ("logp", "end_logp", "tokens")
        sums: dict[str, Any] = {name: torch.stack([getattr(part, name) for part in parts]).sum(0) for name in names}
        return replace(parts[0], **sums)


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute log p(target) per row, in nats: logits [N, V] of any floating dtype, targets [N] -> [N].

    Logits are converted to float32 before the softmax (float64 is kept). A bfloat16 log-softmax over 152k entries would shift a 64-token
    sum by 0.1 nats, a large part of a typical margin of 0.25 nats.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return chosen - torch.logsumexp(logits, dim=-1)


def score_matrix(token_logp: Tensor, cell: Tensor, is_end: Tensor, layout: GroupLayout) -> tuple[Tensor, Tensor]:
    """Sum token log-probs into (logp, end_logp), each [G, I, C].

    ``token_logp`` [N] is in nats; ``cell`` [N] is the flat index of the token's cell in [G, I, C]; ``is_end`` [N] bool marks end-of-turn
    tokens.
    """
    shape = layout.valid.shape
    flat = token_logp.new_zeros(2, layout.valid.numel())
    flat = flat.view(-1).index_add(0, cell + is_end.to(cell.dtype) * layout.valid.numel(), token_logp).view_as(flat)
    return flat[0].view(shape), flat[1].view(shape)


def token_matrix(token_logp: Tensor, cell: Tensor, is_end: Tensor, layout: GroupLayout) -> Tensor | None:
    """Arrange token log-probs by cell and position, [G, I, C, T], leaving out end-of-turn tokens. Returns None if the layout has no
    ``changed``.

    Takes the same arguments as ``score_matrix``. The tokens of a cell must be adjacent and in order.
    """
    if layout.changed is None:
        return None
    shape, place = (*layout.valid.shape, layout.changed.shape[2]), torch.arange(len(cell), device=cell.device)
    begin = torch.where(F.pad(cell.diff() != 0, (1, 0), value=1), place, 0).cummax(0).values
    index = torch.where(is_end, 0, cell * shape[3] + place - begin)
    return token_logp.new_zeros(math.prod(shape)).index_add(0, index, token_logp.masked_fill(is_end, 0)).view(shape)


def token_counts(layout: GroupLayout, len_norm: LengthNorm) -> Tensor:
    """Compute the divisor of each cell's score, [G, I, C]: the token count of the group's factual text (``anchor``) or of the cell's text
    (``own``), or 1 (``none``).

    With ``anchor``, all cells of a group have the same divisor. With ``own``, a comparison of two texts of different lengths also gives
    their common words a gradient.
    """
    if len_norm == "none":
        return torch.ones_like(layout.num_tokens)
    tokens = layout.num_tokens[:, :1, :1].expand_as(layout.num_tokens) if len_norm == "anchor" else layout.num_tokens
    return tokens.clamp(min=1)


def normalised_scores(scores: Scores, len_norm: LengthNorm, pmi: float = 0.0) -> Tensor:
    """Compute S = (log p(text | image) - pmi * log p(text | blank)) / tokens, [G, I, C].

    With ``pmi`` = 1, this is pointwise mutual information per token. The prior cancels when one text is compared on two images. Raises
    ValueError if ``pmi`` is not 0 and the scores have no prior.
    """
    logp = scores.logp
    if pmi:
        if scores.prior is None:
            raise ValueError("pmi needs stored blind scores: write them with `cfvlm-ds score` and pass them as --data.scores")
        logp = logp - pmi * scores.prior.detach().to(logp).unsqueeze(1)
    return logp / token_counts(scores.layout, len_norm)
