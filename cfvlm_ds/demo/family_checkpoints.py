"""Small random models in each family's real on-disk format (configuration, safetensors, processor, tokenizer, chat template).

They are for smoke tests of code and clusters. Their output is meaningless.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.files import whole_folder
from cfvlm_ds.core.untrusted import refuse_filled
from cfvlm_ds.demo.base import write_base

_RANDOM = "A small model with random weights, for tests: its texts mean nothing."
_CORPUS = ["describe the image. is it red? yes, no. a red circle left of two blue squares; 0 1 2 3 4 5 6 7 8 9"]
_NEWLINES = ["\n" * 4] * 9  # gives the tokenizer tokens for runs of newlines, as in Gemma's tokenizer
_WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_VOCABULARY = "size of the vocabulary"
_TEXT = {**_WIDTHS, "num_key_value_heads": 2, "max_position_embeddings": 4096, "vocab_size": _VOCABULARY, "bos_token_id": None}
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
"""A configuration or model, and its processor."""
t: Any = transformers
"""transformers, typed as Any, because its constructors hide arguments in ``**kwargs``."""


def write_small(model_type: str, out_dir: Path) -> Path:
    """Write a random checkpoint of about 100,000 parameters to ``out_dir``, and return ``out_dir``. For the model type ``base``, copy the
    demo's pretrained model instead.

    Raises ConfigError if ``model_type`` is unknown or the folder contains files.
    """
    if model_type == "base":
        refuse_filled(out_dir)
        return write_base(out_dir)
    if model_type not in SMALL:
        raise ConfigError(f"no small model of type {model_type!r}; available: base, {', '.join(SMALL)}")

    def make(folder: Path) -> Parts:
        config, processor = SMALL[model_type](model_type)
        torch.manual_seed(0)
        model = t.AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.1)  # at the usual 0.02, a model this narrow gives the same output for all inputs
        return model, processor

    return write_checkpoint(out_dir, make)


def write_checkpoint(out_dir: Path, make: Callable[[Path], Parts]) -> Path:
    """Save the random model and processor that ``make`` returns, and return ``out_dir``.

    ``make`` receives a folder that it can write files to. The folder is renamed to ``out_dir`` when it is complete.
    """
    refuse_filled(out_dir)
    with whole_folder(out_dir) as partial:
        for part in make(partial):
            part.save_pretrained(partial)
        (partial / "README.md").write_text(f"{_RANDOM}\n")
    return out_dir


def is_random(folder: Path) -> bool:
    """Return whether a model folder was written by ``write_checkpoint``."""
    card = folder / "README.md"
    return card.is_file() and card.read_text(errors="replace").startswith(_RANDOM)


def _parts(
    model_type: str,
    *,
    special: Sequence[str],
    end: str,
    template: str,
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    config: Mapping[str, Any],
    parts: Mapping[str, tuple[str, Mapping[str, Any]]],
    options: Mapping[str, Any] = MappingProxyType({}),
    corpus: Sequence[str] = _CORPUS,
    **named: Any,
) -> Parts:
    """Build a processor, and a configuration in which control tokens are replaced by their ids.

    Args:
        special: control tokens of the tokenizer. The first is the padding token unless ``named`` sets another.
        end: control token that ends a turn.
        template: chat template.
        text: configuration of the language model, added to _TEXT.
        vision: configuration of the vision tower.
        config: other values of the configuration.
        parts: name -> (class, options) of each part of the processor except the tokenizer.
        options: options of the processor.
        corpus: texts that the tokenizer is trained on.
        named: other options of the tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bytewise = Tokenizer(models.BPE())
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=[*special], initial_alphabet=alphabet, show_progress=False)
    bytewise.train_from_iterator(corpus, trainer)
    given = {"eos_token": end, "pad_token": special[0], "additional_special_tokens": [*special], "model_max_length": 4096, **named}
    tokenizer = t.PreTrainedTokenizerFast(tokenizer_object=bytewise, **given)
    numbers = {token: tokenizer.convert_tokens_to_ids(token) for token in special} | {_VOCABULARY: len(tokenizer)}

    def numbered(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: numbered(item) for name, item in value.items()}
        return numbers.get(value, value) if isinstance(value, str) else value

    settings = {"text_config": {**_TEXT, "eos_token_id": end, **text}, "vision_config": vision, **config}
    processor_parts = {name: getattr(t, kind)(**given) for name, (kind, given) in parts.items()}
    kind = getattr(t, t.models.auto.processing_auto.PROCESSOR_MAPPING_NAMES[model_type])
    processor = kind(tokenizer=tokenizer, chat_template=template, **processor_parts, **options)
    return t.AutoConfig.for_model(model_type, **numbered(settings)), processor


