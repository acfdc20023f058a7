"""InternVL in the Hugging Face format: an InternViT tower for image tiles, pixel shuffle, and a two-layer projector."""

from __future__ import annotations

from cfvlm_ds.models.family import Family
from cfvlm_ds.models.visual_token_limits import patches

INTERNVL = Family(
    model_types=("internvl",),
    limit=patches,
    limited_by=("max_tiles",),
)
