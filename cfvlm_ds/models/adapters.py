"""Low-rank adapters (peft): selection of the layers to adapt, loading, disabling, and 4-bit base weights."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from cfvlm_ds.core.config import LoraConfig, ModelConfig
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.run_folder import ADAPTER_WEIGHTS
from cfvlm_ds.models.family import MODULES, Family, Module
from cfvlm_ds.models.model_files import explained, header

# On import, bitsandbytes logs an error about a missing kernel for 4-bit inference, which training does not use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def adapted_modules(config: ModelConfig) -> list[Module]:
    """Return the modules that are tuned with adapters."""
    return [module for module in MODULES if getattr(config, module).tuning == "lora"]


def only_adapters_train(config: ModelConfig) -> bool:
    """Return True if only adapters are trained. In this case, the model without its adapters is the initial model."""
    return bool(adapted_modules(config)) and all(getattr(config, module).tuning != "full" for module in MODULES)


def is_adapter(parameter: str) -> bool:
    """Return True if a parameter name belongs to an adapter."""
    return any(part.startswith("lora_") for part in parameter.split("."))


def target_pattern(model: Any, family: Family, modules: Sequence[Module]) -> str:
    """Return a regular expression for the full names of the layers to adapt: all linear layers in ``modules`` that the forward pass uses.

    The output head gets no adapter, and neither do fused experts, which are not linear layers. Raises ConfigError if a module has no layer
    to adapt.
    """
    unused = family.unused(model.config)
    layers = {
        name: family.module_of(name)
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != family.output_head and not any(name.startswith(f"{prefix}.") for prefix in unused)
    }
    if without := set(modules) - set(layers.values()):
        module = min(without)
        raise ConfigError(
            f"model.{module}.tuning is lora, but the {module} of model type {family.model_types[0]!r} has no linear layer for an adapter; "
            "use full or frozen"
        )
    names = {  # corresponding layers of all blocks share one alternative
        re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) for name, module in layers.items() if module in modules
    }
    barred = "".join(rf"(?!{re.escape(prefix)}\.)" for prefix in unused)
    return f"{barred}(?:{'|'.join(sorted(names))})"


def peft_config(model: Any, family: Family, modules: Sequence[Module], name_or_path: str, lora: LoraConfig) -> Any:
    """Return the peft configuration for adapters of ``modules``."""
    import peft

    return peft.LoraConfig(
        base_model_name_or_path=name_or_path,
        target_modules=target_pattern(model, family, modules),
        r=lora.rank,
        lora_alpha=lora.alpha,  # peft declares an integer, but only divides by the rank
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        use_rslora=lora.rslora,
    )


def add_adapters(model: Any, family: Family, config: ModelConfig) -> None:
    """Add the configured adapters to the model, in place. Initially they have no effect."""
    import peft

    peft.inject_adapter_in_model(peft_config(model, family, adapted_modules(config), config.name_or_path, config.lora), model)


def check_4bit(config: ModelConfig, zero3: bool) -> None:
    """Raise ConfigError if 4-bit weights are requested but would be trained, or cannot be loaded (under ZeRO-3 or without bitsandbytes)."""
    if not config.lora.load_in_4bit:
        return
    if config.language_model.tuning != "lora" or not only_adapters_train(config):
        raise ConfigError(
            "model.lora.load_in_4bit: 4-bit weights cannot be trained, and such a model is exported as adapters; set "
            "model.language_model.tuning to lora and the other modules to lora or frozen"
        )
    if zero3:
        raise ConfigError("model.lora.load_in_4bit: transformers cannot load 4-bit weights under ZeRO-3; use ds_configs/z2.json")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("model.lora.load_in_4bit needs bitsandbytes; install it with `pip install bitsandbytes`")


def attach_adapters(model: Any, folder: Path) -> Any:
    """Add the adapters in ``folder`` (peft's format) to the model and return the model. Raises ConfigError if they do not fit the model."""
    import peft
    from safetensors.torch import load_file

    with explained(
        f"the adapters of {folder} cannot be loaded", "use the folder to which they were written, with its base in the same place"
    ):
        stored = [name.removeprefix("base_model.model.") for name in header(folder / ADAPTER_WEIGHTS)]
        adapter_config = peft.PeftConfig.from_pretrained(str(folder))
        _refuse_options(adapter_config, folder)
        adapter_config.target_modules = {name.rpartition(".lora_A.")[0] for name in stored if ".lora_A." in name}
        adapter_config.exclude_modules = adapter_config.layers_to_transform = adapter_config.layers_pattern = None
        adapter_config.inference_mode, adapter_config.init_lora_weights = True, True
        adapted = peft.get_peft_model(model, adapter_config)
        weights = load_file(folder / ADAPTER_WEIGHTS)
        loaded = peft.set_peft_model_state_dict(adapted, weights)
        misfits = [*loaded.unexpected_keys, *(name for name in loaded.missing_keys if is_adapter(name))]
        if misfits or not weights:
            raise ConfigError(
                f"the adapters of {folder} do not fit their base: {len(misfits)} weights have no counterpart, such as "
                f"{next(iter(misfits), 'all of them')}; use the folder to which they were written"
            )
    return adapted.get_base_model()


_USED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "fan_in_fan_out", "bias", "modules_to_save"}
_WITHOUT_EFFECT = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "init_lora_weights", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
"""Options of an adapter configuration that affect only training, or whose values are instead derived from the weights."""


