"""The full shape and the local partition of a parameter under ZeRO-3."""

from __future__ import annotations

import torch
from torch import Tensor


def whole_shape(parameter: Tensor) -> torch.Size:
    """Return a parameter's shape before partitioning. Under ZeRO-3, its ``shape`` attribute is that of an empty tensor."""
    return getattr(parameter, "ds_shape", parameter.shape)


def own_part(parameter: Tensor) -> Tensor:
    """Return this rank's data: its partition under ZeRO-3, otherwise the whole parameter."""
    return getattr(parameter, "ds_tensor", parameter)
