"""What other models of transformers say of a candidate beside its scorer: CLIP or SigLIP, a vision encoder such as DINO, and NLI.

All of it is written down; thresholds decide later, as they do of the scorer's matrix. Models run on the first rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from cfvlm_ds.core.errors import ConfigError, is_failure

_DECIMALS = 4
_ENTAILMENT = "entail"


class SecondOpinion:
    """The models that were named. Raises ConfigError for one that cannot be loaded, or is of another kind."""

    def __init__(self, clip: str = "", dino: str = "", nli: str = "") -> None:
        import torch
        from transformers import AutoImageProcessor, AutoModel, AutoModelForSequenceClassification, AutoProcessor, AutoTokenizer

        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._clip = self._loaded("--clip", clip, AutoModel, AutoProcessor)
        self._dino = self._loaded("--dino", dino, AutoModel, AutoImageProcessor)
        self._nli = self._loaded("--nli", nli, AutoModelForSequenceClassification, AutoTokenizer)
        if self._clip and not (hasattr(config := self._clip[0].config, "text_config") and hasattr(config, "vision_config")):
            raise ConfigError(f"--clip {clip}: a {config.model_type} compares no pictures with texts; name a CLIP or SigLIP")
        if self._nli:
            labels = self._nli[0].config.id2label
            places = [int(place) for place, label in labels.items() if str(label).lower().startswith(_ENTAILMENT)]
            if len(places) != 1:
                said = ", ".join(map(str, labels.values()))
                raise ConfigError(f"--nli {nli}: none of its labels ({said}) is entailment; name a model of NLI")
            self._entailment = places[0]

    def _loaded(self, option: str, name: str, model: Any, processor: Any) -> Any:
        """A model with its processor; None where none is named."""
        if not name:
            return None
        try:
            loaded = model.from_pretrained(name, use_safetensors=True, trust_remote_code=False).eval().to(self._device)
            return loaded, processor.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # what a folder that is no such model makes of it
            if not is_failure(error):
                raise
            raise ConfigError(
                f"{option} {name}: it cannot be loaded ({type(error).__name__}: {error}); name a model folder or hub name"
            ) from error

    def of(self, caption: str, text: str, pictures: Sequence[Image.Image]) -> dict[str, Any]:
        """``clip``: cosines, a row for each picture, of the caption and the new text. ``dino``: cosine of both pictures. ``nli``: the share
        that the caption entails the text, and the other way round."""
        found: dict[str, Any] = {}
        with self._torch.inference_mode():
            if self._clip is not None and pictures:
                found["clip"] = self._cosines([caption, text], pictures)
            if self._dino is not None and len(pictures) == 2:
                found["dino"] = self._alike(pictures)
            if self._nli is not None:
                found["nli"] = [self._entails(caption, text), self._entails(text, caption)]
        return found

    def _cosines(self, texts: Sequence[str], pictures: Sequence[Image.Image]) -> list[list[float | None]]:
        model, processor = self._clip
        length = getattr(model.config.text_config, "max_position_embeddings", 64)
        inputs = processor(
            text=list(texts), images=list(pictures), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        said = model(**inputs.to(self._device))
        return [[_rounded(value) for value in row] for row in (_unit(said.image_embeds) @ _unit(said.text_embeds).T).tolist()]

    def _alike(self, pictures: Sequence[Image.Image]) -> float | None:
        model, processor = self._dino
        said = model(**processor(images=list(pictures), return_tensors="pt").to(self._device))
        first, second = _unit(said.last_hidden_state[:, 0])
        return _rounded(float(first @ second))

    def _entails(self, premise: str, other: str) -> float | None:
        model, tokenizer = self._nli
        inputs = tokenizer(premise, other, truncation=True, return_tensors="pt").to(self._device)
        return _rounded(float(model(**inputs).logits[0].float().softmax(-1)[self._entailment]))


def _unit(values: Any) -> Any:
    values = values.float()
    return values / values.norm(dim=-1, keepdim=True)


def _rounded(value: float) -> float | None:
    """A number that is not finite is none: JSON has no word for it."""
    return round(value, _DECIMALS) if value - value == 0 else None
