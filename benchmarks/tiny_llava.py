"""Random LLaVA of any size in the family's real on-disk format, with a newly trained SentencePiece tokenizer. Most tests use it, and the
base models of the benchmarks are trained from it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cfvlm_ds.demo.family_checkpoints import write_checkpoint

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image>\n{% else %}{{ item['text'] }}{% endif %}{% endfor %} "
    "{% else %}ASSISTANT: {% for item in message['content'] %}{{ item['text'] }}{% endfor %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class TinyLlavaConfig:
    """A small, randomly initialised LLaVA (1.04 M parameters by default). ``image_size`` and ``patch_size`` are sides in pixels, and
    ``hidden_size`` and ``num_layers`` are those of the language model.
    """

    out_dir: str
    image_size: int = 48
    patch_size: int = 12
    hidden_size: int = 128
    vision_hidden_size: int = 64
    num_layers: int = 3
    vision_num_layers: int = 2
    seed: int = 0


def build_tiny_llava(config: TinyLlavaConfig, texts: Sequence[str]) -> Path:
    """Write a small, randomly initialised LLaVA and its processor unless the folder already has a model, and return the folder.

    The tokenizer is trained on ``texts``.
    """
    from transformers import LlavaForConditionalGeneration

    out_dir = Path(config.out_dir)
    if (out_dir / "config.json").exists():
        return out_dir

    def make(folder: Path) -> tuple[Any, Any]:
        processor = llava_processor(folder, config, texts)
        torch.manual_seed(config.seed)
        model = LlavaForConditionalGeneration(llava_config(config, processor))
        _place_positions(model.model.vision_tower, config.image_size // config.patch_size)
        return model, processor

    return write_checkpoint(out_dir, make)


def llava_processor(folder: Path, config: TinyLlavaConfig, texts: Sequence[str]) -> Any:
    """Build a LLaVA processor with a SentencePiece BPE tokenizer trained on ``texts``. Write tokenizer.model to ``folder``."""
    import sentencepiece
    from transformers import CLIPImageProcessor, LlamaTokenizer, LlavaProcessor

    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts, "USER: Describe the image. ASSISTANT:"]),
        model_writer=trained,
        model_type="bpe",
        vocab_size=512,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(trained.getvalue())
    special = {"image_token": "<image>"}
    tokenizer = LlamaTokenizer.from_pretrained(
        folder, pad_token="<unk>", extra_special_tokens=special, model_max_length=512, trust_remote_code=False
    )
    side = config.image_size
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_convert_rgb=True)
    processor = LlavaProcessor(
        images, tokenizer, patch_size=config.patch_size, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    processor.chat_template = CHAT_TEMPLATE
    return processor


def llava_config(config: TinyLlavaConfig, processor: Any) -> Any:
    """Build a LLaVA configuration that matches ``processor``."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    tokenizer, width = processor.tokenizer, config.hidden_size
    spread = 0.64 * width**-0.5  # the usual 0.02 suits a width of 1000 but doubles a small model's training time
    vision = CLIPVisionConfig(
        hidden_size=config.vision_hidden_size,
        intermediate_size=2 * config.vision_hidden_size,
        num_hidden_layers=config.vision_num_layers,
        num_attention_heads=4,
        image_size=config.image_size,
        patch_size=config.patch_size,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=spread,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        initializer_range=spread,
        image_token_index=processor.image_token_id,
        image_seq_length=(config.image_size // config.patch_size) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )


def _place_positions(tower: Any, side: int) -> None:
    """Initialise the tower's position embeddings with 2D sines and cosines, because they cannot be learned from few images."""
    weight = tower.embeddings.position_embedding.weight
    width = weight.shape[1]
    rates = 1.5 * torch.exp(-math.log(50.0) * torch.arange(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.reshape(-1, 1) * rates for place in (columns, rows)]
    with torch.no_grad():
        weight[1:] = 0.5 * torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)
