"""Mistral 3 (Mistral Small 3.1 and 3.2, Ministral 3): a native-resolution Pixtral tower, and a projector that first merges patches."""

from __future__ import annotations

from functools import partial

from cfvlm_ds.models.families.llava import after_selected_layer
from cfvlm_ds.models.family import Family
from cfvlm_ds.models.visual_token_limits import longest_edge

MISTRAL_3 = Family(
    model_types=("mistral3",),
    image_inputs=("pixel_values", "image_sizes"),
    unused=partial(after_selected_layer, blocks="model.vision_tower.transformer.layers"),
    limit=longest_edge,
    limited_by=("max_pixels",),
)
