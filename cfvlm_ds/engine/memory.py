"""Memory of a model's states under ZeRO, by DeepSpeed's own estimates."""

from __future__ import annotations

from typing import Any

import torch

from cfvlm_ds.deepspeed_compat import settings as settings


def offloaded(ds_config: dict[str, Any]) -> dict[str, bool]:
    """Whether ``optimizer`` states and ``param``, the weights, are kept elsewhere than on the GPU."""
    zero = ds_config.get("zero_optimization", {})
    return {name: (zero.get(f"offload_{name}") or {}).get("device", "none") != "none" for name in ("optimizer", "param")}


def model_states(model: torch.nn.Module, ds_config: dict[str, Any], gpus: int, gpus_per_node: int) -> tuple[int, int]:
    """Bytes per GPU, and of host memory per node, of weights, gradients and optimizer states in mixed precision."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    away, nodes = offloaded(ds_config), max(1, gpus // gpus_per_node)
    place = min(gpus, gpus_per_node), nodes
    if ds_config.get("zero_optimization", {}).get("stage", 0) == 3:
        layer = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
        card, host = settings.states_of_stage_3(trained, layer, *place, away["optimizer"], away["param"])
        card += 0 if away["param"] else 2 * frozen // gpus
        host += 2 * frozen // nodes if away["param"] else 0
    else:
        card, host = settings.states_of_stage_2(trained, *place, away["optimizer"])
        card += 2 * frozen
    return card, host
