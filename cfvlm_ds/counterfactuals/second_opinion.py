"""Cosines of pictures and texts by a CLIP or SigLIP of transformers, a second opinion beside the scorer.

They are written down; a threshold decides later, as it does of the scorer's matrix. The model runs on the first rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from cfvlm_ds.core.errors import ConfigError, is_failure

_DECIMALS = 4


class SecondOpinion:
    """A CLIP or SigLIP. Raises ConfigError for a model that cannot be loaded, or is of another kind."""

    def __init__(self, name: str) -> None:
        import torch
        from transformers import AutoModel, AutoProcessor

        self._torch = torch
        try:
            self._model = AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False).eval()
            self._processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # what a folder that is no such model makes of it
            if not is_failure(error):
                raise
            raise ConfigError(
                f"--clip {name}: it cannot be loaded ({type(error).__name__}: {error}); name a model folder or hub name"
            ) from error
        if not (hasattr(config := self._model.config, "text_config") and hasattr(config, "vision_config")):
            raise ConfigError(f"--clip {name}: a {config.model_type} compares no pictures with texts; name a CLIP or SigLIP")
        self._model.to("cuda" if torch.cuda.is_available() else "cpu")

    def cosines(self, texts: Sequence[str], pictures: Sequence[Image.Image]) -> list[list[float | None]]:
        """Return the cosine of each text (columns) with each picture (rows); None where it is not finite."""
        length = getattr(self._model.config.text_config, "max_position_embeddings", 64)
        inputs = self._processor(
            text=list(texts), images=list(pictures), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        with self._torch.inference_mode():
            said = self._model(**inputs.to(self._model.device))
        cosines = _unit(said.image_embeds) @ _unit(said.text_embeds).T
        return [[round(value, _DECIMALS) if value - value == 0 else None for value in row] for row in cosines.tolist()]


def _unit(values: Any) -> Any:
    values = values.float()
    return values / values.norm(dim=-1, keepdim=True)