def _qwen(model_type: str) -> Parts:
    names = ["object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start", "quad_end", "vision_start", "vision_end"]
    names += ["vision_pad", "image_pad", "video_pad"]
    text: dict[str, Any] = {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    vision: dict[str, Any] = {"depth": 3, "num_heads": 4, "hidden_size": 32}
    newer = model_type.startswith("qwen3")
    if model_type == "qwen2_vl":
        vision |= {"embed_dim": 32, "mlp_ratio": 2, "patch_size": 14}
    elif model_type == "qwen2_5_vl":
        vision |= {"intermediate_size": 64, "out_hidden_size": 32, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
    else:
        vision |= {"intermediate_size": 64, "out_hidden_size": 32, "patch_size": 16, "num_position_embeddings": 64}
    if model_type.startswith("qwen3_5"):
        text = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]}}
        text |= {"head_dim": 32, "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
        text |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}  # three gated-delta-net layers, then an attention layer
    elif newer:
        vision["deepstack_visual_indexes"] = [0, 1]
        text |= {"head_dim": 8, "num_hidden_layers": 3}  # features added after the last layer would not affect the text
    if model_type.endswith("moe"):
        text |= {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    if model_type == "qwen3_5_moe":
        text["shared_expert_intermediate_size"] = 16
    patch = vision["patch_size"]
    sizes = {"patch_size": patch, "size": {"shortest_edge": 4 * patch**2, "longest_edge": 256 * patch**2}}
    return _parts(
        model_type,
        special=[*_IM, *(f"<|{name}|>" for name in names)],
        end="<|im_end|>",
        template=_SYSTEM * (not newer) + _CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
        text=text,
        vision=vision,
        config={f"{name}_token_id": f"<|{token}|>" for name, token in _QWEN_TOKENS.items()},
        parts={
            "image_processor": ("Qwen2VLImageProcessor", sizes),
            "video_processor": (f"Qwen{3 if newer else 2}VLVideoProcessor", {}),
        },
    )


_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN_TOKENS = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
_TOWER = {**_WIDTHS, "image_size": 28, "patch_size": 7}
_TILES = ("GotOcr2ImageProcessor", {"size": _TILE, "crop_to_patches": True, "min_patches": 1, "max_patches": 4})
_INTERN = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
_GEMMA3 = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
_GEMMA4 = {"image_token": "<|image|>", "audio_token": "<|audio|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
_GEMMA4 |= {"boa_token": "<|audio>", "eoa_token": "<audio|>"}
_COHERE = {"boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>", "image_token": "<|IMG_PATCH|>"}
_COHERE |= {"img_line_break_token": "<|IMG_LINE_BREAK|>"}
_GLM_MARKS = ("image", "video", "begin_of_image", "end_of_image", "begin_of_video", "end_of_video")

_idefics = partial(
    _parts,
    special=[
        *("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"),
        *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
    ],
    bos_token="<|begin_of_text|>",
    end="<end_of_utterance>",
    pad_token="<|pad|>",
    template=_IDEFICS.replace("IMAGE", "<image>"),
    text={"model_type": "llama", "pad_token_id": "<|pad|>"},
    vision=_TOWER,
    config={"image_token_id": "<image>", "scale_factor": 2, "pad_token_id": "<|pad|>"},
    options={"image_seq_len": 4},
)
_llava = partial(
    _parts,
    special=["<unk>", "<s>", "</s>", "<image>"],
    bos_token="<s>",
    end="</s>",
    vision={**_WIDTHS, "image_size": 28, "patch_size": 14, "model_type": "clip_vision_model"},
    options={"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
)
_IDEFICS_SIZES = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
_cohere = partial(
    _parts,
    special=[*_IM, *_COHERE.values(), "<image>", "TILE_GLOBAL", *(f"TILE_{k}" for k in range(1, 5))],
    extra_special_tokens=_COHERE,
    end="<|im_end|>",
    text={
        "model_type": "cohere2",
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 12,
        "pad_token_id": "<|endoftext|>",
    },
    vision={**_TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
)


def _glm(model_type: str) -> Parts:
    fields = ("image", "video", "image_start", "image_end", "video_start", "video_end")
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    sizes = {"size": {"shortest_edge": 2 * 28**2, "longest_edge": 2 * 64 * 28**2}}  # in pixels; a picture counts as two frames
    kind = {"glm4v": "Glm4v", "glm46v": "Glm46V"}[model_type]
    return _parts(
        model_type,
        special=["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", *(f"<|{mark}|>" for mark in _GLM_MARKS)],
        end="<|endoftext|>",
        template=_GLM.replace("IMAGE", "<|begin_of_image|><|image|><|end_of_image|>"),
        text={"model_type": "glm4v_text", "num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": rope},
        vision={
            **{"depth": 3, "num_heads": 4, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "image_size": 56},
            "patch_size": 14,
            "model_type": "glm4v_vision",
        },
        config={f"{name}_token_id": f"<|{mark}|>" for name, mark in zip(fields, _GLM_MARKS, strict=True)},
        parts={"image_processor": (f"{kind}ImageProcessor", sizes), "video_processor": (f"{kind}VideoProcessor", {})},
    )


SMALL: dict[str, Callable[[str], Parts]] = {
    "llava": partial(
        _llava,
        template=_INST.replace("[INST]", "USER:").replace("[/INST]", "ASSISTANT:").replace("IMAGE", "<image>{{ '\n' }}"),
        text={"model_type": "llama"},
        config={"image_token_index": "<image>", "image_seq_length": 4},
        parts={"image_processor": ("CLIPImageProcessor", {"size": {"shortest_edge": 28}, "crop_size": _TILE})},
    ),
    "llava_next": partial(
        _llava,
        template=_INST.replace("IMAGE", "<image>{{ '\n' }}"),
        text={"model_type": "mistral", "sliding_window": None},
        config={"image_grid_pinpoints": _TILINGS, "image_token_index": "<image>"},
        parts={
            "image_processor": (
                "LlavaNextImageProcessor",
                {"size": {"shortest_edge": 28}, "crop_size": _TILE, "image_grid_pinpoints": _TILINGS},
            )
        },
    ),
    "llava_onevision": partial(
        _parts,
        special=[*_IM, "<image>", "<video>"],
        end="<|im_end|>",
        template=_CHATML.replace("IMAGE", "<image>{{ '\n' }}"),
        text={"model_type": "qwen2"},
        vision={**_TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
        config={"image_grid_pinpoints": [[28, 28], *_TILINGS], "image_token_index": "<image>", "video_token_index": "<video>"},
        parts={
            "image_processor": ("LlavaOnevisionImageProcessor", {"size": _TILE, "image_grid_pinpoints": [[28, 28], *_TILINGS]}),
            "video_processor": ("LlavaOnevisionVideoProcessor", {"size": _TILE}),
        },
        options={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
    ),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), _qwen),
    "internvl": partial(
        _parts,
        special=[*_IM, *_INTERN.values()],
        extra_special_tokens=_INTERN,
        end="<|im_end|>",
        template=_CHATML.replace("IMAGE", "<IMG_CONTEXT>{{ '\n' }}"),
        text={"model_type": "qwen2"},
        vision={**_WIDTHS, "image_size": [28, 28], "patch_size": [7, 7]},
        config={"image_token_id": "<IMG_CONTEXT>", "image_seq_length": 4},
        parts={"image_processor": _TILES, "video_processor": ("InternVLVideoProcessor", {"size": _TILE})},
        options={"image_seq_length": 4},
    ),
    "idefics3": partial(_idefics, parts={"image_processor": ("Idefics3ImageProcessor", _IDEFICS_SIZES)}),
    "smolvlm": partial(
        _idefics, parts={"image_processor": ("SmolVLMImageProcessor", _IDEFICS_SIZES), "video_processor": ("SmolVLMVideoProcessor", {})}
    ),
    "gemma3": partial(
        _parts,
        special=["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *_GEMMA3.values()],
        bos_token="<bos>",
        extra_special_tokens=_GEMMA3,
        end="<end_of_turn>",
        corpus=_CORPUS + _NEWLINES,
        template=_GEMMA.replace("IMAGE", "<start_of_image>"),
        text={
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 12,  # fewer tokens than a picture or any prompt has
            "pad_token_id": "<pad>",
        },
        vision={**_WIDTHS, "image_size": 56, "patch_size": 7, "vision_use_head": False},
        config={"mm_tokens_per_image": 16} | {f"{name}_index": token for name, token in _GEMMA3.items()},
        parts={"image_processor": ("Gemma3ImageProcessor", {"size": {"height": 56, "width": 56}})},
        options={"image_seq_length": 16},
    ),
    # All features of Gemma 4 except its mixture of experts. From the smaller models: per-layer embeddings, and layers that share
    # keys and values. From the larger models: bidirectional attention within pictures, and full-attention layers that use keys as values.
    "gemma4": partial(
        _parts,
        special=["<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|video|>", *_GEMMA4.values()],
        bos_token="<bos>",
        extra_special_tokens=_GEMMA4,
        end="<turn|>",
        corpus=_CORPUS + _NEWLINES,
        template=_GEMMA.replace("IMAGE", "\n\n<|image|>\n\n").replace("<start_of_turn>", "<|turn>").replace("<end_of_turn>", "<turn|>"),
        text={
            "head_dim": 8,
            "global_head_dim": 16,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "num_kv_shared_layers": 2,
            "sliding_window": 24,
            "vocab_size_per_layer_input": _VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "use_bidirectional_attention": "vision",
            "final_logit_softcapping": 3.0,
            "pad_token_id": "<pad>",
        },
        vision={
            **{**_WIDTHS, "num_key_value_heads": 4, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 2},
            "position_embedding_size": 160,
            "use_clipped_linears": True,
            "standardize": True,
        },
        config={
            "audio_config": {
                **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "subsampling_conv_channels": [4, 4]},
                "output_proj_dims": 32,
            },
            "video_token_id": "<|video|>",
            **{f"{name}_id": token for name, token in _GEMMA4.items() if name != "eoa_token"},
        },
        parts={
            "feature_extractor": ("Gemma4AudioFeatureExtractor", {}),
            "image_processor": ("Gemma4ImageProcessor", {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}),
            "video_processor": ("Gemma4VideoProcessor", {"patch_size": 4, "pooling_kernel_size": 2}),
        },
        options={"image_seq_length": 70},
    ),
    "mistral3": partial(
        _parts,
        special=["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"],
        bos_token="<s>",
        end="</s>",
        template="<s>" + _INST.replace("IMAGE", "[IMG]"),
        text={"model_type": "mistral", "head_dim": 8, "sliding_window": None},
        vision={**_WIDTHS, "head_dim": 8, "image_size": 224, "patch_size": 7},
        config={"image_token_index": "[IMG]", "tie_word_embeddings": False},
        parts={
            "image_processor": ("PixtralImageProcessor", {"patch_size": {"height": 7, "width": 7}, "size": {"longest_edge": 84}}),
        },
        options={"patch_size": 7, "spatial_merge_size": 2},
    ),
    **dict.fromkeys(("glm4v", "glm46v"), _glm),
    "aya_vision": partial(
        _cohere,
        template=_CHATML.replace("IMAGE", "<image>"),
        config={"image_token_index": "<|IMG_PATCH|>"},
        parts={"image_processor": _TILES},
        options={"patch_size": 7, "img_size": 28, "downsample_factor": 2},
    ),
    "cohere2_vision": partial(
        _cohere,
        template=_CHATML.replace("IMAGE", "<|IMG_PATCH|>"),
        config={"image_token_id": "<|IMG_PATCH|>", "alignment_intermediate_size": 64},
        parts={
            "image_processor": ("Cohere2VisionImageProcessor", {"size": _TILE, "patch_size": 2, "max_patches": 4})
        },  # patch_size: number of visual tokens per side of a tile
    ),
}
"""Model type -> function that builds its configuration and processor."""
