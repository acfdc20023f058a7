"""A model family: what differs between LLaVA, Qwen-VL and their kin, as one record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from cfvlm_ds.likelihood import token_logprobs

Module = Literal["vision_tower", "projector", "language_model"]
MODULES: tuple[Module, ...] = ("vision_tower", "projector", "language_model")


Positions = Callable[[PreTrainedConfig, Tensor, "Tensor | None"], Tensor]
"""(model configuration, [P] bool: which prompt tokens are visual, the image's grid) -> position ids of the prompt, [P] or [axes, P]."""


def sequential(config: PreTrainedConfig, visual: Tensor, grid: Tensor | None) -> Tensor:
    """Ordinary positions: 0, 1, 2, ..."""
    return torch.arange(len(visual))


@dataclass(frozen=True)
class Family:
    """What the toolkit must know about a family of models.

    Args:
        model_types: values of ``config.model_type``; a path's name never decides.
        vision_tower, projector, language_model: prefixes of parameter names, after any wrapper prefix; the longest that fits decides, so a
            projector may live inside the tower. The output head belongs to the language model.
        image_inputs: processor outputs that travel with the images: the arguments of the model's ``get_image_features``.
        grid: the one of them that holds one row per image with its grid of patches, for families whose positions need it.
        positions: position ids of a prompt; a text behind it goes on at the largest plus one, on every axis.
        one_tensor: whether the model's forward takes the features of all images as one tensor instead of a list.
    """

    model_types: tuple[str, ...]
    vision_tower: tuple[str, ...]
    projector: tuple[str, ...]
    language_model: tuple[str, ...]
    image_inputs: tuple[str, ...] = ("pixel_values",)
    grid: str | None = None
    positions: Positions = sequential
    one_tensor: bool = False

    def module_of(self, name: str) -> Module:
        """The module a parameter belongs to, by its name inside the model. Raises KeyError when no prefix fits."""
        prefixes: dict[Module, tuple[str, ...]] = {
            "vision_tower": self.vision_tower,
            "projector": self.projector,
            "language_model": self.language_model,
        }
        fitting = [
            (len(prefix), module) for module, candidates in prefixes.items() for prefix in candidates if f"{name}.".startswith(f"{prefix}.")
        ]
        if not fitting:
            raise KeyError(f"parameter {name!r} is in no module of family {self.model_types[0]!r}; add its prefix to the family record")
        return max(fitting)[1]


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
        image_of_row: Sequence[int | None],
        visual_tokens: Sequence[int],
        image_inputs: dict[str, Tensor],
    ) -> Tensor:
        """Log-probs [N], nats, fp32, of ``targets`` [N].

        ``input_ids`` [R, T]; ``position_ids`` [R, T] or [axes, R, T]; ``attention_mask`` [R, T], or [R, 1, T, T] bool; ``scored`` [R, T]
        bool marks the positions whose logits are needed, and ``predicted_by`` [N] is the rank among them, in row-major order, of the one
        that predicts each target; ``image_of_row`` [R] index of each row's image among the distinct images of ``image_inputs``, None for a
        row without one; ``visual_tokens`` the number of visual tokens of each distinct image.
        """
        encoded, unused = self._encode(image_of_row, visual_tokens, image_inputs)
        logits = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            mm_encoder_outputs=encoded,
            logits_to_keep=scored,
            use_cache=False,
        ).logits
        # An image that no row shows still takes part in the backward pass: ZeRO-3 waits for every rank at every module.
        return token_logprobs(logits[predicted_by], targets) + 0 * unused

    def _encode(
        self, image_of_row: Sequence[int | None], visual_tokens: Sequence[int], image_inputs: dict[str, Tensor]
    ) -> tuple[dict[str, Any], Tensor]:
        """The rows' image features in the form the model's forward takes, and the sum of the features that no row uses."""
        model: Any = self.model
        output = model.get_image_features(**image_inputs, return_dict=True)
        features = _per_image(output.pooler_output, visual_tokens)
        shown = [i for i in image_of_row if i is not None]
        hidden = [feature.sum() for i, feature in enumerate(features) if i not in shown]
        unused = torch.stack(hidden).sum().float() if hidden else torch.zeros((), device=features[0].device)
        if not shown:
            return {}, unused
        rows = [features[i] for i in shown]
        output.pooler_output = torch.cat(rows).unsqueeze(0) if self.family.one_tensor else rows
        if hasattr(output, "deepstack_features"):  # further features, added inside the language model
            layers = [_per_image(layer, visual_tokens) for layer in output.deepstack_features]
            output.deepstack_features = [[layer[i] for i in shown] for layer in layers]
            unused = unused + sum(layer[i].sum().float() for layer in layers for i in range(len(visual_tokens)) if i not in shown)
        return {"image": output}, unused


def _per_image(features: Tensor | Sequence[Tensor], visual_tokens: Sequence[int]) -> list[Tensor]:
    """Features however a family returns them (per image, per tile, in one piece) as one [visual tokens, hidden] tensor per image."""
    pieces = [features] if isinstance(features, Tensor) else features
    flat = torch.cat([piece.reshape(-1, piece.shape[-1]) for piece in pieces])
    if len(flat) != sum(visual_tokens):
        raise ValueError(f"the tower gave {len(flat)} visual tokens where the prompts have {sum(visual_tokens)} placeholders")
    return list(flat.split(list(visual_tokens)))
