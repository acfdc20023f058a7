"""Idefics3 and SmolVLM: a SigLIP tower for image tiles and a downscaled overview, pixel shuffle, and a linear connector."""

from __future__ import annotations

from cfvlm_ds.models.family import Family
from cfvlm_ds.models.visual_token_limits import squares

IDEFICS = Family(
    model_types=("idefics3", "smolvlm"),
    vision_tower=("model.vision_model",),
    projector=("model.connector",),
    language_model=("model.text_model", "lm_head"),
    image_inputs=("pixel_values", "pixel_attention_mask"),
    limit=squares,
    limited_by=("max_tiles",),
)
