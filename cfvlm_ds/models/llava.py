"""LLaVA-1.5: a CLIP tower, a two-layer projector, a Llama-like language model; a fixed number of visual tokens per image."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cfvlm_ds.models.family import Family


def _encode_images(model: Any, image_inputs: dict[str, Tensor]) -> list[Tensor]:
    return list(model.get_image_features(pixel_values=image_inputs["pixel_values"], return_dict=True).pooler_output)


FAMILY = Family(
    model_types=("llava",),
    vision_tower=("model.vision_tower",),
    projector=("model.multi_modal_projector",),
    language_model=("model.language_model", "lm_head"),
    image_inputs=("pixel_values",),
    encode_images=_encode_images,
)
