"""Loading of models, configurations and processors."""

from __future__ import annotations

import functools
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from torch import nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig, PreTrainedModel

from cfvlm_ds.core.config import IMAGE_LIMITS, ModelConfig
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.reading import similar_names
from cfvlm_ds.core.run_folder import named_model, refuse_absent
from cfvlm_ds.deepspeed_compat.parameters import whole_shape
from cfvlm_ds.models.adapters import (
    adapted_modules,
    add_adapters,
    check_4bit,
    is_adapter,
    quantisation,
)
from cfvlm_ds.models.families import family_of
from cfvlm_ds.models.family import MODULES, Family, Module
from cfvlm_ds.models.forest_attention import BACKENDS, by_segments, registered
from cfvlm_ds.models.model_files import check_files, explained
from cfvlm_ds.models.scorer import Scorer
from cfvlm_ds.models.variable_length import fastest, flash_attention, has_varlen, takes


def load_config(name_or_path: str) -> PreTrainedConfig:
    """Load a model's configuration. Raises ConfigError if the folder or hub name does not exist or is not a model."""
    if not name_or_path:
        raise ConfigError("model.name_or_path is not set; give a model folder or a hub name such as org/name")
    refuse_absent(name_or_path)
    if (resolved := named_model(name_or_path)).adapter is not None:
        remedy = f"use their base {resolved.name_or_path}, or merge them with `cfvlm-ds export RUN` and use RUN/export"
        raise ConfigError(f"model.name_or_path {name_or_path!r} holds adapters, not a model; {remedy}")
    if resolved.name_or_path != name_or_path:
        raise ConfigError(f"model.name_or_path {name_or_path!r} is a run folder; use its export, {resolved.name_or_path}")
    what, remedy = f"model.name_or_path {name_or_path!r} cannot be read", "give a model folder with a valid config.json, or a hub name"
    if not os.path.isdir(name_or_path):
        what = f"model.name_or_path {name_or_path!r} is not a local folder and could not be read from the hub"
        download = f"correct it, or download it first on a machine with a network: hf download {name_or_path}"
        remedy = f"{similar_names(name_or_path)} {download}".lstrip()
        _go_offline_without_hub(name_or_path)
    with explained(what, remedy):
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)


@functools.cache
def _go_offline_without_hub(name: str) -> None:
    """Set HF_HUB_OFFLINE for this process if the hub cannot be reached.

    The hub client would otherwise spend half a minute on retries for each uncached file, and a processor has eight optional files.
    """
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except HfHubHTTPError:  # the hub has answered, for example with 404
        return
    except Exception:  # any network layer can fail
        constants.HF_HUB_OFFLINE = True


def _check_folder(name_or_path: str) -> None:
    """Check a model folder, or the files of a hub name that are already cached. ``load_model`` checks uncached files after loading."""
    if os.path.isdir(name_or_path):
        check_files(Path(name_or_path).resolve())
    elif isinstance(config := try_to_load_from_cache(name_or_path, "config.json"), str):
        check_files(Path(config).parent)


def _in_each_part(attn_implementation: str) -> dict[str, str]:
    """Return the ``attn_implementation`` argument that selects a back end for the language model and the vision tower only. Other
    submodels, such as an audio encoder, keep transformers' default.
    """
    return dict.fromkeys(("", "text_config", "vision_config"), attn_implementation)


def check_model(config: ModelConfig, zero3: bool, there: bool = True, weights: bool = True) -> None:
    """Raise ConfigError if the installed libraries or the model's configuration do not support ``config``.

    If ``there`` is False, the model does not exist yet, and only the options and the libraries are checked. If ``weights`` is True, the
    weight files are also checked, but not read in full (see ``check_files``).
    """
    attention(config.attn_implementation, load_config(config.name_or_path) if there else None)
    if all(getattr(config, module).tuning == "frozen" for module in MODULES):
        raise ConfigError(
            "every module is frozen; set model.vision_tower.tuning, model.projector.tuning or model.language_model.tuning to full or lora"
        )
    check_4bit(config, zero3)
    if there:
        _limit_images(config, None, load_config(config.name_or_path))
        if weights:
            _check_folder(config.name_or_path)


