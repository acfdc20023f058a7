"""Full and partitioned sizes of a parameter under ZeRO-3."""

from __future__ import annotations

import torch
from torch import Tensor


def whole_shape(parameter: Tensor) -> torch.Size:
    """Return the shape before partitioning; the ``shape`` of a partitioned parameter is that of an empty tensor."""
    return getattr(parameter, "ds_shape", parameter.shape)


def own_part(parameter: Tensor) -> Tensor:
    """Return the data of this rank: its partition under ZeRO-3, otherwise all of it."""
    return getattr(parameter, "ds_tensor", parameter)