def _refuse_options(described: Any, folder: Path) -> None:
    """Raise ConfigError for unknown options in an adapter configuration, because some options make peft import modules by name."""
    default = type(described)()
    known = _USED | _WITHOUT_EFFECT
    if foreign := [f.name for f in fields(default) if f.name not in known and getattr(described, f.name) != getattr(default, f.name)]:
        raise ConfigError(
            f"the adapters of {folder} have the unsupported option {foreign[0]} in adapter_config.json; merge them into their base with "
            "peft, and use the merged folder"
        )


def quantisation(family: Family, config: ModelConfig, dtype: torch.dtype) -> Any:
    """Return the transformers configuration that loads the language model's linear layers in 4 bits, or None if 4 bits are not requested.

    The tower, the projector and the output head keep their precision. Raises the errors of ``check_4bit``.
    """
    if not config.lora.load_in_4bit:
        return None
    from transformers import BitsAndBytesConfig
    from transformers.integrations import is_deepspeed_zero3_enabled

    check_4bit(config, is_deepspeed_zero3_enabled())
    kept = [*family.vision_tower, *family.projector, family.output_head]
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=kept)


BYTES_OF_4BIT = 0.5 + 4 / 64
"""Bytes per 4-bit weight, including its share of the float32 scale of each block of 64 weights."""


def linear_weights(model: Any, family: Family) -> int:
    """Count the weights that ``quantisation`` loads in 4 bits: the language model's linear layers, except adapters and the output head."""
    linear = ((name, module.weight) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    weights = ((f"{name}.weight", weight) for name, weight in linear if name != family.output_head)
    return sum(weight.numel() for name, weight in weights if family.module_of(name) == "language_model" and not is_adapter(name))


@contextlib.contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Disable the model's adapters within the block.

    LoRA adapters still run, scaled by 0, because ZeRO-3 prefetches weights in the order in which modules ran before. DoRA adapters do not
    run, because even at scale 0 they would rescale the adapted weights.
    """
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    rescaling = [layer for layer in layers if layer.lora_variant]
    requires_grad = {parameter: parameter.requires_grad for layer in rescaling for parameter in layer.parameters()}
    scalings = [layer.scaling for layer in layers]
    try:
        for layer in layers:
            layer.scaling = dict.fromkeys(layer.scaling, 0.0)
        for layer in rescaling:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, scaling in zip(layers, scalings, strict=True):
            layer.scaling = scaling
        for layer in rescaling:
            layer.enable_adapters(True)
        for parameter, was_required in requires_grad.items():  # peft toggles gradients together with adapters
            parameter.requires_grad_(was_required)
