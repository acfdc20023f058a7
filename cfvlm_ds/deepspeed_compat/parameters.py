"""A parameter's full size, which ZeRO-3 stores beside this rank's part of it."""

from __future__ import annotations

import torch
from torch import Tensor


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape before partitioning; the ``shape`` of a partitioned parameter is that of an empty tensor."""
    return getattr(parameter, "ds_shape", parameter.shape)


def own_part(parameter: Tensor) -> Tensor:
    """The data that this rank holds: its part under ZeRO-3, otherwise all of it."""
    return getattr(parameter, "ds_tensor", parameter)
