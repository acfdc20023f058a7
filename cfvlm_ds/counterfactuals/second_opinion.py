"""What other models of transformers say of a candidate beside its scorer: CLIP or SigLIP, a vision encoder such as DINO, and NLI.

All of it is written down; thresholds decide later, as they do of the scorer's matrix. Models run on the first rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from cfvlm_ds.core.errors import ConfigError, is_failure

_DECIMALS = 4
_ENTAILMENT = "entail"


class SecondOpinion:
    """The models that were named. Raises ConfigError for one that cannot be loaded, or is of another kind."""

    def __init__(self, clip: str = "", dino: str = "", nli: str = "") -> None:
        import torch

        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._clip: Any = _loaded("--clip", clip, self._device, _clip) if clip else None
        self._dino: Any = _loaded("--dino", dino, self._device, _encoder) if dino else None
        self._nli: Any = _loaded("--nli", nli, self._device, _nli) if nli else None

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
        (model, tokenizer), place = self._nli[:2], self._nli[2]
        inputs = tokenizer(premise, other, truncation=True, return_tensors="pt").to(self._device)
        return _rounded(float(model(**inputs).logits[0].float().softmax(-1)[place]))


def _clip(name: str) -> tuple[Any, ...]:
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False)
    if not hasattr(model.config, "text_config") or not hasattr(model.config, "vision_config"):
        raise ConfigError(f"--clip {name}: a {model.config.model_type} compares no pictures with texts; name a CLIP or SigLIP")
    return model, AutoProcessor.from_pretrained(name, trust_remote_code=False)


def _encoder(name: str) -> tuple[Any, ...]:
    from transformers import AutoImageProcessor, AutoModel

    model = AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False)
    return model, AutoImageProcessor.from_pretrained(name, trust_remote_code=False)


def _nli(name: str) -> tuple[Any, ...]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(name, use_safetensors=True, trust_remote_code=False)
    labels: Mapping[int, str] = model.config.id2label
    places = [int(place) for place, label in labels.items() if str(label).lower().startswith(_ENTAILMENT)]
    if len(places) != 1:
        raise ConfigError(f"--nli {name}: none of its labels ({', '.join(map(str, labels.values()))}) is entailment; name a model of NLI")
    return model, AutoTokenizer.from_pretrained(name, trust_remote_code=False), places[0]


def _loaded(option: str, name: str, device: str, load: Callable[[str], tuple[Any, ...]]) -> Any:
    try:
        model, *rest = load(name)
        return (model.eval().to(device), *rest)
    except ConfigError:
        raise
    except Exception as error:  # what a folder that is no such model makes of it
        if not is_failure(error):
            raise
        raise ConfigError(
            f"{option} {name}: it cannot be loaded ({type(error).__name__}: {error}); name a model folder or hub name"
        ) from error


def _unit(values: Any) -> Any:
    values = values.float()
    return values / values.norm(dim=-1, keepdim=True)


def _rounded(value: float) -> float | None:
    """A number that is not finite is none: JSON has no word for it."""
    return round(value, _DECIMALS) if value - value == 0 else None
