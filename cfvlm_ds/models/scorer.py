"""The module that DeepSpeed runs: a model whose output head returns the log-probs of scored tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cfvlm_ds.core.layout import Divergence
from cfvlm_ds.models.chunked_logprobs import head_logprobs
from cfvlm_ds.models.family import Family
from cfvlm_ds.models.forest import Forest
from cfvlm_ds.models.routers import Routed, Routers


class ScoringHead(nn.Linear):
    """An output head that returns log-probs instead of logits if targets are given.

    It is a separate module because ZeRO-3 gathers a weight only while the module that owns it runs.
    """

    def __init__(self, in_features: int, out_features: int, cap: float | None = None) -> None:
        """Create the head on the meta device. ``cap`` soft-caps the logits from which log-probs are computed. Logits that the head returns
        are not capped, because the model does that itself.
        """
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.cap = cap

    @classmethod
    def of(cls, head: nn.Linear, cap: float | None) -> ScoringHead:
        """Return a scoring head that shares the parameters of ``head``. Raises ValueError for a head with a bias, which no supported family
        has.
        """
        if head.bias is not None:
            raise ValueError("the model's output head has a bias, which is not supported")
        scoring = cls(head.in_features, head.out_features, cap)
        scoring.weight = head.weight
        return scoring.train(head.training)

    def forward(
        self,
        hidden: Tensor,
        predicted_by: Tensor | None = None,
        targets: Tensor | None = None,
        compared: Mapping[Divergence, Tensor] | None = None,
    ) -> Tensor:
        """Return the logits [..., V] of ``hidden`` [..., d] or, given ``targets`` [N], their log-probs [N] followed by the divergences of
        ``compared`` (see ``head_logprobs``). ``predicted_by`` [N] holds, for each target, the row of ``hidden`` [P, d] that predicts it.
        """
        if predicted_by is None or targets is None:
            return super().forward(hidden)
        return head_logprobs(hidden, self.weight, predicted_by, targets, self.cap, compared)


class Scorer(nn.Module):
    """The module that DeepSpeed runs. It encodes each distinct image once, runs the language model, and returns the log-probs of scored
    tokens.

    Everything happens in one forward pass, so ZeRO-3 gathers each layer only once, however many candidates there are, and every rank calls
    every submodule the same number of times. For a mixture of experts, ``routed`` holds the expert routing of the last forward pass.
    """

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        super().__init__()
        if not isinstance(head := model.get_output_embeddings(), ScoringHead):
            model.set_output_embeddings(ScoringHead.of(head, family.logit_cap(model.config)))
        family.take_trees(model)
        self.model = model
        self.family = family
        self.routed: Routed | None = None
        self._routers = Routers(model)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        forest: Forest,
        visual: Tensor,
        scored: Tensor,
        predicted_by: Tensor,
        targets: Tensor,
        images_of_tree: Sequence[Sequence[int]],
        visual_tokens: Sequence[int],
        image_inputs: dict[str, Any],
        compared: Mapping[Divergence, Tensor] | None = None,
    ) -> Tensor:
        """Return the log-probs [N] of ``targets`` [N] in nats and fp32, followed by the divergences of ``compared``.

        Args:
            input_ids: [1, T].
            position_ids: [1, T] or [axes, 1, T].
            forest: the tree structure of the row's tokens.
            visual: indices of the visual tokens in the row.
            scored: [P] positions whose logits are needed.
            predicted_by: [N] index into ``scored`` of the position that predicts each target.
            images_of_tree: for each tree, the indices of its images among the distinct images in ``image_inputs``.
            visual_tokens: number of visual tokens in each distinct image.
            image_inputs: inputs of the vision tower.
            compared: pairs of indices into ``scored`` for each divergence, as in ``head_logprobs``.
        """
        features, unused = self._encode(images_of_tree, visual_tokens, image_inputs)

        def show(module: nn.Module, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            """Insert image features at the visual tokens. The model's own code would have to synchronise with the device to find them."""
            embedded = named["inputs_embeds"]
            if features:
                embedded = embedded.index_copy(1, visual, features[0].to(embedded.dtype).unsqueeze(0))
            if features[1:]:
                named |= {"visual_pos_masks": visual, "deepstack_visual_embeds": features[1:]}
            # An image that occurs in no tree still takes part in the backward pass: ZeRO-3 waits for every rank at every module, and if
            # text embeddings are frozen, only image features carry gradients through the language model.
            return args, named | {"inputs_embeds": embedded + 0 * unused}

        # The argument that marks visual tokens is needed only by transformers' own attention, for the masks of some families.
        mark = self.family.visual_mark
        marked = {} if mark is None else {mark: (input_ids == self.model.config.image_token_id).long()}
        language_model = self.model.get_submodule(self.family.language_model[0])
        handle = language_model.register_forward_pre_hook(show, with_kwargs=True)
        try:
            with self._routers as routers:
                hidden = self.model.base_model(
                    input_ids=input_ids,
                    position_ids=position_ids,
                    forest=forest,
                    use_cache=False,
                    **marked,
                ).last_hidden_state
                self.routed = routers.routed(forest)
        finally:
            handle.remove()
        states = hidden[0].index_select(0, scored) * self.family.logit_scale(self.model.config)
        return self.model.get_output_embeddings()(states, predicted_by, targets, compared=compared)

    def _encode(
        self, images_of_tree: Sequence[Sequence[int]], visual_tokens: Sequence[int], image_inputs: dict[str, Any]
    ) -> tuple[list[Tensor], Tensor]:
        """Encode the images. Return the features of the images that occur in trees, as one tensor for the embeddings and one for each
        deeper layer that takes image features. Also return the sum of all other features, which keeps their images in the autograd graph.
        """
        model: Any = self.model
        output = model.get_image_features(**image_inputs, return_dict=True)
        shown = [i for images in images_of_tree for i in images]
        layers = [_per_image(layer, visual_tokens) for layer in (output.pooler_output, *getattr(output, "deepstack_features", ()))]
        hidden = [layer[i].sum() for layer in layers for i in range(len(visual_tokens)) if i not in shown]
        unused = torch.stack(hidden).sum() if hidden else torch.zeros((), dtype=layers[0][0].dtype, device=layers[0][0].device)
        return [torch.cat([layer[i] for i in shown]) for layer in layers if shown], unused


def _per_image(features: Tensor | Sequence[Tensor], visual_tokens: Sequence[int]) -> list[Tensor]:
    """Return one tensor [visual tokens, hidden] per image. Families return features per image, per tile, or as a single tensor."""
    pieces = [features] if isinstance(features, Tensor) else features
    flat = torch.cat([piece.reshape(-1, piece.shape[-1]) for piece in pieces])
    if len(flat) != sum(visual_tokens):
        raise ValueError(f"the tower returned {len(flat)} visual tokens, but the prompts have {sum(visual_tokens)} placeholders")
    return list(flat.split(list(visual_tokens)))
