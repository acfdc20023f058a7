"""Limits on the number of visual tokens per image, with a function for each rule by which model families compute this number.

Each function changes the processor and, if the model also computes image sizes, the model's configuration. The processor can be None.
"""

from __future__ import annotations

import math
from typing import Any

from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.errors import ConfigError


def pixels(processor: Any, config: Any, model: ModelConfig, counts_frames: bool = False) -> None:
    """Have images scaled to between ``min_pixels`` and ``max_pixels`` pixels (Qwen-VL, where a token covers a square whose side is patch
    size x merge size). ``counts_frames`` is True for a processor that repeats a picture as several frames and counts all their pixels
    (GLM-4V).
    """
    if processor is not None:
        images = processor.image_processor
        frames = images.temporal_patch_size if counts_frames else 1
        low, high = model.min_pixels or images.size["shortest_edge"] // frames, model.max_pixels or images.size["longest_edge"] // frames
        if low > high:
            raise ConfigError(f"model.min_pixels ({low}) exceeds model.max_pixels ({high}); lower it")
        images.size = {"shortest_edge": frames * low, "longest_edge": frames * high}


def longest_edge(processor: Any, config: Any, model: ModelConfig) -> None:
    """Limit the longest edge so that a square image consists of whole tokens and has at most ``max_pixels`` pixels (Mistral 3, whose images
    keep their aspect ratio).

    The square must have at least 2 x 2 tokens, because transformers' forward pass fails if its only image has a single visual token.
    """
    if processor is not None and model.max_pixels:
        images, side = processor.image_processor, processor.patch_size * processor.spatial_merge_size
        if model.max_pixels < 4 * side**2:
            raise ConfigError(f"model.max_pixels is {model.max_pixels}, less than 2 x 2 visual tokens ({4 * side**2} pixels); raise it")
        images.size = {"longest_edge": min(images.size["longest_edge"], math.isqrt(model.max_pixels) // side * side)}


_BUDGETS = (70, 140, 280, 560, 1120)


def budgets(processor: Any, config: Any, model: ModelConfig) -> None:
    """Limit visual tokens to the largest of the model's fixed budgets that corresponds to at most ``max_pixels`` (Gemma 4)."""
    if processor is not None and model.max_pixels:
        images = processor.image_processor
        pixels_per_token = (images.patch_size * images.pooling_kernel_size) ** 2
        fitting = [tokens for tokens in _BUDGETS if tokens * pixels_per_token <= model.max_pixels]
        if not fitting:
            raise ConfigError(f"model.max_pixels is {model.max_pixels}; the minimum is {_BUDGETS[0] * pixels_per_token}")
        images.max_soft_tokens = fitting[-1]


def grids(processor: Any, config: Any, model: ModelConfig) -> None:
    """Remove tile grids with more than ``max_tiles`` tiles from the model's list (LLaVA-NeXT and OneVision, which choose the best-fitting
    grid for each image).
    """
    side = config.vision_config.image_size
    for holder in (processor and processor.image_processor, config):
        if holder is not None and model.max_tiles:
            kept = [grid for grid in holder.image_grid_pinpoints if grid[0] * grid[1] <= model.max_tiles * side**2]
            if not kept:
                least = min(grid[0] * grid[1] for grid in holder.image_grid_pinpoints) // side**2
                raise ConfigError(f"model.max_tiles is {model.max_tiles}, but the smallest grid of the model has {least} tiles; raise it")
            holder.image_grid_pinpoints = kept


def patches(processor: Any, config: Any, model: ModelConfig) -> None:
    """Limit the number of tiles, excluding the overview, to ``max_tiles`` (InternVL)."""
    if processor is not None and model.max_tiles:
        images = processor.image_processor
        images.max_patches = model.max_tiles
        images.min_patches = min(images.min_patches, model.max_tiles)


def squares(processor: Any, config: Any, model: ModelConfig) -> None:
    """Limit the longest edge so that a square image has at most ``max_tiles`` tiles (Idefics3, SmolVLM)."""
    if processor is not None and model.max_tiles:
        images = processor.image_processor
        sides = int(model.max_tiles**0.5)
        longest = min(images.size["longest_edge"], sides * images.max_image_size["longest_edge"])
        images.size = {"longest_edge": longest}
