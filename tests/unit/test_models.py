"""Model families, loading, freezing, and the tiny model: what is refused, and by which name."""

from __future__ import annotations

import shutil
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COLOURS, contents, read_json, write_json
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny_llava import TinyLlavaConfig, build_tiny_llava
from torch import Tensor
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from cfvlm_ds.batching.collator import load_collator
from cfvlm_ds.core.config import ModelConfig, ModuleConfig
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.models import FAMILIES, MODULES, Scorer, attention, family_of, load_config, load_model, parameter_counts
from cfvlm_ds.models import trainable as trainable_of
from cfvlm_ds.models.loading import load_processor

KEY = "multi_modal_projector.linear_1.weight"
FROZEN = ModuleConfig("frozen")
# Where a part's parameters sit in the library's own modules: the independent account of what belongs to what.
PARTS: dict[str, Callable[[Any], list[torch.nn.Module]]] = {
    "vision_tower": lambda m: [m.model.vision_tower],
    "projector": lambda m: [m.model.multi_modal_projector],
    "language_model": lambda m: [m.model.language_model, m.lm_head],
}
UNUSED = "model.vision_tower.post_layernorm."  # CLIP's norm of its pooled output, which LLaVA does not take


def part_ids(model: Any, module: str) -> set[int]:
    return {id(parameter) for part in PARTS[module](model) for parameter in part.parameters()}


def load(model_dir: Path, **options: Any) -> Any:
    return load_model(ModelConfig(str(model_dir), attn_implementation="sdpa", **options), torch.float32)


# Families -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.vision_tower_extra.weight", "vision_tower.weight", "lm_head2.weight", "adapter.weight", ""])
def test_a_parameter_of_no_module_is_refused(name):
    """A prefix ends at a dot: a longer name is another module."""
    with pytest.raises(KeyError, match="is in no module of family 'llava'"):
        FAMILIES["llava"].module_of(name)


# Loading ------------------------------------------------------------------------------------------------------------------------------


def altered(model_dir: Path, folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    shutil.copytree(model_dir, folder)
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_loads_the_checkpoints_own_weights_in_the_dtype_asked_for(model_dir):
    expected = LlavaForConditionalGeneration.from_pretrained(model_dir).state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(ModelConfig(str(model_dir), attn_implementation="sdpa"), dtype)
        assert all(p.dtype == dtype and p.requires_grad == (not name.startswith(UNUSED)) for name, p in model.named_parameters())
        assert model.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name].to(value.dtype)) for name, value in model.state_dict().items())
        assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop(KEY), rf"1 missing keys: \S*{KEY}; repair"),
        (lambda w: w.pop("language_model.lm_head.weight"), r"1 missing keys: \S*lm_head\.weight; repair"),
        (lambda w: w.update({"language_model.model.extra.weight": torch.zeros(2)}), r"1 unexpected keys: \S*extra\.weight; repair"),
        (lambda w: w.update({KEY: torch.zeros(3, 3)}), rf"1 mismatched keys: \S*{KEY}.*\[3, 3\]"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_not_this_model_is_refused_by_key(edit, message, model_dir, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load(altered(model_dir, tmp_path / "altered", edit))
    load(altered(model_dir, tmp_path / "same", lambda weights: None))


def test_without_a_network_a_hub_name_is_read_from_the_cache_or_refused_without_retries(model_dir, tmp_path, monkeypatch):
    """The hub's client retries 25 s for each absent file; a processor has eight that are optional."""
    closed = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", closed + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    repository = tmp_path / "models--models--tiny"
    shutil.copytree(model_dir, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    start = time.monotonic()
    assert load_processor(ModelConfig("models/tiny")).tokenizer is not None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConfigError, match=r"'models/tinny' is not a local folder and could not be read from the hub"):
        load_config("models/tinny")
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'models/tiny'"):
        load_config("models/tinny")
    assert time.monotonic() - start < 20


def test_flash_attention_without_the_package_is_refused_with_the_install_line(monkeypatch):
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: False)
    with pytest.raises(ConfigError, match=r"`pip install flash-attn --no-build-isolation`"):
        attention("flash_attention_2")
    assert [attention(name) for name in ("auto", "sdpa")] == ["sdpa", "sdpa"]
    with pytest.raises(ConfigError, match="'eager' is not known; use auto, sdpa, flash_attention_2, varlen"):
        attention("eager")
    with pytest.raises(ConfigError, match="varlen needs a CUDA device"):
        attention("varlen")


@pytest.mark.parametrize(
    ("cuda", "package", "options", "expected"),
    [
        (True, True, {}, "flash_attention_2"),
        (True, False, {}, "varlen"),
        (False, True, {}, "sdpa"),
        (True, True, {"dtype": torch.float32}, "sdpa"),
        (True, True, {"model_config": LlavaConfig(text_config=LlamaConfig(hidden_size=48, num_attention_heads=4))}, "sdpa"),
    ],
)
def test_auto_attention(cuda, package, options, expected, monkeypatch):
    """Kernels of flash attention take half precision and heads of a multiple of 8; torch's is used if it takes a scale and a window."""
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: package)
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=print))
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    assert attention("auto", **options) == expected
    if expected == "sdpa" and options:
        with pytest.raises(ConfigError, match="flash_attention_2 supports half precision"):
            attention("flash_attention_2", **options)
    if expected == "varlen":  # in torch 2.10
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k: None)
        assert attention("auto") == "sdpa"