def load_processor(config: ModelConfig) -> Any:
    """Load the model's own processor (tokenizer, image processor and chat template), with the configured limits on visual tokens.

    Raises ConfigError if any of the three is missing or cannot be loaded.
    """
    model_config = load_config(config.name_or_path)
    family_of(model_config)
    _check_folder(config.name_or_path)
    what = f"the processor of {config.name_or_path!r}"
    with explained(f"{what} cannot be loaded", "the model needs the tokenizer and processor files that were published with it"):
        processor = AutoProcessor.from_pretrained(config.name_or_path, trust_remote_code=False)
        parts = {"tokenizer": "tokenizer", "image_processor": "image processor", "chat_template": "chat template"}
        if missing := [name for part, name in parts.items() if getattr(processor, part, None) is None]:
            raise ConfigError(f"{what} has no {' and no '.join(missing)}; use the instruction-tuned model, or add its files")
        _limit_images(config, processor, model_config)
    return processor


def _limit_images(config: ModelConfig, processor: Any, model_config: Any) -> None:
    """Apply the limits on visual tokens. Raises ConfigError for a limit that the model's family does not support."""
    family = family_of(model_config)
    for option in IMAGE_LIMITS:
        if getattr(config, option) is not None and option not in family.limited_by:
            known = " and ".join(f"model.{name}" for name in family.limited_by)
            remedy = f"use {known}" if known else "its images have a fixed number of visual tokens; leave it out"
            raise ConfigError(f"model.{option} does not apply to model type {model_config.model_type!r}: {remedy}")
    if family.limit is not None:
        family.limit(processor, model_config, config)


