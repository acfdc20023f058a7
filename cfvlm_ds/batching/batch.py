"""Batches and micro-batches: the inputs of each forward pass, and the conversion of token log-probs to a score matrix.

Shapes: G groups, I images, C candidates, T tokens, N scored tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfvlm_ds.core.errors import OutOfMemory
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup, Pictures
from cfvlm_ds.core.layout import GroupLayout, InBatchNegatives
from cfvlm_ds.core.scores import Scores, score_matrix, token_matrix

Inputs = dict[str, Any]
"""Keyword arguments for a forward pass of the model or its vision tower."""
BLANK = Path("\0/<blank image>")
"""Path that stands for a blank (mid-grey) picture; no real file can have it. The blank pictures of one image differ in their suffixes."""
BLANK_SIZE = (336, 336)
"""Width and height of a blank picture in pixels."""

STAND_IN = CounterfactualGroup("", ((BLANK,),), (Candidate("Describe the image.", "a"),), ((1,),))
"""Group that a rank scores if it cannot read any of its own, because under ZeRO-3 the other ranks wait for its forward pass."""


def blank_view(num_pictures: int) -> Pictures:
    """Return an image that consists of ``num_pictures`` blank pictures."""
    return tuple(BLANK.with_suffix(f".{k}") for k in range(num_pictures))


def shown(group: CounterfactualGroup, image: int) -> Pictures:
    """Return the pictures of the group's image at this index. The index after the last image stands for the blank image."""
    return group.images[image] if image < len(group.images) else blank_view(group.num_pictures)


def blinded(group: CounterfactualGroup) -> CounterfactualGroup:
    """Return the group with a single blank image in place of its images. The first text is marked as true, all others as unknown."""
    return replace(group, images=(shown(group, len(group.images)),), match=((1, *[None] * (len(group.candidates) - 1)),), edits=())


def on_device(image_inputs: Inputs, device: torch.device) -> Inputs:
    """Move the picture inputs to ``device``. Picture sizes stay on the host, where models read them."""
    sizes = {name: image_inputs[name] for name in ("image_sizes", "image_grid_thw", "batch_num_images") if name in image_inputs}
    moved: Inputs = _mapped(image_inputs, Tensor, lambda tensor: tensor.to(device, non_blocking=True))
    return moved | sizes


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass. The engine receives ``model_inputs`` and returns one log-prob per scored token, and one divergence per
    pair of compared hidden states.

    For each scored token, ``cell`` [N] holds its cell's flat index in [G, I, C], and ``is_end`` [N] is True for end-of-turn tokens.
    ``layout`` describes the whole micro-batch. ``num_tokens`` is the number of tokens in the row, and ``num_scored`` the number of
    positions that predict scored tokens.
    """

    model_inputs: Inputs
    cell: Tensor
    is_end: Tensor
    layout: GroupLayout
    reference: Tensor | None
    prior: Tensor | None
    num_tokens: int
    num_scored: int
    num_images: int
    material: Any = None
    """The row's trees (cfvlm_ds.batching.packing.Material) if the row may have to be packed again, otherwise None."""

    def to(self, device: torch.device) -> Batch:
        """Return a copy of the batch with its tensors on ``device``, except for picture sizes."""
        moved: Batch = _mapped(self, Tensor, lambda tensor: tensor.to(device, non_blocking=True))
        moved.model_inputs["image_inputs"] = on_device(self.model_inputs["image_inputs"], device)
        return moved

    def pin_memory(self) -> Batch:
        """Return a copy in pinned memory, so that transfers to the GPU overlap with computation. The DataLoader calls this."""
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
        """Convert the engine's output to Scores: the batch's score matrix, and each divergence's sum per cell."""
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
    """Groups whose gradients a rank computes together, in one or more forward passes.

    ``dropped`` lists (id, reason) for every group that was omitted.
    """

    forwards: tuple[Batch, ...]
    dropped: tuple[tuple[str, str], ...] = ()

    @property
    def layout(self) -> GroupLayout:
        """Layout of the whole micro-batch, which all its batches share."""
        return self.forwards[0].layout

    def padded(self, number: int) -> tuple[Batch, ...]:
        """Return ``number`` batches: copies of the first batch as padding, then the micro-batch's own batches. Padding is needed because
        under ZeRO-3 all ranks must run the same number of forward passes. The copies' results are ignored.
        """
        return (self.forwards[0],) * (number - len(self.forwards)) + self.forwards

    def scores(self, token_logp: Sequence[Tensor]) -> Scores:
        """Join the engine's outputs for the ``padded`` batches into one score matrix."""
        own = token_logp[len(token_logp) - len(self.forwards) :]
        parts = [batch.scores(logp) for batch, logp in zip(self.forwards, own, strict=True)]
        return parts[0] if len(parts) == 1 else Scores.joined(parts)

    def to(self, device: torch.device) -> MicroBatch:
        """Return a copy of the micro-batch with its tensors on ``device``."""
        return replace(self, forwards=tuple(batch.to(device) for batch in self.forwards))

    def pin_memory(self) -> MicroBatch:
        """Return a copy in pinned memory. The DataLoader calls this."""
        return replace(self, forwards=tuple(batch.pin_memory() for batch in self.forwards))


_ALIGNMENT = 16  # bytes


class _Place(NamedTuple):
    """A tensor's dtype, shape and offset in the buffer that holds all tensors of a pickled batch."""

    start: int
    dtype: torch.dtype
    shape: torch.Size


def _rejoined(skeleton: dict[str, Any], joined: Tensor) -> Batch:
    def cut(place: _Place) -> Tensor:
        size = place.dtype.itemsize * place.shape.numel()
        return joined[place.start : place.start + size].view(place.dtype).view(place.shape)

    return Batch(**_mapped(skeleton, _Place, cut))


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Return ``value`` with ``change`` applied to every object of type ``kind``, including those inside dicts and the package's
    dataclasses.
    """
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {name: _mapped(item, kind, change) for name, item in value.items()}
    if isinstance(value, Batch | GroupLayout | InBatchNegatives):
        return replace(value, **{part.name: _mapped(getattr(value, part.name), kind, change) for part in fields(value)})
    return value


@contextlib.contextmanager
def explain_out_of_memory(where: str, parts: Sequence[Batch], remedy: str) -> Iterator[None]:
    """Convert an allocation failure within the block to an OutOfMemory error that states the ``remedy`` and the largest batch's size."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError, and the CPU allocator raises a RuntimeError
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        largest = max(parts, key=lambda part: part.num_tokens)
        sizes = f"{len(largest.layout.ids)} groups, {largest.num_tokens} tokens and {largest.num_images} images"
        message = (str(error) or "nothing").splitlines()[0]
        raise OutOfMemory(
            f"out of memory {where}; its largest forward pass has {sizes}; {remedy}; the allocator reports: {message}"
        ) from error