# Freezing -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frozen", [(), *((module,) for module in MODULES), ("vision_tower", "language_model"), ("vision_tower", "projector")]
)
def test_freezing_switches_off_a_module_and_nothing_else(frozen, model_dir):
    model = load(model_dir, **{module: FROZEN for module in frozen})
    unused = {id(parameter): parameter.numel() for name, parameter in model.named_parameters() if name.startswith(UNUSED)}
    still = set(unused).union(*(part_ids(model, module) for module in frozen))
    assert {id(p) for p in model.parameters() if not p.requires_grad} == still
    family = family_of(model.config)
    listed = list(trainable_of(Scorer(model, family)))
    assert {id(p) for _, _, p in listed} == {id(p) for p in model.parameters()} - still
    assert {module for module, _, _ in listed} == set(MODULES) - set(frozen)
    sizes = {module: sum(p.numel() for part in PARTS[module](model) for p in part.parameters()) for module in MODULES}
    trains = {m: 0 if m in frozen else n - (m == "vision_tower") * sum(unused.values()) for m, n in sizes.items()}
    assert parameter_counts(model, family) == {m: (n, trains[m]) for m, n in sizes.items()}


def test_parameter_counts_take_the_whole_size_of_a_shard(model_dir):
    """ZeRO-3 leaves an empty tensor on a rank and keeps the whole size beside it."""
    model = load(model_dir, vision_tower=FROZEN)
    family = family_of(model.config)
    expected = parameter_counts(model, family)
    for parameter in model.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    assert parameter_counts(model, family) == expected


# The tiny model -----------------------------------------------------------------------------------------------------------------------


def tiny(folder: Path, seed: int = 0) -> Path:
    return build_tiny_llava(
        TinyLlavaConfig(str(folder), hidden_size=16, vision_hidden_size=16, patch_size=24, seed=seed), [f"a {c} circle" for c in COLOURS]
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("tiny") / "model")


def test_building_again_leaves_the_folder_alone(built):
    before, when = contents(built), {path: path.stat().st_mtime_ns for path in built.iterdir()}
    assert tiny(built, seed=5) == built, "left alone if it is there, as the option says"
    assert contents(built) == before and {path: path.stat().st_mtime_ns for path in built.iterdir()} == when
    assert [path.name for path in built.parent.iterdir()] == ["model"] and "corpus.txt" not in before


def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before(built, tmp_path):
    torch.rand(7)
    weights = load_file(built / "model.safetensors")
    same, other = (load_file(tiny(tmp_path / str(seed), seed) / "model.safetensors") for seed in (0, 1))
    assert weights.keys() == same.keys() and all(torch.equal(weights[name], same[name]) for name in weights)
    assert not torch.equal(weights[KEY], other[KEY])


def test_code_in_a_models_folder_is_not_run(model_dir, tmp_path):
    """A folder that names classes of its own is read by the library's."""
    folder = shutil.copytree(model_dir, tmp_path / "model")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    for name, classes in {
        "config.json": ("AutoConfig", "AutoModelForImageTextToText"),
        "tokenizer_config.json": ("AutoProcessor",),
        "processor_config.json": ("AutoProcessor",),
    }.items():
        content = read_json(folder / name)
        write_json(folder / name, content | {"auto_map": {each: f"own.{each}" for each in classes}})
    model = load_model(ModelConfig(str(folder)), torch.float32)
    load_collator(ModelConfig(str(folder)))
    assert type(model).__module__.startswith("transformers.") and not (tmp_path / "ran").exists()


class Opens:
    """What a pickle may do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def test_pickled_weights_run_nothing(model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    load_model(ModelConfig(str(folder)), torch.float32)
    torch.save(weights | {KEY: Opens(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="contain objects other than tensors; convert"):
        load_model(ModelConfig(str(folder)), torch.float32)
    assert not (tmp_path / "ran").exists()
