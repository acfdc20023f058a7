"""The LLaVA line: a CLIP or SigLIP tower, a two-layer projector and a causal language model.

LLaVA-1.5 has a fixed number of visual tokens per image; NeXT and OneVision cut the image into tiles and add a learned newline per row.
"""

from __future__ import annotations

from dataclasses import replace

from cfvlm_ds.models.family import Family, after_selected_layer
from cfvlm_ds.models.limits import grids

LLAVA = Family(
    model_types=("llava",),
    vision_tower=("model.vision_tower",),
    projector=("model.multi_modal_projector",),
    language_model=("model.language_model", "lm_head"),
    unused=after_selected_layer,
)
NEXT = Family(
    model_types=("llava_next",),
    vision_tower=("model.vision_tower",),
    projector=("model.multi_modal_projector", "model.image_newline"),
    language_model=("model.language_model", "lm_head"),
    unused=after_selected_layer,
    image_inputs=("pixel_values", "image_sizes"),
    limit=grids,
    limited_by=("max_tiles",),
)
ONEVISION = replace(
    NEXT, model_types=("llava_onevision",), image_inputs=("pixel_values", "image_sizes", "batch_num_images"), tiles_alone=True
)
