"""Small random checkpoints in each family's real on-disk format (configuration, safetensors, processor, tokenizer, chat template), for
smoke tests of code and clusters. Their output means nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from cfvlm_ds.core.config import TinyLlavaConfig
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.demo.tiny_llava import llava_config, llava_processor, write_checkpoint

_CORPUS = ["describe the image. is it red? yes, no. a red circle left of two blue squares; 0 1 2 3 4 5 6 7 8 9"]
_NEWLINES = ["\n" * 4] * 9  # for a tokenizer that has tokens of several newlines, as Gemma's
_WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {**_WIDTHS, "num_key_value_heads": 2, "max_position_embeddings": 4096}
_TILE = {"height": 28, "width": 28}
_TILINGS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
_CONTENT = "{%- for item in message['content'] %}{% if item['type'] == 'image' %}IMAGE{% else %}{{ item['text'] }}{% endif %}{% endfor %}"
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}" + _CONTENT + "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
_INST = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
    + _CONTENT
    + " [/INST]{% else %} "
    + _CONTENT
    + "</s>{% endif %}"
    "{% endfor %}"
)
_IDEFICS = (
    "<|begin_of_text|>{% for message in messages %}{{ message['role'] | capitalize }}:{% if message['content'][0]['type'] != 'image' %} "
    "{% endif %}" + _CONTENT + "<end_of_utterance>{{ '\n' }}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
_GEMMA = (
    "<bos>{% for message in messages %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) "
    "+ '\n' }}" + _CONTENT + "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_GLM = (
    "[gMASK]<sop>{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}" + _CONTENT + "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

Parts = tuple[Any, Any]
"""(configuration or model, processor)"""
t: Any = transformers
"""Its constructors take what its configuration classes leave to ``**kwargs``, hence Any."""


def write_small(model_type: str, out_dir: Path, seed: int = 0) -> Path:
    """Write a checkpoint of about 100,000 parameters to ``out_dir``.

    Raises ConfigError for an unknown ``model_type`` or a folder that is there.
    """
    if model_type not in SMALL:
        raise ConfigError(f"no small model of type {model_type!r}; there are {', '.join(SMALL)}")
    if out_dir.exists():
        raise ConfigError(f"{out_dir} is there already; name another folder")

    def make(folder: Path) -> Parts:
        config, processor = SMALL[model_type](model_type, folder)
        torch.manual_seed(seed)
        model = t.AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.1)  # the usual 0.02 makes a model this narrow say the same of everything
        return model, processor

    return write_checkpoint(out_dir, make)


def _tokenizer(special: Sequence[str], end: str, pad: str, corpus: Sequence[str] = _CORPUS, **named: Any) -> Any:
    """A byte-level BPE tokenizer with the family's control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=320, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    )
    return t.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=pad, additional_special_tokens=list(special), model_max_length=4096, **named
    )


def _ids(tokenizer: Any) -> dict[str, int]:
    """What a language model's configuration says of its tokenizer."""
    return {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}


def _processor(model_type: str, *parts: Any, **options: Any) -> Any:
    """The processor of the type's own class."""
    return getattr(t, t.models.auto.processing_auto.PROCESSOR_MAPPING_NAMES[model_type])(*parts, **options)


def _llava(model_type: str, folder: Path) -> Parts:
    config = TinyLlavaConfig(str(folder), hidden_size=32, vision_hidden_size=32)
    processor = llava_processor(folder, config, _CORPUS)
    return llava_config(config, processor), processor


