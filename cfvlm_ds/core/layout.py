"""What is known of a batch of groups before a model runs: which cells are scored, which are true, how many tokens they have."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class GroupLayout:
    """What is known of a batch of G groups before the forward; groups are padded to the largest I and C of the batch.

    All tensors are [G, I, C] except ``weight`` [G] and ``prompt`` [G, C]:
    ``valid`` (bool) the cells that are scored; ``match`` (int8) 1 true, 0 false, -1 unknown; ``num_tokens`` (int64) response tokens of the
    cell's text, end-of-turn excluded; ``num_end_tokens`` (int64) its end-of-turn tokens, which count in the NLL and nowhere else;
    ``prompt`` (int64) numbers the prompt of each text within its group; None where every group has one.
    """

    valid: Tensor
    match: Tensor
    num_tokens: Tensor
    num_end_tokens: Tensor
    weight: Tensor
    ids: tuple[str, ...] = ()
    prompt: Tensor | None = None

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
