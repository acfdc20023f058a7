"""A row without some of its cells, made of the row itself: no picture is opened again, no text encoded again.

Shapes: G groups, I images, C candidates, T tokens, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cfvlm_ds.batching.batch import Batch, MicroBatch
from cfvlm_ds.models.forest import Forest


def pruned(micro_batch: MicroBatch, keep: Tensor) -> MicroBatch:
    """A micro-batch with those cells alone that ``keep`` [G, I, C] has; a forward without any is left out.

    Every group must keep one. A picture that no cell needs any more leaves the model's inputs where these have one row for each picture;
    else the tower still runs on it.
    """
    layout = replace(micro_batch.layout, valid=micro_batch.layout.valid & keep)
    wanted = layout.valid.flatten()
    kept = (_pruned(batch, wanted, layout) for batch in micro_batch.forwards if bool(wanted[batch.cell].any()))
    return replace(micro_batch, forwards=tuple(kept))


def _pruned(batch: Batch, wanted: Tensor, layout: Any) -> Batch:
    inputs, device = batch.model_inputs, batch.cell.device
    scored = wanted[batch.cell]
    if bool(scored.all()):
        return replace(batch, layout=layout)
    forest: Forest = inputs["forest"]
    nodes = _nodes(forest, scored.tolist())
    tokens = torch.repeat_interleave(torch.tensor(nodes), torch.tensor(forest.lengths)).to(device)
    moved = tokens.cumsum(0) - 1
    before = inputs["scored"][0].nonzero().flatten()[inputs["predicted_by"][scored]]
    places, predicted_by = moved[before].unique(return_inverse=True)
    length = int(tokens.sum())
    number = {node: place for place, node in enumerate(node for node, stays in enumerate(nodes) if stays)}
    places_of = moved.tolist()
    blocks = [(places_of[begin], places_of[end - 1] + 1) for begin, end in forest.blocks if bool(tokens[begin])]  # each of one node
    shown = [images for root, images in zip(forest.roots, inputs["images_of_tree"], strict=False) if nodes[root]]
    return replace(
        batch,
        model_inputs={
            **inputs,
            "input_ids": inputs["input_ids"][:, tokens],
            "position_ids": inputs["position_ids"][..., tokens],
            "forest": replace(
                forest,
                lengths=tuple(forest.lengths[node] for node in number),
                parents=tuple(number.get(forest.parents[node], -1) for node in number),
                blocks=tuple(blocks),
            ),
            "scored": torch.zeros(1, length, dtype=torch.bool, device=device).index_fill(1, places, True),
            "predicted_by": predicted_by,
            "targets": inputs["targets"][scored],
            **_pictures(shown, inputs["visual_tokens"], inputs["image_inputs"]),
        },
        cell=batch.cell[scored],
        is_end=batch.is_end[scored],
        layout=layout,
        num_tokens=length,
        num_scored=len(places),
        num_images=len({image for images in shown for image in images}),
    )


def _nodes(forest: Forest, scored: Sequence[bool]) -> list[bool]:
    """Which nodes stay: texts that are still scored, and what they come after. Texts are the leaves, in the order of their tokens."""
    inner, stays, at = {*forest.parents}, [False] * len(forest.parents), 0
    for node, length in enumerate(forest.lengths):
        if node in inner:
            continue
        if scored[at]:
            for each in (node, *forest.ancestors[node]):
                stays[each] = True
        at += length
    return stays


def _pictures(shown: Sequence[Sequence[int]], visual_tokens: Sequence[int], image_inputs: dict[str, Any]) -> dict[str, Any]:
    """The model's inputs for the pictures that trees still show; at least one, because the tower runs on every rank."""
    number = len(visual_tokens)
    rows = all(isinstance(each, Tensor) and len(each) == number for each in image_inputs.values())
    left = sorted({image for images in shown for image in images}) or [0]
    if not rows or len(left) == number:
        return {"images_of_tree": list(shown), "visual_tokens": visual_tokens, "image_inputs": image_inputs}
    place = {image: k for k, image in enumerate(left)}
    return {
        "images_of_tree": [tuple(place[image] for image in images) for images in shown],
        "visual_tokens": [visual_tokens[image] for image in left],
        "image_inputs": {name: each[left] for name, each in image_inputs.items()},
    }
