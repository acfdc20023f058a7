"""Number of floating-point operations per micro-batch, used to compute throughput."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from cfvlm_ds.deepspeed_compat.parameters import whole_shape
from cfvlm_ds.models.family import MODULES, Family
from cfvlm_ds.models.forest import Forest, Sight

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "A10G": 70e12}
"""Dense bfloat16 operations per second according to the vendors' data sheets, keyed by a substring of the device's name."""


def peak(device: torch.device) -> float | None:
    """Return the device's peak operations per second according to its data sheet, or None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAK.items() if part in name), None)


class ModelFlops:
    """Counter of the multiplications and additions in a forward and backward pass.

    For each token, a weight counts as two operations in the forward pass, two more if the activations need a gradient, and two more if the
    weight itself is trained. The language model's attention is counted per query and attended key. In a mixture of experts, only the
    experts that a token is routed to are counted. Not counted: the tower's attention, the recurrence of gated delta nets, norms, softmax,
    and recomputation by gradient checkpointing.
    """

    def __init__(self, model: Any, family: Family) -> None:
        text = model.config.get_text_config()
        chosen = getattr(text, "num_experts_per_tok", None) or getattr(text, "top_k_experts", None) or 0
        share = chosen / (getattr(text, "num_experts", None) or 1) or 1.0
        head = model.get_output_embeddings().weight
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} | {id(head)}
        unused = tuple(f"{prefix}." for prefix in family.unused(model.config))
        self._weights, self._trained = defaultdict[str, float](float), defaultdict[str, float](float)
        self._patch_weights = 0.0  # weights of convolutions over pixels; the pixels need no gradient
        for name, parameter in model.named_parameters():
            if id(parameter) not in tables and len(whole_shape(parameter)) > 1 and not name.startswith(unused):
                size = math.prod(whole_shape(parameter)) * (share if ".experts." in name else 1)
                self._weights[family.module_of(name)] += size
                self._trained[family.module_of(name)] += size * parameter.requires_grad
                self._patch_weights += size * (len(whole_shape(parameter)) > 3)
        self._head = math.prod(whole_shape(head))
        self._head_trained = self._head * head.requires_grad
        self._pairs = _operations_per_pair(text)
        vision = model.config.vision_config
        self._pixels = getattr(vision, "in_channels", 3) * _square(vision.patch_size) * getattr(vision, "temporal_patch_size", 1)

    def of(self, inputs: Mapping[str, Any], num_scored: int) -> float:
        """Return the number of operations for a batch of model inputs. ``num_scored`` is the number of positions that predict scored
        tokens.
        """
        forest: Forest = inputs["forest"]
        of_pairs = sum(each * num_pairs(forest, forest.sight(window)) for window, each in self._pairs.items())
        tokens = {
            "vision_tower": pixels.numel() / self._pixels if (pixels := inputs["image_inputs"].get("pixel_values")) is not None else 0,
            "projector": sum(inputs["visual_tokens"]),
            "language_model": inputs["input_ids"].numel(),
        }
        total, has_gradient = 0.0, False
        for module in MODULES:
            has_gradient = has_gradient or self._trained[module] > 0
            total += 2 * tokens[module] * ((1 + has_gradient) * self._weights[module] + self._trained[module])
        total -= 2 * tokens["vision_tower"] * self._patch_weights * (self._trained["vision_tower"] > 0)
        return total + (1 + 2 * has_gradient) * of_pairs + 2 * num_scored * ((1 + has_gradient) * self._head + self._head_trained)


def num_pairs(forest: Forest, sight: Sight) -> float:
    """Count the (query, key) pairs in which the query attends to the key."""
    reach, total = sight.window or forest.longest_path, 0.0
    for seen, length in zip(forest.seen, forest.lengths, strict=True):
        unbounded = min(max(reach - seen, 0), length)  # tokens that see their whole path, because it fits into the window
        total += unbounded * seen + unbounded * (unbounded + 1) / 2 + (length - unbounded) * reach
    return total + sum((end - begin) * (end - begin - 1) / 2 for begin, end in forest.blocks if sight.blocks)


def _operations_per_pair(text: Any) -> dict[int | None, float]:
    """Return the forward operations per (query, key) pair, summed over layers and keyed by window size (None for full attention)."""
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"] * text.num_hidden_layers
    operations: dict[int | None, float] = {}
    for kind, layer in zip(kinds, text.per_layer_config, strict=True):
        if "attention" in kind and kind != "linear_attention":
            key, heads = window if kind == "sliding_attention" else None, layer.num_attention_heads
            operations[key] = operations.get(key, 0) + 4 * heads * (getattr(layer, "head_dim", None) or layer.hidden_size // heads)
    return operations


def _square(size: Any) -> int:
    return size[0] * size[1] if isinstance(size, list | tuple) else size * size
