"""A parameter's whole size, which ZeRO-3 keeps beside what this rank holds of it."""

from __future__ import annotations

import torch
from torch import Tensor


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape before partitioning; of a partitioned parameter, ``shape`` is that of an empty tensor."""
    return getattr(parameter, "ds_shape", parameter.shape)


def own_part(parameter: Tensor) -> Tensor:
    """What this rank holds: its part under ZeRO-3, elsewhere the whole."""
    return getattr(parameter, "ds_tensor", parameter)
