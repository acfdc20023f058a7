"""Names of DeepSpeed's settings, and DeepSpeed's memory estimates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def field_names() -> list[str]:
    """Return the field names and aliases of all pydantic models in DeepSpeed's configuration."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    classes: list[Any] = [DeepSpeedConfigModel]
    for cls in classes:
        classes += cls.__subclasses__()
    return [name for cls in classes for key, field in cls.model_fields.items() for name in (key, field.alias) if name]


def model_states(
    stage: int, trained: int, largest_layer: int, gpus_per_node: int, nodes: int, offloaded: Mapping[str, bool]
) -> tuple[int, int]:
    """Estimate the memory for model states under ZeRO, and return bytes per GPU and bytes of host memory per node.

    ``trained`` and ``largest_layer`` are parameter counts. ``offloaded`` states whether the states of the ``optimizer`` and the weights
    (``param``) are in host memory; weights can be there only under ZeRO-3.
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    layout: dict[str, Any] = {"num_gpus_per_node": gpus_per_node, "num_nodes": nodes, "cpu_offload": offloaded["optimizer"]}
    if stage == 3:
        host, card, _ = estimate_zero3_model_states_mem_needs(trained, largest_layer, **layout, cpu_offload_params=offloaded["param"])
    else:
        host, card = estimate_zero2_model_states_mem_needs(trained, **layout)
    return card, host
