"""Names of DeepSpeed's settings, and DeepSpeed's memory estimates."""

from __future__ import annotations

from typing import Any


def field_names() -> list[str]:
    """Return the field names and aliases of all pydantic models in DeepSpeed's configuration."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    classes: list[Any] = [DeepSpeedConfigModel]
    for cls in classes:
        classes += cls.__subclasses__()
    return [name for cls in classes for key, field in cls.model_fields.items() for name in (key, field.alias) if name]


def states_of_stage_3(trained: int, largest_layer: int, gpus_per_node: int, nodes: int, optimizer: bool, weights: bool) -> tuple[int, int]:
    """Estimate the memory for model states under ZeRO-3. Returns bytes per GPU, and bytes of host memory per node.

    ``trained`` and ``largest_layer`` are parameter counts. ``optimizer`` is True if the optimizer is offloaded to host memory, and
    ``weights`` is True if the weights are.
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    layout = {"num_gpus_per_node": gpus_per_node, "num_nodes": nodes}
    host, card, _ = estimate_zero3_model_states_mem_needs(
        trained, largest_layer, **layout, cpu_offload=optimizer, cpu_offload_params=weights
    )
    return card, host


def states_of_stage_2(trained: int, gpus_per_node: int, nodes: int, optimizer: bool) -> tuple[int, int]:
    """Estimate the memory for model states under ZeRO-1 or 2. Arguments and results are those of ``states_of_stage_3``, without
    ``largest_layer`` and ``weights``.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    host, card = estimate_zero2_model_states_mem_needs(trained, num_gpus_per_node=gpus_per_node, num_nodes=nodes, cpu_offload=optimizer)
    return card, host