def load_model(config: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Load the pretrained model in ``dtype``, with adapters and ``requires_grad`` as configured. Under ZeRO-3, it is partitioned while it
    is loaded.

    Raises ConfigError if weights are missing, unexpected or of the wrong shape (the message names them), if pickled weights contain
    anything but tensors, or if the folder does not contain a valid model.
    """
    model_config = load_config(config.name_or_path)
    family = family_of(model_config)
    _check_folder(config.name_or_path)
    quantised = quantisation(family, config, dtype)
    trees = registered(attention(config.attn_implementation, model_config, dtype))
    backends = _in_each_part("sdpa") | {"text_config": trees}
    with explained(f"the model {config.name_or_path!r} cannot be loaded", "compare its config.json and weights with the published ones"):
        # DeepSpeed drops decorators of `__init__` from classes that are first imported inside zero.Init: import them before.
        for part in (model_config, *(getattr(model_config, name) for name in model_config.sub_configs)):
            MODEL_MAPPING.get(type(part), None)
        try:
            result: Any = AutoModelForImageTextToText.from_pretrained(
                config.name_or_path,
                dtype=dtype,
                attn_implementation=backends,
                output_loading_info=True,
                quantization_config=quantised,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # mismatches are refused below, by name
                use_kernels=False,  # transformers' default restores patched forwards, and downloads kernels on a GPU
            )
            model, info = result
        except pickle.UnpicklingError:
            raise ConfigError(
                f"the pickled weights of {config.name_or_path!r} contain objects other than tensors; convert them to safetensors"
            ) from None
        except RuntimeError as error:  # under ZeRO-3, a mismatch raises despite the option
            if not (mismatched := re.findall(r"size mismatch for (.+)", str(error))):
                raise
            info = {"mismatched_keys": mismatched}
        for kind, keys in info.items():
            if keys and kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
                names = ", ".join(sorted(str(key) for key in keys)[:5])
                raise ConfigError(f"checkpoint {config.name_or_path!r} has {len(keys)} {kind.replace('_', ' ')}: {names}; repair it")
        _check_folder(config.name_or_path)  # a hub model's files are cached by now
        _limit_images(config, None, model.config)
        # Under ZeRO-3, this version of transformers keeps unused conversions and would rename every weight when saving.
        model._weight_conversions = [c for c in model._weight_conversions or [] if c.was_used()] or None
        by_segments(model.config.vision_config)
        for name, module in model.named_modules():
            if name.endswith("patch_embed.proj") and type(module) is nn.Conv3d:
                module.__class__ = _PatchProduct
        tune(model, family, config)
        return model


class _PatchProduct(nn.Conv3d):
    """Convolution over patches [N, C, T, H, W] of exactly the kernel's size, computed as a matrix product.

    On a CPU, torch's own convolution takes 4 times as long, or 15 times with gradients. In torch 2.9, it is also slow on GPUs.
    """

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(patches.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None, None]


def meta_model(config: ModelConfig, dtype: torch.dtype, attn_implementation: str) -> PreTrainedModel:
    """Build the model on the meta device, with adapters and ``requires_grad`` as configured. Its parameters have names and shapes but take
    no memory.
    """
    model_config = load_config(config.name_or_path)
    family = family_of(model_config)
    impossible = (
        f"no model can be built from the configuration of {config.name_or_path!r}",
        "compare its config.json with the published one",
    )
    with explained(*impossible), torch.device("meta"):
        _limit_images(config, None, model_config)
        model = AutoModelForImageTextToText.from_config(
            model_config, dtype=dtype, attn_implementation=_in_each_part(attn_implementation), trust_remote_code=False
        )
        tune(model, family, config)
    return model


def tune(model: PreTrainedModel, family: Family, config: ModelConfig) -> None:
    """Add adapters, and set ``requires_grad`` for exactly the parameters that are to be trained.

    Weights that the forward pass does not use stay frozen, because they would get no gradient.
    """
    if adapted_modules(config):
        add_adapters(model, family, config)
    unused = family.unused(model.config)
    for name, parameter in model.named_parameters():
        tuning = getattr(config, family.module_of(name)).tuning
        used = not any(f"{name}.".startswith(f"{prefix}.") for prefix in unused)
        parameter.requires_grad_(used and (is_adapter(name) if tuning == "lora" else tuning == "full"))


def trainable(scorer: Scorer) -> Iterator[tuple[Module, str, nn.Parameter]]:
    """Yield (module, name, parameter) for every trainable parameter."""
    for name, parameter in scorer.model.named_parameters():
        if parameter.requires_grad:
            yield scorer.family.module_of(name), name, parameter


def attention(requested: str, model_config: PreTrainedConfig | None = None, dtype: torch.dtype = torch.bfloat16) -> str:
    """Return the requested attention back end (see forest_attention.py). ``auto`` selects the fastest one that the model and this machine
    support.

    Raises ConfigError if this machine or the model does not support the requested back end.
    """
    layers: Any = () if model_config is None else model_config.get_text_config().per_layer_config
    heads = {getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads for layer in layers}
    if requested == "auto":
        return fastest(dtype, heads, torch.cuda.is_available())
    if requested not in BACKENDS:
        raise ConfigError(f"model.attn_implementation {requested!r} is not known; use auto, {', '.join(BACKENDS)}")
    if requested == "flash_attention_2" and flash_attention() is None:
        raise ConfigError(
            "model.attn_implementation flash_attention_2 needs a CUDA device and the flash-attn package; "
            "install it with `pip install flash-attn --no-build-isolation` or use auto"
        )
    if requested in ("flash_attention_2", "varlen") and not takes(dtype, heads):
        raise ConfigError(
            f"model.attn_implementation {requested} supports half precision and head sizes up to 256 that are multiples of 8, but the "
            f"model has {str(dtype).removeprefix('torch.')} and head size {', '.join(map(str, heads))}; use auto"
        )
    if requested in ("varlen", "flex") and not torch.cuda.is_available():
        raise ConfigError(f"model.attn_implementation {requested} needs a CUDA device; use auto")
    if requested == "varlen" and not has_varlen():
        raise ConfigError(f"model.attn_implementation varlen needs a torch newer than {torch.__version__}; use auto")
    return requested


def parameter_counts(model: PreTrainedModel, family: Family) -> Mapping[str, tuple[int, int]]:
    """Return module -> (number of parameters, number of trainable parameters). Under ZeRO-3, whole parameters are counted, not shards."""
    counts = {module: [0, 0] for module in MODULES}
    for name, parameter in model.named_parameters():
        size = whole_shape(parameter).numel()
        counts[family.module_of(name)][0] += size
        counts[family.module_of(name)][1] += size * parameter.requires_grad
    return {module: (total, trains) for module, (total, trains) in counts.items()}
