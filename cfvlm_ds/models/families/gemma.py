"""Gemma 3: a SigLIP tower with a fixed number of visual tokens, layers with a sliding window between full ones, and pictures whose tokens
see each other in both directions, in all layers."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.models.family import Family


def pooled_output(config: PreTrainedConfig) -> tuple[str, ...]:
    """The head of a tower's pooled output, if the checkpoint has one."""
    return ("model.vision_tower.head",)


def no_crops(processor: Any, config: Any, model: ModelConfig) -> None:
    """A picture is one block of tokens. With pan and scan it would be several, with words between them that join those of the prompt."""
    _generates(config)
    if processor is not None and getattr(processor.image_processor, "do_pan_and_scan", None):
        raise ConfigError("pan and scan is not supported; set do_pan_and_scan to false in the model's preprocessor_config.json")


def _generates(config: Any) -> None:
    if config is not None and config.get_text_config().use_bidirectional_attention in (True, "all"):
        raise ConfigError("the model's texts see what follows them (use_bidirectional_attention), so they have no likelihood; name another")


GEMMA_3 = Family(
    model_types=("gemma3",),
    vision_tower=("model.vision_tower",),
    projector=("model.multi_modal_projector",),
    language_model=("model.language_model", "lm_head"),
    one_tensor=True,
    unused=pooled_output,
    around=("\n\n", "\n\n"),
    whole_pictures=lambda config: "everywhere",
    visual_mark="token_type_ids",
    limit=no_crops,
)
