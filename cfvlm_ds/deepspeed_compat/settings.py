"""DeepSpeed's optimizers, schedules, types and extensions, and its estimates of memory."""

from __future__ import annotations

from typing import Any

import torch


def field_names(model: str, inside: list[str]) -> list[str]:
    """Field names of one of DeepSpeed's pydantic models of its JSON, or of the model of one of its fields."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    classes: list[Any] = [DeepSpeedConfigModel]
    for cls in classes:
        classes += cls.__subclasses__()
    found: Any = next((cls for cls in classes if cls.__name__ == model), None)
    for part in inside:
        named = {field.alias or name: field for name, field in found.model_fields.items()} if found else {}
        kinds = [named[part].annotation, *getattr(named[part].annotation, "__args__", ())] if part in named else []
        found = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
    return [name for key, field in found.model_fields.items() for name in (key, field.alias) if name] if found else []


def optimizer_names() -> list[str]:
    """Optimizers of DeepSpeed's own."""
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    return list(DEEPSPEED_OPTIMIZERS)


def is_tested_under_zero(optimizer: type) -> bool:
    """Whether ZeRO accepts this class of optimizers without zero_allow_untested_optimizer."""
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    return optimizer in ZERO_SUPPORTED_OPTIMIZERS


def optimizer_class(name: str, offloaded: bool, torch_adam: bool) -> Any:
    """The class that DeepSpeed makes for an optimizer of this name, if it makes a single one."""
    from deepspeed.ops import adam, lamb, lion

    if name in ("adam", "adamw"):
        if torch_adam:
            return torch.optim.AdamW if name == "adamw" else torch.optim.Adam
        return adam.DeepSpeedCPUAdam if offloaded else adam.FusedAdam
    if name == "lamb":
        return lamb.FusedLamb
    if name == "lion":
        return lion.DeepSpeedCPULion if offloaded else lion.FusedLion
    found = getattr(torch.optim, name, None)
    return found if isinstance(found, type) and issubclass(found, torch.optim.Optimizer) else None


def schedule_names() -> list[str]:
    """Schedules of DeepSpeed's own."""
    from deepspeed.runtime import lr_schedules

    return list(lr_schedules.VALID_LR_SCHEDULES)


def schedule_class(name: str) -> Any:
    """The schedule that DeepSpeed makes for this name: its own, or torch's; None where there is none."""
    from deepspeed.runtime import lr_schedules

    own = getattr(lr_schedules, name, None) if name in lr_schedules.VALID_LR_SCHEDULES else None
    return own or getattr(torch.optim.lr_scheduler, name, None)


def states_of_stage_3(trained: int, largest_layer: int, gpus_per_node: int, nodes: int, optimizer: bool, weights: bool) -> tuple[int, int]:
    """Bytes per GPU, and of host memory per node, for this many trained parameters; ``optimizer`` and ``weights`` may be offloaded."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    place = {"num_gpus_per_node": gpus_per_node, "num_nodes": nodes}
    host, card, _ = estimate_zero3_model_states_mem_needs(
        trained, largest_layer, **place, cpu_offload=optimizer, cpu_offload_params=weights
    )
    return card, host


def states_of_stage_2(trained: int, gpus_per_node: int, nodes: int, optimizer: bool) -> tuple[int, int]:
    """As ``states_of_stage_3``."""
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    host, card = estimate_zero2_model_states_mem_needs(trained, num_gpus_per_node=gpus_per_node, num_nodes=nodes, cpu_offload=optimizer)
    return card, host
