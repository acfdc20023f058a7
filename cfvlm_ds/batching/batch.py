"""Batches and micro-batches: the inputs of each forward, and the conversion of token log-probs to a score matrix.

Shapes: G groups, I images, C candidates, T tokens, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfvlm_ds.core.groups import Candidate, CounterfactualGroup, Pictures
from cfvlm_ds.core.layout import GroupLayout, InBatchNegatives
from cfvlm_ds.core.scores import Scores, score_matrix, token_matrix

BLANK = Path("\0/<blank image>")
"""Path that stands for the mid-grey image of the blind control. No file can have this path. Several blank images differ in their suffix."""
BLANK_SIZE = (336, 336)
"""Width and height of the blank image in pixels."""

STAND_IN = CounterfactualGroup("", ((BLANK,),), (Candidate("Describe the image.", "a"),), ((1,),))
"""Group that a rank scores if none of its own groups can be read. Under ZeRO-3, the other ranks wait for its forward."""


def blank_view(num_pictures: int) -> Pictures:
    """Return an image that consists of blank pictures."""
    return tuple(BLANK.with_suffix(f".{k}") for k in range(num_pictures))


def shown(group: CounterfactualGroup, image: int) -> Pictures:
    """Return the pictures of an image, or as many blank pictures for an index past the group's own images."""
    return group.images[image] if image < len(group.images) else blank_view(group.num_pictures)


def blinded(group: CounterfactualGroup) -> CounterfactualGroup:
    """Return the group with one blank image in place of its images. The first text counts as true; the truth of the others is unknown."""
    return replace(group, images=(shown(group, len(group.images)),), match=((1, *[None] * (len(group.candidates) - 1)),), edits=())


def on_device(image_inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the picture inputs to ``device``, except the picture sizes, which models read on the host."""
    sizes = {name: image_inputs[name] for name in ("image_sizes", "image_grid_thw", "batch_num_images") if name in image_inputs}
    moved: dict[str, Any] = _mapped(image_inputs, Tensor, lambda tensor: tensor.to(device, non_blocking=True))
    return moved | sizes


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward. The engine receives ``model_inputs`` and returns one log-prob per scored token, and one value
    for each pair of states that is compared.

    ``cell`` [N] is the flat index in [G, I, C] of each scored token's cell, and ``is_end`` [N] marks end-of-turn tokens. ``layout``
    describes the whole micro-batch. ``num_tokens`` counts the tokens of the row, and ``num_scored`` counts the positions that predict
    scored tokens.
    """

    model_inputs: dict[str, Any]
    cell: Tensor
    is_end: Tensor
    layout: GroupLayout
    reference: Tensor | None
    prior: Tensor | None
    num_tokens: int
    num_scored: int
    num_images: int
    material: Any = None
    """Trees of the row (cfvlm_ds.batching.packing.Material) if the row may be packed again, otherwise None."""

    def to(self, device: torch.device) -> Batch:
        """Copy the batch and move its tensors to ``device``. Picture sizes stay on the host."""
        moved: Batch = _mapped(self, Tensor, lambda tensor: tensor.to(device, non_blocking=True))
        moved.model_inputs["image_inputs"] = on_device(self.model_inputs["image_inputs"], device)
        return moved

    def pin_memory(self) -> Batch:
        """Copy the batch to pinned memory, so that transfers to the GPU overlap with computation. The DataLoader calls this."""
        return _mapped(self, Tensor, Tensor.pin_memory)

    def __reduce__(self) -> Any:
        """Pickle all tensors as one buffer, because every tensor sent between processes costs a handshake."""
        tensors: dict[int, Tensor] = {}
        stop = 0

        def place(tensor: Tensor) -> _Place:
            nonlocal stop
            start, stop = stop, stop + -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
            tensors[start] = tensor
            return _Place(start, tensor.dtype, tensor.shape)

        skeleton = {part.name: _mapped(getattr(self, part.name), Tensor, place) for part in fields(self)}
        joined = torch.empty(stop, dtype=torch.uint8)
        for start, tensor in tensors.items():
            joined[start : start + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)
        return _rejoined, (skeleton, joined)

    def scores(self, token_logp: Tensor) -> Scores:
        """Convert the engine's output to the score matrix of the batch, and to sums of divergences."""
        compared, shape = self.model_inputs.get("compared", {}), self.layout.valid.shape
        token_logp, *each = token_logp.split([len(self.cell), *(pairs.shape[1] for pairs in compared.values())])
        sums = [
            part.new_zeros(shape.numel()).index_add(0, pairs[2], part).view(shape)
            for part, pairs in zip(each, compared.values(), strict=True)
        ]
        of_tokens = (token_logp, self.cell, self.is_end, self.layout)
        tokens, divergences = token_matrix(*of_tokens), dict(zip(compared, sums, strict=True))
        return Scores(self.layout, *score_matrix(*of_tokens), self.reference, self.prior, tokens=tokens, divergences=divergences)


@dataclass(frozen=True)
class MicroBatch:
    """Groups of a rank whose gradients are computed together, in one forward or several.

    ``dropped`` lists the (id, reason) of every group that was left out.
    """

    forwards: tuple[Batch, ...]
    dropped: tuple[tuple[str, str], ...] = ()

    @property
    def layout(self) -> GroupLayout:
        """Layout of the whole micro-batch."""
        return self.forwards[0].layout

    def padded(self, number: int) -> tuple[Batch, ...]:
        """Return ``number`` forwards: the micro-batch's own, preceded by copies of the first one. The results of the copies are ignored.
        Under ZeRO-3, all ranks must run the same number of forwards.
        """
        return (self.forwards[0],) * (number - len(self.forwards)) + self.forwards

    def scores(self, token_logp: Sequence[Tensor]) -> Scores:
        """Join the engine's outputs for the ``padded`` forwards into one score matrix."""
        own = token_logp[len(token_logp) - len(self.forwards) :]
        parts = [batch.scores(logp) for batch, logp in zip(self.forwards, own, strict=True)]
        return parts[0] if len(parts) == 1 else Scores.joined(parts)

    def to(self, device: torch.device) -> MicroBatch:
        """Copy the micro-batch and move its tensors to ``device``."""
        return replace(self, forwards=tuple(batch.to(device) for batch in self.forwards))

    def pin_memory(self) -> MicroBatch:
        """Copy the micro-batch to pinned memory, so that transfers to the GPU overlap with computation. The DataLoader calls this."""
        return replace(self, forwards=tuple(batch.pin_memory() for batch in self.forwards))


_ALIGNMENT = 16  # bytes


class _Place(NamedTuple):
    """Offset, dtype and shape of a tensor in the joined bytes."""

    start: int
    dtype: torch.dtype
    shape: torch.Size


def _rejoined(skeleton: dict[str, Any], joined: Tensor) -> Batch:
    def cut(place: _Place) -> Tensor:
        size = place.dtype.itemsize * place.shape.numel()
        return joined[place.start : place.start + size].view(place.dtype).view(place.shape)

    return Batch(**_mapped(skeleton, _Place, cut))


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Apply ``change`` to every object of type ``kind`` in ``value``, including the contents of dicts and dataclasses."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {name: _mapped(item, kind, change) for name, item in value.items()}
    if isinstance(value, Batch | GroupLayout | InBatchNegatives):
        return replace(value, **{part.name: _mapped(getattr(value, part.name), kind, change) for part in fields(value)})
    return value
