"""Model families: records that describe how LLaVA, Qwen-VL and others differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from cfvlm_ds.core.config import ModelConfig

Module = Literal["vision_tower", "projector", "language_model"]
MODULES: tuple[Module, ...] = ("vision_tower", "projector", "language_model")


Positions = Callable[[PreTrainedConfig, Tensor, Tensor], Tensor]
"""(model configuration, [P] bool mask of the prompt's visual tokens, the images' grids) -> the prompt's position ids, [P] or [axes, P]."""


def sequential(config: PreTrainedConfig, visual: Tensor, grids: Tensor) -> Tensor:
    """Return consecutive positions: 0, 1, 2, ..."""
    return torch.arange(len(visual))


Whole = Literal["nowhere", "windows", "everywhere"]
"""Layers in which a picture's tokens attend to each other in both directions: none, the sliding-window layers, or all."""


@dataclass(frozen=True)
class Family:
    """Properties of a model family that the package relies on.

    Args:
        model_types: values of ``config.model_type`` that select the family. The model's folder name is never used.
        vision_tower, projector, language_model: prefixes of parameter names, without prefixes added by wrappers. The longest match wins, so
            a projector can lie inside the tower. The output head belongs to the language model. The defaults are LLaVA's names.
        output_head: prefix of the output head, which gets no adapter and is never loaded in 4 bits.
        image_inputs: names of the processor's outputs that are passed to the model's ``get_image_features``.
        grid: the entry of ``image_inputs`` that holds each image's patch grid, for families whose position ids depend on it.
        positions: function that computes a prompt's position ids. Scored texts continue at the largest id plus one, on every axis.
        tiles_alone: True if an image is cut into tiles only when its prompt has no other image.
        from_grids: function that computes arguments of ``get_image_features`` in advance, because computing them in the tower would force a
            synchronisation with the device.
        unused: function that returns the prefixes of checkpoint weights that the forward pass does not use.
        take_trees: function that patches the non-attention layers so that they support rows of trees; called once per model before scoring.
        around: texts that the processor inserts before and after each picture; they are tokenised together with the neighbouring text.
        whole_pictures: function that returns the layers with bidirectional attention among a picture's tokens.
        visual_mark: keyword argument of the model's own ``forward`` that marks visual tokens, for families with bidirectional attention
            among a picture's tokens.
        logit_cap: function that returns the soft cap on the model's logits (logit -> cap * tanh(logit / cap)), or None.
        logit_scale: function that returns the factor by which the model multiplies its logits.
        limit: function that limits an image's visual tokens (visual_token_limits.py). ``limited_by`` names the options that it reads.
    """

    model_types: tuple[str, ...]
    vision_tower: tuple[str, ...] = ("model.vision_tower",)
    projector: tuple[str, ...] = ("model.multi_modal_projector",)
    language_model: tuple[str, ...] = ("model.language_model", "lm_head")
    output_head: str = "lm_head"
    image_inputs: tuple[str, ...] = ("pixel_values",)
    grid: str | None = None
    positions: Positions = sequential
    tiles_alone: bool = False
    from_grids: Callable[[PreTrainedConfig, Tensor], dict[str, Any]] | None = None
    unused: Callable[[PreTrainedConfig], tuple[str, ...]] = lambda config: ()
    take_trees: Callable[[nn.Module], None] = lambda model: None
    around: tuple[str, str] = ("", "")
    whole_pictures: Callable[[PreTrainedConfig], Whole] = lambda config: "nowhere"
    visual_mark: str | None = None
    logit_cap: Callable[[PreTrainedConfig], float | None] = lambda config: None
    logit_scale: Callable[[PreTrainedConfig], float] = lambda config: 1.0
    limit: Callable[[Any, Any, ModelConfig], None] | None = None
    limited_by: tuple[str, ...] = ()

    def module_of(self, name: str) -> Module:
        """Return the name of the module that the parameter ``name`` belongs to. Raises KeyError if it belongs to none."""
        prefixes: dict[Module, tuple[str, ...]] = {
            "vision_tower": self.vision_tower,
            "projector": self.projector,
            "language_model": self.language_model,
        }
        matches = [
            (len(prefix), module) for module, candidates in prefixes.items() for prefix in candidates if f"{name}.".startswith(f"{prefix}.")
        ]
        if not matches:
            raise KeyError(f"parameter {name!r} is in no module of family {self.model_types[0]!r}; add its prefix to the family record")
        return max(matches)[1]
