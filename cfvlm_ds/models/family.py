"""A model family: what differs between LLaVA, Qwen-VL and their kin, as one record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from cfvlm_ds.core.config import ModelConfig

Module = Literal["vision_tower", "projector", "language_model"]
MODULES: tuple[Module, ...] = ("vision_tower", "projector", "language_model")


Positions = Callable[[PreTrainedConfig, Tensor, Tensor], Tensor]
"""(model configuration, [P] bool: which prompt tokens are visual, grids of the images) -> position ids of the prompt, [P] or [axes, P]."""


def sequential(config: PreTrainedConfig, visual: Tensor, grids: Tensor) -> Tensor:
    """Consecutive positions: 0, 1, 2, ..."""
    return torch.arange(len(visual))


Arrange = Callable[[Any, Tensor, Sequence[int], dict[str, Tensor]], Tensor | Sequence[Tensor]]
"""(model, what its projector gives for several images, each image's rows of it, their ``per_image`` inputs) -> features, image by image."""


def as_projected(model: Any, projected: Tensor, rows: Sequence[int], inputs: dict[str, Tensor]) -> Tensor:
    """The model does nothing after its projector."""
    return projected


def everything_used(config: PreTrainedConfig) -> tuple[str, ...]:
    """No part of the model is left out of its forward."""
    return ()


Whole = Literal["nowhere", "windows", "everywhere"]
"""The layers in which the tokens of a picture see each other in both directions: those with a sliding window, or all."""


def causally(config: PreTrainedConfig) -> Whole:
    """A picture's tokens see what comes before them, as a text's do."""
    return "nowhere"


def no_cap(config: PreTrainedConfig) -> float | None:
    """Logits are what the output head gives."""
    return None


def as_loaded(model: nn.Module) -> None:
    """All that reaches other tokens is attention, which has back ends for trees."""


@dataclass(frozen=True)
class Family:
    """What the toolkit must know about a family of models.

    Args:
        model_types: values of ``config.model_type``; a path's name never decides.
        vision_tower, projector, language_model: prefixes of parameter names, after any wrapper prefix; the longest that fits decides, so a
            projector may live inside the tower. The output head belongs to the language model.
        output_head: the head's own prefix: it gets no adapter and keeps its precision.
        image_inputs: processor outputs that travel with the images: the arguments of the model's ``get_image_features``.
        per_image: those of them that hold one row per image and are needed after the tower.
        grid: the one of these with an image's grid of patches, for families whose positions need it.
        positions: position ids of a prompt; a text after it goes on at the largest plus one, on every axis.
        tiles_alone: whether an image is cut into tiles only if it is alone in its prompt.
        arrange: what the model does between its projector and its language model.
        from_grids: further arguments of ``get_image_features``, which the tower would wait for the device to derive from its grids.
        unused: prefixes of weights that the checkpoint has and the forward does not use.
        take_trees: makes what is not attention compute rows of trees; called once a model, before it scores.
        around: what the processor writes around each picture, which its tokenizer joins with the words beside it.
        whole_pictures: in which layers a picture's tokens see each other in both directions; ``visual_mark`` is then the argument by which
            the model's own forward is told which tokens are visual.
        projector_inputs: those of ``per_image`` that the projector takes after the tower's output.
        logit_cap: the bound to which the model's own forward squeezes its logits, cap * tanh(logit / cap).
        limit: bounds an image's visual tokens (visual_token_limits.py) by the options ``limited_by`` of the model's configuration.
    """

    model_types: tuple[str, ...]
    vision_tower: tuple[str, ...]
    projector: tuple[str, ...]
    language_model: tuple[str, ...]
    output_head: str = "lm_head"
    image_inputs: tuple[str, ...] = ("pixel_values",)
    per_image: tuple[str, ...] = ()
    grid: str | None = None
    positions: Positions = sequential
    tiles_alone: bool = False
    arrange: Arrange = as_projected
    from_grids: Callable[[PreTrainedConfig, Tensor], dict[str, Any]] | None = None
    unused: Callable[[PreTrainedConfig], tuple[str, ...]] = everything_used
    take_trees: Callable[[nn.Module], None] = as_loaded
    around: tuple[str, str] = ("", "")
    whole_pictures: Callable[[PreTrainedConfig], Whole] = causally
    visual_mark: str | None = None
    projector_inputs: tuple[str, ...] = ()
    logit_cap: Callable[[PreTrainedConfig], float | None] = no_cap
    limit: Callable[[Any, Any, ModelConfig], None] | None = None
    limited_by: tuple[str, ...] = ()

    def module_of(self, name: str) -> Module:
        """The module a parameter belongs to, by its name inside the model. Raises KeyError when no prefix fits."""
        prefixes: dict[Module, tuple[str, ...]] = {
            "vision_tower": self.vision_tower,
            "projector": self.projector,
            "language_model": self.language_model,
        }
        fitting = [
            (len(prefix), module) for module, candidates in prefixes.items() for prefix in candidates if f"{name}.".startswith(f"{prefix}.")
        ]
        if not fitting:
            raise KeyError(f"parameter {name!r} is in no module of family {self.model_types[0]!r}; add its prefix to the family record")
        return max(fitting)[1]

    def projectors(self, model: nn.Module) -> list[str]:
        """Names of the modules that take the tower's output, in the order in which the model calls them."""
        found = {name: module for name, module in model.named_modules() if name in self.projector}
        lists = {name: [f"{name}.{k}" for k in range(len(module))] for name, module in found.items() if isinstance(module, nn.ModuleList)}
        return [part for name in self.projector if name in found for part in lists.get(name, [name])]
