"""Qwen2-VL, 2.5-VL, 3-VL and 3.5: a native-resolution vision tower, a merger of 2 x 2 patches, and three-axis position ids (M-RoPE).

In Qwen3.5, three out of four layers are gated delta nets. Each text starts from the state of these layers at the end of its prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from cfvlm_ds.deepspeed_compat.parameters import whole_shape
from cfvlm_ds.models.family import Family
from cfvlm_ds.models.gated_delta_net import fork_states
from cfvlm_ds.models.visual_token_limits import pixels


def m_rope(config: PreTrainedConfig, visual: Tensor, grids: Tensor) -> Tensor:
    """Return position ids [3, P] (time, height, width). Each text token advances all three axes by one. A visual token's ids are its
    coordinates in the image's grid plus the image's start position.

    Text after an image continues at the largest id plus one (Qwen2-VL, arXiv 2409.12191, section 2.1). ``grids`` [images, 3] is (t, h, w)
    in patches, before merging.
    """
    positions = torch.arange(len(visual)).repeat(3, 1)
    merge, stop = config.vision_config.spatial_merge_size, 0
    for frames, height, width in (grids // torch.tensor([1, merge, merge])).tolist():
        start = stop + int(visual[stop:].nonzero()[0])
        stop = start + frames * height * width
        place = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
        positions[:, start:stop] = positions[0, start] + torch.stack(place).flatten(1)
        positions[:, stop:] += start + max(frames, height, width) - stop
    return positions


def tower_inputs(config: PreTrainedConfig, grids: Tensor) -> dict[str, Any]:
    """Compute the tower inputs that depend on the image grids, as transformers does."""
    vision = config.vision_config
    merge, boundaries = vision.spatial_merge_size, get_vision_cu_seqlens(grids)
    inputs = {"position_ids": get_vision_position_ids(grids, merge), "cu_seqlens": boundaries, "max_seqlen": int(boundaries.diff().max())}
    if hasattr(vision, "window_size"):
        inputs["window_index"], windows = get_vision_window_index(grids, merge, vision.window_size, vision.patch_size)
        inputs |= {"cu_window_seqlens": windows, "max_window_seqlen": int(windows.diff().max())}
    if hasattr(vision, "num_position_embeddings"):
        side = int(vision.num_position_embeddings**0.5)
        options = {"mode": "bilinear", "align_corners": True, "spatial_merge_size": merge}
        inputs["interp_indices"], inputs["interp_weights"] = get_vision_interpolation_indices_and_weights(grids, side, **options)
    return {f"image_{name}": value for name, value in inputs.items()}


def add_at_places(model: nn.Module) -> None:
    """Patch the language model's method that adds image features to visual tokens to accept token indices as well as a mask."""
    text: Any = model.get_submodule("model.language_model")
    original: Callable[..., Tensor] = type(text)._deepstack_process

    def add(hidden: Tensor, places: Tensor, features: Tensor) -> Tensor:
        if places.dtype == torch.bool:
            return original(text, hidden, places, features)
        return hidden.index_add(1, places, features.to(hidden.dtype).unsqueeze(0))

    text._deepstack_process = add


QWEN_VL = Family(
    model_types=("qwen2_vl", "qwen2_5_vl"),
    vision_tower=("model.visual",),
    projector=("model.visual.deepstack_merger_list", "model.visual.merger"),
    image_inputs=("pixel_values", "image_grid_thw"),
    grid="image_grid_thw",
    positions=m_rope,
    from_grids=tower_inputs,
    limit=pixels,
    limited_by=("min_pixels", "max_pixels"),
)

QWEN_3_VL = replace(QWEN_VL, model_types=("qwen3_vl", "qwen3_vl_moe"), take_trees=add_at_places)
QWEN_3_5 = replace(QWEN_VL, model_types=("qwen3_5", "qwen3_5_moe"), projector=("model.visual.merger",), take_trees=fork_states)


class TransposeByWholeShape(Transpose):
    """Conversion that transposes the expert weights of published Qwen3-VL-MoE checkpoints, unless they already have the model's shape.

    transformers decides this by the parameter's ``shape``. Under ZeRO-3, the parameter is an empty tensor, so this class compares with the
    unpartitioned shape.
    """

    def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any) -> Any:
        parameter = kwargs["model"].get_parameter(kwargs["full_layer_name"])
        (stored,) = input_dict.values()
        tensor = stored[0] if isinstance(stored, list) else stored
        if tensor.shape == whole_shape(parameter):
            return {self.get_target_pattern(input_dict, source_patterns, target_patterns): tensor}
        turned: Any = Transpose(self.dim0, self.dim1)
        return turned.convert(input_dict, source_patterns, target_patterns, **kwargs)


def _transpose_by_whole_shape(model_type: str) -> None:
    mapping = get_checkpoint_conversion_mapping(model_type)
    for converter in mapping:
        if isinstance(converter, WeightConverter):
            converter.operations = [
                TransposeByWholeShape(op.dim0, op.dim1, op.check_dims) if isinstance(op, Transpose) and op.check_dims else op
                for op in converter.operations
            ]
    register_checkpoint_conversion_mapping(model_type, mapping, overwrite=True)


_transpose_by_whole_shape("qwen3_vl_moe")
