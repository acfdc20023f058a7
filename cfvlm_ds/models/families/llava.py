"""LLaVA: a CLIP or SigLIP tower, a two-layer projector and a causal language model.

LLaVA-1.5 has a fixed number of visual tokens per image. LLaVA-NeXT and OneVision cut the image into tiles and add a learned newline token
after each row of features.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedConfig

from cfvlm_ds.models.family import Family
from cfvlm_ds.models.visual_token_limits import grids


def after_selected_layer(config: PreTrainedConfig, blocks: str = "model.vision_tower.encoder.layers") -> tuple[str, ...]:
    """Return the name prefixes of a tower's unused weights: the layers after the last one whose output the model uses, and the norm and
    head for pooled output. ``blocks`` is the prefix of the tower's layers.
    """
    depth, selected = config.vision_config.num_hidden_layers, config.vision_feature_layer
    layers = [selected] if isinstance(selected, int) else selected
    last = max(layer % (depth + 1) for layer in layers)
    return (*(f"{blocks}.{k}" for k in range(last, depth)), "model.vision_tower.post_layernorm", "model.vision_tower.head")


LLAVA = Family(
    model_types=("llava",),
    unused=after_selected_layer,
)
NEXT = Family(
    model_types=("llava_next",),
    projector=("model.multi_modal_projector", "model.image_newline"),
    unused=after_selected_layer,
    image_inputs=("pixel_values", "image_sizes"),
    limit=grids,
    limited_by=("max_tiles",),
)
ONEVISION = replace(
    NEXT,
    model_types=("llava_onevision",),
    image_inputs=("pixel_values", "image_sizes", "batch_num_images"),
    tiles_alone=True,
)
