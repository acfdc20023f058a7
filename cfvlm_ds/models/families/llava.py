"""LLaVA: a CLIP or SigLIP tower, a two-layer projector and a causal language model.

LLaVA-1.5 has a fixed number of visual tokens per image. LLaVA-NeXT and OneVision cut the image into tiles and add a learned newline token
after each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from cfvlm_ds.models.family import Arrange, Family
from cfvlm_ds.models.visual_token_limits import grids


def after_selected_layer(config: PreTrainedConfig, blocks: str = "model.vision_tower.encoder.layers") -> tuple[str, ...]:
    """Return the name prefixes of a tower's unused weights: the layers after the last one whose output the model uses, and the norm and
    head for pooled output. ``blocks`` is the prefix of the tower's layers.
    """
    depth, selected = config.vision_config.num_hidden_layers, config.vision_feature_layer
    layers = [selected] if isinstance(selected, int) else selected
    last = max(layer % (depth + 1) for layer in layers)
    return (*(f"{blocks}.{k}" for k in range(last, depth)), "model.vision_tower.post_layernorm", "model.vision_tower.head")


def tiles_packed(option: str) -> Arrange:
    """Return an ``Arrange`` function that puts features in the model's order: first the overview, then the tiles side by side, with padding
    removed and a newline token after each row.

    ``option`` names the configuration option that the model's ``pack_image_features`` takes as an argument.
    """

    def arrange(model: Any, projected: Tensor, rows: Sequence[int], inputs: dict[str, Tensor]) -> Sequence[Tensor]:
        base, options = model.base_model, {option: getattr(model.config, option)}
        return base.pack_image_features(projected.split(rows), inputs["image_sizes"], image_newline=base.image_newline, **options)[0]

    return arrange


LLAVA = Family(
    model_types=("llava",),
    unused=after_selected_layer,
)
NEXT = Family(
    model_types=("llava_next",),
    projector=("model.multi_modal_projector", "model.image_newline"),
    unused=after_selected_layer,
    image_inputs=("pixel_values", "image_sizes"),
    per_image=("image_sizes",),
    arrange=tiles_packed("vision_feature_select_strategy"),
    limit=grids,
    limited_by=("max_tiles",),
)
ONEVISION = replace(
    NEXT,
    model_types=("llava_onevision",),
    image_inputs=("pixel_values", "image_sizes", "batch_num_images"),
    arrange=tiles_packed("vision_aspect_ratio"),
    tiles_alone=True,
)
