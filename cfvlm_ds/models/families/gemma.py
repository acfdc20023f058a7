"""Gemma 3 and 4: sliding-window layers between full-attention layers, and bidirectional attention among the tokens of a picture.

Gemma 3 has a SigLIP tower with a fixed number of visual tokens per picture. A picture's tokens attend to each other in both directions in
all layers. Gemma 4 has a different tower, and its number of visual tokens is configurable. In its larger models, attention among a
picture's tokens is bidirectional only in the sliding-window layers; in its smaller models, it is causal everywhere.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.models.family import Family, Whole
from cfvlm_ds.models.visual_token_limits import budgets


def in_windows(config: PreTrainedConfig) -> Whole:
    """Return the layers in which a picture's tokens attend to each other in both directions: the sliding-window layers if the configuration
    requires it, otherwise none.
    """
    return "windows" if config.get_text_config().use_bidirectional_attention == "vision" else "nowhere"


def no_crops(processor: Any, config: Any, model: ModelConfig) -> None:
    """Raise ConfigError if pan and scan is enabled. It splits a picture into several blocks of tokens, and the words between the blocks are
    tokenised together with the prompt.
    """
    _generates(config)
    if processor is not None and getattr(processor.image_processor, "do_pan_and_scan", None):
        raise ConfigError("pan and scan is not supported; set do_pan_and_scan to false in the model's preprocessor_config.json")


def largest_budget(processor: Any, config: Any, model: ModelConfig) -> None:
    """Limit visual tokens to the largest budget within ``max_pixels``. Raises ConfigError if the model's text attends to later text."""
    _generates(config)
    budgets(processor, config, model)


def _generates(config: Any) -> None:
    if config is not None and config.get_text_config().use_bidirectional_attention in (True, "all"):
        raise ConfigError(
            "the model attends to later text (use_bidirectional_attention), so its texts have no likelihood; use another model"
        )


GEMMA_3 = Family(
    model_types=("gemma3",),
    unused=lambda config: ("model.vision_tower.head",),  # a pooling head, present in some checkpoints
    around=("\n\n", "\n\n"),
    whole_pictures=lambda config: "everywhere",
    visual_mark="token_type_ids",
    limit=no_crops,
)

GEMMA_4 = Family(
    model_types=("gemma4",),
    vision_tower=("model.vision_tower", "model.audio_tower", "model.embed_audio"),  # the last two process audio and are unused
    projector=("model.embed_vision",),
    image_inputs=("pixel_values", "image_position_ids"),
    unused=lambda config: ("model.audio_tower", "model.embed_audio"),  # present in some checkpoints
    whole_pictures=in_windows,
    visual_mark="mm_token_type_ids",
    logit_cap=lambda config: config.get_text_config().final_logit_softcapping,
    limit=largest_budget,
    limited_by=("max_pixels",),
)
