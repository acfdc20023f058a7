"""Model folders that are no model's, or not whole: one sentence that names the folder or file, from every door that models come in by."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_json, write_json
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from cfvlm_ds.batching.collator import load_collator
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.run_folder import named_model, recorded_model
from cfvlm_ds.export.source import skeleton
from cfvlm_ds.models import attach_adapters, fingerprint, load_config, load_model, meta_model
from cfvlm_ds.models.model_files import hashed_files, weight_patterns


def loaded(folder: Path) -> Any:
    return load_model(ModelConfig(str(folder), attn_implementation="sdpa"), torch.float32)


def edited(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        content = read_json(folder / name)
        change(content)
        write_json(folder / name, content)

    return edit


def config(**values: Any) -> Callable[[Path], object]:
    return edited("config.json", lambda content: content.update(values))


def text_config(**values: Any) -> Callable[[Path], object]:
    return edited("config.json", lambda content: content["text_config"].update(values))


def written(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def removed(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


def shortened(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-40])


def sharded(lost: bool) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names, parts = sorted(weights), {}
        for number in (0, 1):
            parts[file := f"model-{number + 1:05d}-of-00002.safetensors"] = names[number::2]
            save_file({name: weights[name] for name in parts[file]}, folder / file, {"format": "pt"})
        weight_map = {name: file for file, held in parts.items() for name in held}
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
        if lost:
            (folder / "model-00002-of-00002.safetensors").unlink()

    return edit


LOADING: dict[str, tuple[Callable[[Path], object], str]] = {
    "no vision tower": (config(model_type="llama"), "model type 'llama' has no vision tower; use a vision-language model"),
    "unknown type": (config(model_type="zebra"), "cannot be read"),
    "layers that depend on the place in the row": (text_config(layer_types=["chunked_attention"] * 3), "layer_types 'chunked_attention'"),
    "a tensor listed twice": (
        lambda folder: [
            removed("model.safetensors")(folder),
            written("model.safetensors.index.json", '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')(folder),
        ],
        "key 'a' occurs twice",
    ),
    "a link to elsewhere": (lambda folder: (folder / "NOTICE").symlink_to("/etc/hostname"), "NOTICE leads to /etc/hostname, outside"),
    "a width of a wrong type": (text_config(hidden_size="wide"), "cannot be "),
    "a missing shard": (sharded(lost=True), "model-00002-of-00002.safetensors is listed in model.safetensors.index.json but missing"),
    "a truncated shard": (shortened("model.safetensors"), "model.safetensors cannot be read (Error while deserializing header"),
    "an index that is none": (
        lambda folder: [sharded(lost=False)(folder), written("model.safetensors.index.json", "[]")(folder)], "is not a valid index"
    ),
    "no weights": (removed("model.safetensors"), "cannot be loaded"),
    "adapters of another model": (written("adapter_config.json", '{"base_model_name_or_path": "/etc"}'), "both a model and adapters"),
}  # fmt: skip


@pytest.mark.parametrize("case", LOADING)
def test_models_that_cannot_be_loaded(case, model_dir, tmp_path):
    edit, said = LOADING[case]
    edit(folder := shutil.copytree(model_dir, tmp_path / "model"))
    with pytest.raises(ConfigError) as refused:
        loaded(folder)
    assert (said in str(refused.value) and str(folder) in str(refused.value)) or "model type" in str(refused.value), refused.value
    assert "; " in str(refused.value), "and what to do"


def test_a_whole_model_in_shards_loads(model_dir, tmp_path):
    sharded(lost=False)(folder := shutil.copytree(model_dir, tmp_path / "model"))
    whole, parts = (loaded(each) for each in (model_dir, folder))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


@pytest.mark.parametrize(
    ("files", "fetched"),
    [
        (["model.safetensors", "pytorch_model.bin", "consolidated.safetensors"], {"model.safetensors"}),
        (["model.safetensors.index.json", "model-1.safetensors", "pytorch_model-1.bin"], {"model-1.safetensors"}),
        (["pytorch_model.bin", "adapter_model.safetensors"], {"pytorch_model.bin", "adapter_model.safetensors"}),
        (["pytorch_model.bin.index.json", "pytorch_model-1.bin"], {"pytorch_model-1.bin"}),
        ([], set()),
    ],
)
def test_pickled_weights_of_a_hub_are_fetched_where_there_are_no_others(files, fetched):
    assert set(filter_repo_objects(files, allow_patterns=weight_patterns(files))) == fetched


def test_a_model_is_recognised_by_the_weights_that_are_loaded(model_dir, tmp_path):
    """Pickles that a cache has beside them are no part of it, and a pipe of that name is not waited for."""
    folder = shutil.copytree(model_dir, tmp_path / "model")
    known = fingerprint(ModelConfig(str(folder)))
    (folder / "pytorch_model.bin").write_bytes(b"x")
    os.mkfifo(folder / "more.bin")
    assert fingerprint(ModelConfig(str(folder))) == known
    removed("model.safetensors")(folder)
    assert [path.name for path in hashed_files(folder)] == ["pytorch_model.bin"]
    assert fingerprint(ModelConfig(str(folder)))["weights"] != known["weights"]


PROCESSORS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no processor": (removed("processor_config.json", "chat_template.jinja"), ""),
    "no template": (removed("chat_template.jinja"), "has no chat template; use the instruction-tuned model"),
    "no tokenizer": (removed("tokenizer.json", "tokenizer_config.json", "tokenizer.model"), "cannot be loaded"),
    "no window": (edited("config.json", lambda content: content["text_config"].update(max_position_embeddings=None)), ""),
    "a tokenizer that brings its library down": (
        edited(
            "tokenizer.json",
            lambda content: content.update(
                pre_tokenizer={"type": "Split", "pattern": {"Regex": r"(([a-z]|.)*)*\d"}, "behavior": "Isolated", "invert": False}
            ),
        ),
        "the model's tokenizer raises PanicException (",
    ),
    "no tokens in the window": (edited("tokenizer_config.json", lambda content: content.update(model_max_length=0)), "is 0 tokens; "),
}  # fmt: skip


@pytest.mark.parametrize("case", PROCESSORS)
def test_processors_that_cannot_be_loaded(case, model_dir, tmp_path):
    edit, said = PROCESSORS[case]
    edit(folder := shutil.copytree(model_dir, tmp_path / "model"))
    with pytest.raises(ConfigError) as refused:
        load_collator(ModelConfig(str(folder)))
    assert said in str(refused.value) and str(folder) in str(refused.value) and "; " in str(refused.value), refused.value


@pytest.mark.parametrize(
    "make", [skeleton, lambda source: meta_model(ModelConfig(source), torch.float32, "sdpa")], ids=["export", "dry run"]
)
def test_a_configuration_of_which_no_model_can_be_made(make, model_dir, tmp_path):
    text_config(hidden_act="none")(folder := shutil.copytree(model_dir, tmp_path / "model"))
    with pytest.raises(ConfigError, match=r"no model can be built from the configuration of .*model' .*'none'.*; "):
        make(str(folder))


# Run folders and adapters -------------------------------------------------------------------------------------------------------------


def test_a_run_folder_means_its_export_or_its_adapters(tmp_path):
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    write_json(run / "config.yaml", {"model": {"name_or_path": "org/base", "max_tiles": 3, "lora": {"rank": 4}}})
    with pytest.raises(ConfigError, match=f"cfvlm-ds export {run}"):
        named_model(str(run))
    write_json(run / "adapter" / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "org/base"})
    with pytest.raises(ConfigError, match=r"adapter has no adapter_model\.safetensors"):
        named_model(str(run))
    save_file({"x": torch.zeros(1)}, run / "adapter" / "adapter_model.safetensors")
    named = named_model(str(run))
    assert (named.name_or_path, named.adapter, named.recorded.max_tiles) == ("org/base", run / "adapter", 3)
    assert named_model(str(run / "adapter")).name_or_path == "org/base"
    with pytest.raises(ConfigError, match="org/base"):
        load_config(str(run / "adapter"))
    (run / "export").mkdir()
    (run / "export" / "config.json").write_text("{}")
    assert (named_model(str(run)).name_or_path, named_model(str(run)).adapter) == (str(run / "export"), None)
    assert named_model("org/model").name_or_path == "org/model" and recorded_model(run).lora.rank == 4
    for text in ("", "model: {}", "model: {name_or_path: x, lora: {rank: many}}", "{", "- " * 3000, "model: !!python/name:os.system"):
        (run / "config.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"run/config\.yaml"):
            recorded_model(run)
    for text in ("{", '{"peft_type": "LORA"}', '{"peft_type": "IA3", "base_model_name_or_path": "x"}'):
        (run / "adapter" / "adapter_config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"adapter_config\.json"):
            named_model(str(run / "adapter"))


@pytest.fixture(scope="module")
def adapters(model_dir, tmp_path_factory):
    import peft

    torch.manual_seed(0)
    model = loaded(model_dir)
    described = peft.LoraConfig(r=3, target_modules=r".*language_model.*\.(q|v)_proj", init_lora_weights=False)
    peft.get_peft_model(model, described).save_pretrained(folder := tmp_path_factory.mktemp("adapters"))
    return folder


def test_adapters_are_what_their_weights_are(adapters, model_dir, tmp_path):
    """A pattern of layers that would take for ever to match is not matched, and the same layers get the same adapters."""
    import peft

    def attached(folder: Path) -> dict[str, torch.Tensor]:
        model = loaded(model_dir)
        return attach_adapters(model, folder).state_dict()

    model = loaded(model_dir)
    expected = peft.PeftModel.from_pretrained(model, str(adapters)).get_base_model().state_dict()
    slow = shutil.copytree(adapters, tmp_path / "slow")
    edited("adapter_config.json", lambda content: content.update(target_modules=r"(?:[a-z_.\d]+)+\d+!"))(slow)
    for folder in (adapters, slow):
        found = attached(folder)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_modules_that_were_saved_whole_are_those_of_peft(model_dir, tmp_path):
    import peft

    model = loaded(model_dir)
    described = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["multi_modal_projector"], init_lora_weights=False)
    trained = peft.get_peft_model(model, described)
    for parameter in trained.parameters():
        parameter.data += parameter.requires_grad
    trained.save_pretrained(tmp_path)
    expected = trained.get_base_model().state_dict()
    found = attach_adapters(loaded(model_dir), tmp_path).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"r": -1}, "; "),
        ({"lora_alpha": "x"}, "cannot be loaded"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_config"),
        ({"layer_replication": [[0, 10**9]]}, "layer_replication"),
        ({"target_parameters": ["a"]}, "target_parameters"),
        ({"modules_to_save": ["multi_modal_projector"]}, "KeyError: "),
    ],
)
def test_adapters_that_say_what_they_are_not(change, said, adapters, model_dir, tmp_path):
    edited("adapter_config.json", lambda content: content.update(change))(folder := shutil.copytree(adapters, tmp_path / "adapters"))
    model = loaded(model_dir)
    with pytest.raises(ConfigError) as refused:
        attach_adapters(model, folder)
    assert said in str(refused.value) and str(folder) in str(refused.value), refused.value