def _qwen(model_type: str, folder: Path) -> Parts:
    names = ["object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start", "quad_end", "vision_start", "vision_end"]
    names += ["vision_pad", "image_pad", "video_pad"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|{name}|>" for name in names)]
    tokenizer = _tokenizer(special, "<|im_end|>", "<|endoftext|>")
    placeholders = {
        f"{field}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for field, name in {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}.items()
    }
    text: dict[str, Any] = {**_TEXT, **_ids(tokenizer), "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    vision: dict[str, Any] = {"depth": 3, "num_heads": 4, "hidden_size": 32}
    template = _CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    video = t.Qwen2VLVideoProcessor if model_type.startswith("qwen2") else t.Qwen3VLVideoProcessor
    if model_type == "qwen2_vl":
        vision |= {"embed_dim": 32, "mlp_ratio": 2, "patch_size": 14}
    elif model_type == "qwen2_5_vl":
        vision |= {"intermediate_size": 64, "out_hidden_size": 32, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
    else:
        vision |= {"intermediate_size": 64, "out_hidden_size": 32, "patch_size": 16, "num_position_embeddings": 64}
    if model_type.startswith("qwen3_5"):
        del text["rope_scaling"]
        text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]}}
        text |= {"head_dim": 32, "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
        text |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}  # three gated delta nets, then one layer of attention
    elif model_type.startswith("qwen3"):
        vision["deepstack_visual_indexes"] = [0, 1]
        text |= {"head_dim": 8, "num_hidden_layers": 3}  # features added after the last layer would reach no text
    if model_type.endswith("moe"):
        text |= {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    if model_type == "qwen3_5_moe":
        text["shared_expert_intermediate_size"] = 16
        del text["intermediate_size"]
    side = 2 * vision["patch_size"]
    images = t.Qwen2VLImageProcessor(patch_size=vision["patch_size"], size={"shortest_edge": side**2, "longest_edge": 64 * side**2})
    config = t.AutoConfig.for_model(model_type, text_config=text, vision_config=vision, **placeholders)
    template = template if model_type.startswith("qwen3") else _SYSTEM + template
    return config, _processor(model_type, images, tokenizer, video(), chat_template=template)


def _llava_next(model_type: str, folder: Path) -> Parts:
    tokenizer = _tokenizer(["<unk>", "<s>", "</s>", "<image>"], "</s>", "<unk>", bos_token="<s>")
    config = t.LlavaNextConfig(
        vision_config=t.CLIPVisionConfig(**_WIDTHS, image_size=28, patch_size=14),
        text_config=t.MistralConfig(**_TEXT, **_ids(tokenizer), sliding_window=None),
        image_grid_pinpoints=_TILINGS,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    images = t.LlavaNextImageProcessor(size={"shortest_edge": 28}, crop_size=_TILE, image_grid_pinpoints=_TILINGS)
    processor = t.LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_INST.replace("IMAGE", "<image>{{ '\n' }}"),
    )
    return config, processor


def _llava_onevision(model_type: str, folder: Path) -> Parts:
    tokenizer = _tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"], "<|im_end|>", "<|endoftext|>")
    config = t.LlavaOnevisionConfig(
        vision_config=t.SiglipVisionConfig(**_WIDTHS, image_size=28, patch_size=7, vision_use_head=False),
        text_config=t.Qwen2Config(**_TEXT, **_ids(tokenizer)),
        image_grid_pinpoints=[[28, 28], *_TILINGS],
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
    )
    processor = t.LlavaOnevisionProcessor(
        t.LlavaOnevisionImageProcessor(size=_TILE, image_grid_pinpoints=[[28, 28], *_TILINGS]),
        tokenizer,
        t.LlavaOnevisionVideoProcessor(size=_TILE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=_CHATML.replace("IMAGE", "<image>{{ '\n' }}"),
    )
    return config, processor


def _internvl(model_type: str, folder: Path) -> Parts:
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values()]
    tokenizer = _tokenizer(special, "<|im_end|>", "<|endoftext|>", extra_special_tokens=named)
    config = t.InternVLConfig(
        vision_config={**_WIDTHS, "image_size": [28, 28], "patch_size": [7, 7]},
        text_config=t.Qwen2Config(**_TEXT, **_ids(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    images = t.GotOcr2ImageProcessor(size=_TILE, crop_to_patches=True, min_patches=1, max_patches=4)
    video = t.InternVLVideoProcessor(size=_TILE)
    template = _CHATML.replace("IMAGE", "<IMG_CONTEXT>{{ '\n' }}")
    return config, t.InternVLProcessor(images, tokenizer, video, image_seq_length=4, chat_template=template)


def _idefics(model_type: str, folder: Path) -> Parts:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    special += ["<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))]
    tokenizer = _tokenizer(special, "<end_of_utterance>", "<|pad|>", bos_token="<|begin_of_text|>")
    pad = {"pad_token_id": tokenizer.pad_token_id}
    vision = {**_WIDTHS, "image_size": 28, "patch_size": 7}
    text = t.LlamaConfig(**_TEXT, **_ids(tokenizer), **pad)
    placeholder = tokenizer.convert_tokens_to_ids("<image>")
    sizes = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
    options = {"image_seq_len": 4, "chat_template": _IDEFICS.replace("IMAGE", "<image>")}
    config = t.AutoConfig.for_model(model_type, vision_config=vision, text_config=text, image_token_id=placeholder, scale_factor=2, **pad)
    if model_type == "idefics3":
        return config, _processor(model_type, t.Idefics3ImageProcessor(**sizes), tokenizer, **options)
    return config, _processor(model_type, t.SmolVLMImageProcessor(**sizes), tokenizer, t.SmolVLMVideoProcessor(), **options)


def _gemma3(model_type: str, folder: Path) -> Parts:
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *named.values()]
    tokenizer = _tokenizer(special, "<end_of_turn>", "<pad>", _CORPUS + _NEWLINES, bos_token="<bos>", extra_special_tokens=named)
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    text = {**_TEXT, **_ids(tokenizer), "head_dim": 8, "query_pre_attn_scalar": 8, "num_hidden_layers": 3, "layer_types": layers}
    config = t.Gemma3Config(
        vision_config={**_WIDTHS, "image_size": 56, "patch_size": 7, "vision_use_head": False},
        text_config={**text, "sliding_window": 12, "pad_token_id": tokenizer.pad_token_id},  # shorter than a picture and than any prompt
        mm_tokens_per_image=16,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    images = t.Gemma3ImageProcessor(size={"height": 56, "width": 56})
    template = _GEMMA.replace("IMAGE", "<start_of_image>")
    return config, t.Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=16)


def _gemma4(model_type: str, folder: Path) -> Parts:
    """All that Gemma 4 has beside its mixture of experts: embeddings for each layer and shared keys and values are of its smaller models,
    pictures that are seen as a whole, and full layers whose values are their keys, of its larger ones."""
    named = {f"{kind}_token": f"<|{kind}|>" for kind in ("image", "audio")}
    named |= {"boi_token": "<|image>", "eoi_token": "<image|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
    special = ["<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|video|>", *named.values()]
    tokenizer = _tokenizer(special, "<turn|>", "<pad>", _CORPUS + _NEWLINES, bos_token="<bos>", extra_special_tokens=named)
    layers = ["sliding_attention", "full_attention"] * 2
    text = {**_TEXT, **_ids(tokenizer), "head_dim": 8, "global_head_dim": 16, "num_hidden_layers": 4, "layer_types": layers}
    text |= {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "num_kv_shared_layers": 2, "sliding_window": 24}
    text |= {"vocab_size_per_layer_input": len(tokenizer), "hidden_size_per_layer_input": 8, "use_bidirectional_attention": "vision"}
    vision = {**_WIDTHS, "num_key_value_heads": 4, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 2, "position_embedding_size": 160}
    sound = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "subsampling_conv_channels": [4, 4],
        "output_proj_dims": 32,
    }
    config = t.Gemma4Config(
        vision_config={**vision, "use_clipped_linears": True, "standardize": True},
        text_config={**text, "final_logit_softcapping": 3.0, "pad_token_id": tokenizer.pad_token_id},
        audio_config=sound,
        **{f"{kind}_token_id": tokenizer.convert_tokens_to_ids(f"<|{kind}|>") for kind in ("image", "audio", "video")},
        **{f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("boi", "eoi", "boa")},
    )
    images = t.Gemma4ImageProcessor(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)
    template = _GEMMA.replace("IMAGE", "\n\n<|image|>\n\n").replace("<start_of_turn>", "<|turn>").replace("<end_of_turn>", "<turn|>")
    parts = t.Gemma4AudioFeatureExtractor(), images, tokenizer, t.Gemma4VideoProcessor(patch_size=4, pooling_kernel_size=2)
    return config, t.Gemma4Processor(*parts, chat_template=template, image_seq_length=70)


def _mistral3(model_type: str, folder: Path) -> Parts:
    tokenizer = _tokenizer(
        ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"], "</s>", "<unk>", bos_token="<s>"
    )
    config = t.Mistral3Config(
        vision_config={**_WIDTHS, "head_dim": 8, "image_size": 224, "patch_size": 7},
        text_config={**_TEXT, **_ids(tokenizer), "head_dim": 8, "sliding_window": None, "model_type": "mistral"},
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        tie_word_embeddings=False,
    )
    images = t.PixtralImageProcessor(patch_size={"height": 7, "width": 7}, size={"longest_edge": 84})
    options = {"patch_size": 7, "spatial_merge_size": 2, "chat_template": "<s>" + _INST.replace("IMAGE", "[IMG]")}
    return config, t.PixtralProcessor(images, tokenizer, **options)


def _cohere(model_type: str, folder: Path) -> Parts:
    named = {"boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>", "image_token": "<|IMG_PATCH|>"}
    named |= {"img_line_break_token": "<|IMG_LINE_BREAK|>"}
    special = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *named.values(),
        "<image>",
        "TILE_GLOBAL",
        *(f"TILE_{k}" for k in range(1, 5)),
    ]
    tokenizer = _tokenizer(special, "<|im_end|>", "<|endoftext|>", extra_special_tokens=named)
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12}
    text = {**_TEXT, **_ids(tokenizer), **layers, "model_type": "cohere2", "pad_token_id": tokenizer.pad_token_id}
    vision = {**_WIDTHS, "image_size": 28, "patch_size": 7, "model_type": "siglip_vision_model", "vision_use_head": False}
    parts = {"vision_config": vision, "text_config": text}
    placeholder = tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>")
    if model_type == "cohere2_vision":
        config = t.Cohere2VisionConfig(**parts, image_token_id=placeholder, alignment_intermediate_size=64)
        images = t.Cohere2VisionImageProcessor(size=_TILE, patch_size=2, max_patches=4)  # visual tokens on a side of a tile
        return config, t.Cohere2VisionProcessor(images, tokenizer, chat_template=_CHATML.replace("IMAGE", "<|IMG_PATCH|>"))
    config = t.AyaVisionConfig(**parts, image_token_index=placeholder)
    images = t.GotOcr2ImageProcessor(size=_TILE, crop_to_patches=True, min_patches=1, max_patches=4)
    options = {"patch_size": 7, "img_size": 28, "downsample_factor": 2, "chat_template": _CHATML.replace("IMAGE", "<image>")}
    return config, t.AyaVisionProcessor(images, tokenizer, **options)


def _glm(model_type: str, folder: Path) -> Parts:
    marks = ["image", "video", "begin_of_image", "end_of_image", "begin_of_video", "end_of_video"]
    special = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", *(f"<|{mark}|>" for mark in marks)]
    tokenizer = _tokenizer(special, "<|endoftext|>", "<|endoftext|>")
    fields = ["image", "video", "image_start", "image_end", "video_start", "video_end"]
    ids = {f"{field}_token_id": tokenizer.convert_tokens_to_ids(f"<|{mark}|>") for field, mark in zip(fields, marks, strict=True)}
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    text = {**_TEXT, **_ids(tokenizer), "num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": rope}
    vision = {
        "depth": 3,
        "num_heads": 4,
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 32,
        "image_size": 56,
        "patch_size": 14,
    }
    parts = {"text_config": {**text, "model_type": "glm4v_text"}, "vision_config": {**vision, "model_type": "glm4v_vision"}}
    config = t.AutoConfig.for_model(model_type, **parts, **ids)
    size = {"shortest_edge": 2 * 28**2, "longest_edge": 2 * 64 * 28**2}  # both frames of a picture are counted
    template = _GLM.replace("IMAGE", "<|begin_of_image|><|image|><|end_of_image|>")
    if model_type == "glm4v":
        images, video = t.Glm4vImageProcessor, t.Glm4vVideoProcessor
    else:
        images, video = t.Glm46VImageProcessor, t.Glm46VVideoProcessor
    return config, _processor(model_type, images(size=size), tokenizer, video(), chat_template=template)


SMALL: dict[str, Callable[[str, Path], Parts]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), _qwen),
    "internvl": _internvl,
    **dict.fromkeys(("idefics3", "smolvlm"), _idefics),
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "mistral3": _mistral3,
    **dict.fromkeys(("glm4v", "glm46v"), _glm),
    **dict.fromkeys(("aya_vision", "cohere2_vision"), _cohere),
}
"""Model type -> what makes its parts; a tokenizer that is a file of its own is put into the folder."""
