"""Aya Vision and Command A Vision: a SigLIP tower for tiles, a projector that merges 2 x 2 patches, and mostly sliding-window layers."""

from __future__ import annotations

from dataclasses import replace

from cfvlm_ds.models.families.internvl import INTERNVL
from cfvlm_ds.models.families.llava import after_selected_layer

COMMAND = replace(INTERNVL, model_types=("cohere2_vision",))
AYA = replace(
    INTERNVL,
    model_types=("aya_vision",),
    unused=after_selected_layer,
    logit_scale=lambda config: config.get_text_config().logit_scale,  # Command A Vision's class in transformers does not scale logits
)
