"""Models: loading, families, adapters, and scoring of packed rows."""

from __future__ import annotations

from cfvlm_ds.models.adapters import adapted_modules, adapters_off, attach_adapters, is_adapter, only_adapters_train, peft_config
from cfvlm_ds.models.families import FAMILIES, family_of
from cfvlm_ds.models.family import MODULES, Family, Module
from cfvlm_ds.models.flops import ModelFlops, peak
from cfvlm_ds.models.identity import adapter_fingerprint, fingerprint, inputs_fingerprint, model_folder
from cfvlm_ds.models.loading import attention, check_model, load_config, load_model, load_processor, meta_model, parameter_counts, trainable
from cfvlm_ds.models.routers import Routed, check_balanced
from cfvlm_ds.models.scorer import Scorer

__all__ = [
    "FAMILIES",
    "MODULES",
    "Family",
    "ModelFlops",
    "Module",
    "Routed",
    "Scorer",
    "adapted_modules",
    "adapter_fingerprint",
    "adapters_off",
    "attach_adapters",
    "attention",
    "check_balanced",
    "check_model",
    "family_of",
    "fingerprint",
    "inputs_fingerprint",
    "is_adapter",
    "load_config",
    "load_model",
    "load_processor",
    "meta_model",
    "model_folder",
    "only_adapters_train",
    "parameter_counts",
    "peak",
    "peft_config",
    "trainable",
]
