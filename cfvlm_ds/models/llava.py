"""The LLaVA line: a CLIP or SigLIP tower, a two-layer projector and a causal language model.

LLaVA-1.5 has a fixed number of visual tokens per image; NeXT and OneVision cut the image into tiles and add a learned newline per row.
"""

from __future__ import annotations

from cfvlm_ds.models.family import Family

LLAVA = Family(
    model_types=("llava",),
    vision_tower=("model.vision_tower",),
    projector=("model.multi_modal_projector",),
    language_model=("model.language_model", "lm_head"),
)
TILED = Family(
    model_types=("llava_next", "llava_onevision"),
    vision_tower=("model.vision_tower",),
    projector=("model.multi_modal_projector", "model.image_newline"),
    language_model=("model.language_model", "lm_head"),
    image_inputs=("pixel_values", "image_sizes"),
)
