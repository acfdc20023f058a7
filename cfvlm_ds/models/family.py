"""A model family: what differs between LLaVA, Qwen-VL and their kin, as one record."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from cfvlm_ds.likelihood import token_logprobs

Module = Literal["vision_tower", "projector", "language_model"]
MODULES: tuple[Module, ...] = ("vision_tower", "projector", "language_model")


@dataclass(frozen=True)
class Family:
    """What the toolkit must know about a family of models.

    Args:
        model_types: values of ``config.model_type``; a path's name never decides.
        vision_tower, projector, language_model: prefixes of parameter names, after any wrapper prefix. The output head belongs to the
            language model.
        image_inputs: processor outputs that travel with an image; outputs of several images are concatenated along the first axis.
        encode_images: (model, image inputs) -> one [visual tokens, hidden] tensor per image, in order.
    """

    model_types: tuple[str, ...]
    vision_tower: tuple[str, ...]
    projector: tuple[str, ...]
    language_model: tuple[str, ...]
    image_inputs: tuple[str, ...]
    encode_images: Callable[[PreTrainedModel, dict[str, Tensor]], list[Tensor]]

    def module_of(self, name: str) -> Module:
        """The module a parameter belongs to, by its name inside the model. Raises KeyError when no prefix fits."""
        prefixes: dict[Module, tuple[str, ...]] = {
            "vision_tower": self.vision_tower,
            "projector": self.projector,
            "language_model": self.language_model,
        }
        for module, candidates in prefixes.items():
            if any(re.match(rf"{re.escape(prefix)}(\.|$)", name) for prefix in candidates):
                return module
        raise KeyError(f"parameter {name!r} belongs to no module of family {self.model_types[0]!r}; add its prefix to the family record")


class Scorer(nn.Module):
    """The module DeepSpeed drives: encode each distinct image once, run the language model, return log-probs of the scored tokens.

    Everything happens inside one forward, so that ZeRO-3 gathers each layer once however many candidates there are, and every rank calls
    every submodule the same number of times.
    """

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        super().__init__()
        self.model = model
        self.family = family

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        scored: Tensor,
        predicted_by: Tensor,
        targets: Tensor,
        image_of_row: Tensor,
        image_inputs: dict[str, Tensor],
    ) -> Tensor:
        """Log-probs [N], nats, fp32, of ``targets`` [N].

        ``input_ids``, ``position_ids`` [R, T]; ``attention_mask`` [R, T], or [R, 1, T, T] bool; ``scored`` [R, T] bool marks the positions
        whose logits are needed, and ``predicted_by`` [N] is the rank among them, in row-major order, of the one that predicts each target;
        ``image_of_row`` [R] index of each row's image among the distinct images of ``image_inputs``.
        """
        features = self.family.encode_images(self.model, image_inputs)
        per_row = [features[i] for i in image_of_row.tolist()]
        logits = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=per_row)},  # type: ignore[arg-type]
            logits_to_keep=scored,
            use_cache=False,
        ).logits
        return token_logprobs(logits[predicted_by], targets)
