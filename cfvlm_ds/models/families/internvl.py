"""InternVL in the Hugging Face format: an InternViT tower for image tiles, pixel shuffle, and a two-layer projector."""

from __future__ import annotations

from cfvlm_ds.models.family import Family
from cfvlm_ds.models.visual_token_limits import patches

INTERNVL = Family(
    model_types=("internvl",),
    vision_tower=("model.vision_tower",),
    projector=("model.multi_modal_projector",),
    language_model=("model.language_model", "lm_head"),
    limit=patches,
    limited_by=("max_tiles",),
)
