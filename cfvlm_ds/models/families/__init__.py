"""Model families, keyed by ``config.model_type``. Related families share a file. A new family needs a record in _RECORDS."""

from __future__ import annotations

from transformers import PreTrainedConfig

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.models.families.cohere import AYA, COMMAND
from cfvlm_ds.models.families.gemma import GEMMA_3, GEMMA_4
from cfvlm_ds.models.families.glm import GLM_4V
from cfvlm_ds.models.families.idefics import IDEFICS
from cfvlm_ds.models.families.internvl import INTERNVL
from cfvlm_ds.models.families.llava import LLAVA, NEXT, ONEVISION
from cfvlm_ds.models.families.mistral import MISTRAL_3
from cfvlm_ds.models.families.qwen import QWEN_3_5, QWEN_3_VL, QWEN_VL
from cfvlm_ds.models.family import Family

_RECORDS = (LLAVA, NEXT, ONEVISION, QWEN_VL, QWEN_3_VL, QWEN_3_5, INTERNVL, IDEFICS, GEMMA_3, GEMMA_4, MISTRAL_3, GLM_4V, AYA, COMMAND)
FAMILIES: dict[str, Family] = {model_type: family for family in _RECORDS for model_type in family.model_types}


def family_of(config: PreTrainedConfig) -> Family:
    """Return the family record of a model's configuration.

    Raises ConfigError for an unknown model type, and for a language model in which a text's score depends on the rest of its row.
    """
    if config.model_type in FAMILIES:
        text = config.get_text_config()
        ropes = getattr(text, "rope_parameters", None) or {}
        typed = [(rope, rope.get("rope_type")) for rope in (ropes, *ropes.values()) if isinstance(rope, dict)]
        kinds = [f"{kind}, long_mscale" if "long_mscale" in rope and kind != "default" else kind for rope, kind in typed]
        for option, values, known in (
            ("rope_type", kinds, (None, *_ROPES)),
            ("layer_types", getattr(text, "layer_types", None) or (), _LAYERS),
        ):
            if unknown := [kind for kind in values if kind not in known]:
                raise ConfigError(
                    f"model type {config.model_type!r}: its language model has {option} {unknown[0]!r}, with which a text's score may "
                    f"depend on the rest of its row; use a model with {', '.join(filter(None, known))}"
                )
        return FAMILIES[config.model_type]
    if not hasattr(config, "vision_config"):
        raise ConfigError(
            f"model type {config.model_type!r} has no vision tower; use a vision-language model of one of these types: "
            f"{', '.join(FAMILIES)}"
        )
    raise ConfigError(
        f"model type {config.model_type!r} is not supported; supported: {', '.join(FAMILIES)}; a family is one "
        "record, and docs/extending.md shows how to add one"
    )


_ROPES = ("default", "dynamic", "linear", "llama3", "proportional", "yarn")
"""Types of rotary position embedding whose frequencies are the same for all rows within the context window. ``longrope``, and any type with
PhiMoE's ``long_mscale``, depend on the largest position in the row.
"""
_LAYERS = ("full_attention", "sliding_attention", "linear_attention")
"""Layer types that support rows of trees. ``chunked_attention`` does not, because its chunks and its length scaling are counted from the
row's first token.
"""
