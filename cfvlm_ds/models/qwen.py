"""Qwen2-VL, 2.5-VL and 3-VL: a tower at native resolution, a merger of 2 x 2 patches, and positions on three axes (M-RoPE)."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from cfvlm_ds.models.family import Family


def m_rope(config: PreTrainedConfig, visual: Tensor, grid: Tensor | None) -> Tensor:
    """Position ids [3, P] (time, height, width): text advances all axes together, a visual token stands at its place in the grid.

    After an image the text goes on at the largest position plus one (Qwen2-VL, arXiv 2409.12191, section 2.1). ``grid`` is (t, h, w) in
    patches, before merging.
    """
    positions = torch.arange(len(visual)).repeat(3, 1)
    if grid is None:
        return positions
    start, merge = int(visual.nonzero()[0]), config.vision_config.spatial_merge_size
    frames, height, width = int(grid[0]), int(grid[1]) // merge, int(grid[2]) // merge
    place = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    stop = start + frames * height * width
    positions[:, start:stop] = start + torch.stack(place).flatten(1)
    positions[:, stop:] += start + max(frames, height, width) - stop
    return positions


QWEN_VL = Family(
    model_types=("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"),
    vision_tower=("model.visual",),
    projector=("model.visual.merger", "model.visual.deepstack_merger_list"),
    language_model=("model.language_model", "lm_head"),
    image_inputs=("pixel_values", "image_grid_thw"),
    grid="image_grid_thw",
    positions=m_rope,
)
