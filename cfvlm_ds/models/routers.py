"""The routers of a mixture of experts: how many tokens each expert takes in a forward, and how probable each was.

A token counts once for each text that it belongs to, as where every text stands in a row of its own: which texts share a prefix depends on
how groups are spread over forwards. Shapes: E experts, T tokens, K experts that a token takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.models.forest import Forest


@dataclass(frozen=True)
class Routed:
    """Sums over the tokens of a forward and its layers.

    Args:
        taken: [E] tokens that each expert took, without a gradient.
        probability: [E] of each expert before the choice, float32, with the routers' gradient.
        rows: tokens times layers, a scalar.
    """

    taken: Tensor
    probability: Tensor
    rows: Tensor


class Routers:
    """Listens to the routers of a model. A layer that is computed again for its gradient is not counted again."""

    def __init__(self, model: nn.Module) -> None:
        self._heard: list[tuple[Tensor, Tensor]] | None = None
        for module in model.modules():
            if type(module).__name__.endswith("Router"):
                module.register_forward_hook(self._note)

    def _note(self, router: nn.Module, inputs: Any, output: Any) -> None:
        if self._heard is not None:
            self._heard.append((output[0], output[-1]))

    def __enter__(self) -> Routers:
        self._heard = []
        return self

    def __exit__(self, *error: Any) -> None:
        self._heard = None

    def routed(self, forest: Forest) -> Routed | None:
        """The sums of what was heard inside the block; None for a model without routers."""
        if not self._heard:
            return None
        counts = forest.on(_counts, self._heard[0][0].device)
        taken = torch.zeros(self._heard[0][0].shape[-1], device=counts.device)
        probability = torch.zeros_like(taken)
        for logits, chosen in self._heard:
            taken = taken.scatter_add(0, chosen.reshape(-1), counts.repeat_interleave(chosen.shape[-1]))
            probability = probability + counts @ logits.float().softmax(-1)
        return Routed(taken, probability, counts.sum() * len(self._heard))


def _counts(forest: Forest) -> Tensor:
    return forest.texts.float()


BALANCED = ("qwen3_vl_moe", "qwen3_5_moe")
"""Model types of which the library has a router balance loss that takes the likeliest experts, as the routers do."""


def check_balanced(model_type: str) -> None:
    """Raise ConfigError for a model type without a router balance loss."""
    if model_type not in BALANCED:
        raise ConfigError(f"train.router_balance is for model types {' and '.join(BALANCED)}, and this is {model_type!r}; leave it out")
