"""Router statistics of a mixture of experts: token count and summed probability of each expert in a forward pass.

A token counts once for each text that it belongs to, as if every text had a row of its own. The statistics therefore do not depend on
packing.

Shapes: E experts, T tokens, K experts per token.
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
    """Expert routing of one forward pass, summed over tokens and layers.

    Args:
        taken: [E] number of tokens routed to each expert, without a gradient.
        probability: [E] each expert's probability before top-k selection, in float32; gradients flow through it to the routers.
        rows: number of tokens times number of layers, a scalar tensor.
    """

    taken: Tensor
    probability: Tensor
    rows: Tensor


class Routers:
    """Recorder of a model's router outputs. A layer that gradient checkpointing recomputes is not recorded again."""

    def __init__(self, model: nn.Module) -> None:
        self._outputs: list[tuple[Tensor, Tensor]] | None = None
        for module in model.modules():
            if type(module).__name__.endswith("Router"):
                module.register_forward_hook(self._note)

    def _note(self, router: nn.Module, inputs: Any, output: Any) -> None:
        if self._outputs is not None:
            self._outputs.append((output[0], output[-1]))

    def __enter__(self) -> Routers:
        self._outputs = []
        return self

    def __exit__(self, *error: Any) -> None:
        self._outputs = None

    def routed(self, forest: Forest) -> Routed | None:
        """Sum the router outputs that were recorded within the ``with`` block. Returns None for a model without routers."""
        if not self._outputs:
            return None
        counts = forest.on(_counts, self._outputs[0][0].device)
        taken = torch.zeros(self._outputs[0][0].shape[-1], device=counts.device)
        probability = torch.zeros_like(taken)
        for logits, chosen in self._outputs:
            taken = taken.scatter_add(0, chosen.reshape(-1), counts.repeat_interleave(chosen.shape[-1]))
            probability = probability + counts @ logits.float().softmax(-1)
        return Routed(taken, probability, counts.sum() * len(self._outputs))


def _counts(forest: Forest) -> Tensor:
    return forest.texts.float()


BALANCED = ("qwen3_vl_moe", "qwen3_5_moe")
"""Model types whose routers select the experts with the highest probabilities, as transformers' load-balancing loss assumes."""


def check_balanced(model_type: str) -> None:
    """Raise ConfigError for a model type whose load-balancing loss is not supported (see ``BALANCED``)."""
    if model_type not in BALANCED:
        raise ConfigError(f"train.router_balance supports model types {' and '.join(BALANCED)}, not {model_type!r}; leave it out")
