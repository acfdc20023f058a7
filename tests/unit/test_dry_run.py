"""The recipes of examples/, resolved at the real sizes of the models they name, without weights."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from conftest import REPO, read_json, write_json
from torch.distributed._tools.mem_tracker import MemTracker

from cfvlm_ds.cli.train import build
from cfvlm_ds.cli.train import run as train
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.parsing import parse_config
from cfvlm_ds.models import family_of, meta_model
from cfvlm_ds.models.adapters import BYTES_OF_4BIT, linear_weights
from cfvlm_ds.objectives import OBJECTIVES
from cfvlm_ds.training.dry_run import activations, attention_without_data, dry_run, model_states, working_memory

RECIPES = sorted(path for path in (REPO / "examples").glob("*.yaml") if path.stem not in ("quickstart", "build_coco"))
QWEN_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
QWEN_72B = {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
ROPE = {"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}}
QWEN_2_5_TOWER = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27}
# Sizes as published, and the parameters of the published checkpoints (from the index of their files, 2 bytes each).
PUBLISHED = {
    "llava15_7b": ({"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32_064}}, 7_063_427_072),
    "llava_onevision_7b": (
        {"model_type": "llava_onevision", "text_config": {"model_type": "qwen2", **QWEN_7B, "vocab_size": 152_064}},
        8_030_348_832,
    ),
    "qwen2_vl_7b": (
        {
            "model_type": "qwen2_vl",
            "text_config": {**QWEN_7B, **ROPE, "vocab_size": 152_064},
            "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": 3584},
        },
        8_291_375_616,
    ),
    "qwen2_5_vl_7b": (
        {
            "model_type": "qwen2_5_vl",
            "text_config": {**QWEN_7B, **ROPE, "vocab_size": 152_064},
            "vision_config": {**QWEN_2_5_TOWER, "out_hidden_size": 3584},
        },
        8_292_166_656,
    ),
    "qwen2_5_vl_72b": (
        {
            "model_type": "qwen2_5_vl",
            "text_config": {**QWEN_72B, **ROPE, "vocab_size": 152_064},
            "vision_config": {**QWEN_2_5_TOWER, "intermediate_size": 3456, "out_hidden_size": 8192},
        },
        73_410_777_344,
    ),
    "qwen3_vl_8b": (
        {
            "model_type": "qwen3_vl",
            "text_config": {
                "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32,
                "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
            },
            "vision_config": {
                "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096,
                "deepstack_visual_indexes": [8, 16, 24], "num_position_embeddings": 2304,
            },
        },
        8_767_123_696,
    ),
    "qwen3_5_9b": (  # 8.95 billion of them in the language model, as published; the rest by the published sizes, without the weights for
        {            # several tokens at once (mtp.*), which the library leaves out
            "model_type": "qwen3_5",
            "text_config": {
                "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 32, "num_attention_heads": 16,
                "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 248_320, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
            },
            "vision_config": {
                "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096,
                "num_position_embeddings": 2304,
            },
        },
        9_409_813_744,
    ),
    "gemma3_4b": (
        {
            "model_type": "gemma3",
            "text_config": {
                "hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34, "num_attention_heads": 8,
                "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262_208, "sliding_window": 1024,
            },
            "vision_config": {**SIGLIP, "model_type": "siglip_vision_model", "image_size": 896, "patch_size": 14, "vision_use_head": False},
        },
        4_300_079_472,
    ),
    "gemma4_26b": (  # 25_233_141_760 in the language model and 569_548_080 in the tower, counted by hand from the published sizes
        {
            "model_type": "gemma4",
            "text_config": {
                "hidden_size": 2816, "intermediate_size": 2112, "num_hidden_layers": 30, "num_attention_heads": 16,
                "num_key_value_heads": 8, "num_global_key_value_heads": 2, "head_dim": 256, "global_head_dim": 512, "vocab_size": 262_144,
                "attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "sliding_window": 1024, "enable_moe_block": True,
                "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704, "use_bidirectional_attention": "vision",
            },
            "vision_config": {**SIGLIP, "num_key_value_heads": 16, "head_dim": 72, "patch_size": 16, "standardize": True},
        },
        25_805_933_872,
    ),
    "mistral_small_24b": (
        {
            "model_type": "mistral3", "tie_word_embeddings": False,
            "text_config": {
                "model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32_768, "num_hidden_layers": 40, "head_dim": 128,
                "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 131_072, "sliding_window": None,
            },
            "vision_config": {
                "model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "patch_size": 14,
            },
        },
        24_011_361_280,
    ),
    "glm4v_9b": (
        {
            "model_type": "glm4v",
            "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "vision_config": {},  # the library's own, as for the language model
        },
        10_292_777_472,
    ),
}  # fmt: skip


ONE_GPU = ("qwen2_5_vl_7b_lora_1gpu", "qwen2_5_vl_7b_qlora")


def model_of(recipe: Path) -> str:
    return re.sub("_(q?lora|lora_1gpu)$", "", recipe.stem)


def configured(recipe: Path, folder: Path, *extra: str) -> RunConfig:
    name = model_of(recipe)
    (folder / name).mkdir(exist_ok=True)
    write_json(folder / name / "config.json", PUBLISHED[name][0])
    return parse_config(["--config", str(recipe), "--model.name_or_path", str(folder / name), *extra], OBJECTIVES)


def keep_three_layers(model: Path) -> None:
    published = read_json(model / "config.json")
    shorter = published["text_config"] | {"num_hidden_layers": 3}
    write_json(model / "config.json", published | {"text_config": shorter})


def row(report: str, name: str) -> list[int]:
    (line,) = [line for line in report.splitlines() if line.startswith(f"{name} ")]
    return [int(number.replace(",", "")) for number in line.split()[1:3]]


def test_every_model_of_the_list_has_both_recipes():
    assert {path.stem for path in RECIPES} == {name + kind for name in PUBLISHED for kind in ("", "_lora")} | {*ONE_GPU}


FEW = ("llava15_7b", "qwen2_5_vl_7b_qlora")


@pytest.mark.parametrize(
    "recipe", [pytest.param(path, id=path.stem, marks=() if path.stem in FEW else pytest.mark.long) for path in RECIPES]
)
def test_recipes_at_the_published_sizes(recipe, tmp_path):
    report = dry_run(configured(recipe, tmp_path))
    total, trains = row(report, "all")
    adapters = trains if "lora" in recipe.stem else 0
    assert total - adapters == PUBLISHED[model_of(recipe)][1]
    (planned,) = re.findall(rf"`examples/{recipe.name}` \| ([\d.]+) \| ([\d.]+) \|", (REPO / "docs" / "families.md").read_text())
    gpus = 1 if recipe.stem in ONE_GPU else 8
    assert re.search(rf"^ +{gpus} +{planned[0]} +{planned[1]} ", report, re.MULTILINE), "memory, as the page has it"
    stated = re.search(r"(one|\d+)(?: nodes with (\d+))? GPUs? of (\d+) GB", recipe.read_text(), re.IGNORECASE)
    assert stated, "a recipe says what it is for"
    needed = math.prod(int(number) for number in ("1" if stated[1].lower() == "one" else stated[1], stated[2] or 1))
    (peak,) = re.findall(rf"^ +{needed} +[\d.]+ +([\d.]+) ", report, re.MULTILINE)
    assert float(peak) < 0.9 * int(stated[3]) * 1e9 / 2**30, "a tenth of the card is left for fragments and the tower"
    if adapters:
        assert row(report, "vision_tower")[1] == row(report, "projector")[1] == 0 and 0 < adapters < 0.03 * total
    else:
        assert trains == row(report, "projector")[0] + row(report, "language_model")[0]


def test_what_is_reported_for_one_model(tmp_path):
    """LLaVA-1.5-7B in full: 18 bytes a trained parameter divided by the GPUs, 2 a frozen one, and 4 for the largest layer's."""
    report = dry_run(configured(REPO / "examples" / "llava15_7b.yaml", tmp_path))
    trains, frozen = row(report, "all")[1], row(report, "all")[0] - row(report, "all")[1]
    layer = 32_064 * 4096  # the embeddings
    for gpus in (1, 8, 64):
        (line,) = re.findall(rf"^ +{gpus} +([\d.]+) ", report, re.MULTILINE)
        expected = (18 * trains + 2 * frozen) / gpus + 4 * layer
        assert float(line) == pytest.approx(expected / 2**30, abs=0.06)
    rates = {line.split()[0]: line.split()[4:] for line in report.splitlines() if re.match(r"vision_tower|projector|language_model", line)}
    assert rates == {"vision_tower": [], "projector": ["1e-05"], "language_model": ["1e-05"]}, "a frozen module has no learning rate"
    # A block keeps at least its input of each token in bfloat16 (32 blocks of width 4096), and with recomputation one block the rest.
    kept, whole = (float(number) for number in re.findall(r"(?:activations|checkpointing:) ([\d.]+)", report))
    assert 16_384 * 4096 * 2 * 32 / 2**30 < kept < 2 * 16_384 * 4096 * 2 * 32 / 2**30 and whole > 10 * kept


@pytest.mark.parametrize("name", ["llava15_7b", "qwen2_5_vl_7b", "gemma3_4b"])
@pytest.mark.parametrize("recompute", [True, False])
def test_the_peak_of_activations_is_what_torch_tracks(name, recompute, tmp_path):
    """Of a forward and backward of three layers and their embeddings, whose gradients are gone as soon as they are whole."""
    config = configured(REPO / "examples" / f"{name}.yaml", tmp_path)
    keep_three_layers(Path(config.model.name_or_path))
    model = meta_model(config.model, torch.bfloat16, attention_without_data())
    found = activations(model, 2048, recompute)
    decoder = model.get_decoder()
    for parameter in decoder.parameters():
        parameter.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", None))
    embedded = torch.empty(1, 2048, decoder.config.hidden_size, dtype=torch.bfloat16, device="meta", requires_grad=True)
    tracker = MemTracker()
    tracker.track_external(decoder)
    with tracker:
        state = decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state
        state.backward(torch.empty_like(state))
    (tracked,) = tracker.get_tracker_snapshot("peak").values()
    weights = sum(size for kind, size in tracked.items() if str(kind).endswith(("PARAM", "BUFFER")))
    assert found == pytest.approx(tracked["Total"] - weights, rel=0.001)


def test_4_bit_weights_are_those_that_bitsandbytes_quantises(tmp_path):
    """By hand: the seven matrices of each of 28 blocks, whose keys and values are 512 wide; and what the library makes of one weight."""
    config = configured(REPO / "examples" / "qwen2_5_vl_7b_qlora.yaml", tmp_path)
    model = meta_model(config.model, torch.bfloat16, attention_without_data())
    block = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18_944
    assert linear_weights(model, family_of(model.config)) == 28 * block
    packed, state = quantize_4bit(torch.randn(64, 64), quant_type="nf4")
    assert (packed.nbytes + state.absmax.nbytes) / 64**2 == BYTES_OF_4BIT


def test_adapters_without_a_module_are_warned_of(tmp_path):
    for name, warned in (("llava15_7b", True), ("llava15_7b_lora", False)):
        model = parse_config(["--config", str(REPO / "examples" / f"{name}.yaml"), "--model.lora.rank", "8"], OBJECTIVES).model
        assert bool(model.unused) == warned
    report = dry_run(configured(REPO / "examples" / "llava15_7b.yaml", tmp_path, "--model.lora.rank", "8"))
    assert "warning: model.lora has no effect, because no module has tuning lora" in report


def test_the_command_needs_no_weights_data_or_launcher(tmp_path, capsys):
    recipe = REPO / "examples" / "llava15_7b_lora.yaml"
    configured(recipe, tmp_path)
    keep_three_layers(tmp_path / "llava15_7b")
    train(["--config", str(recipe), "--model.name_or_path", str(tmp_path / "llava15_7b"), "--train.dry_run", "true"])
    report = capsys.readouterr().out
    assert "language_model" in report and "GiB per GPU" in report
    assert ("this machine has none" in report) == (not torch.cuda.is_available()) and "so small" not in report


@pytest.mark.parametrize("kind", ["base", "habits"])
def test_a_model_that_a_run_would_build_is_built_elsewhere(kind, tmp_path, capsys):
    """The report is that of the model which the run builds; the run's folder stays as it is."""
    folder = tmp_path / "model"
    world = ["--build.habits.out_dir", str(tmp_path / "world"), "--build.habits.num_train", "4", "--build.habits.num_test", "4"]
    built = ["--build.base", str(folder), *(world if kind == "habits" else ())]
    options = ["--model.name_or_path", str(folder), "--deepspeed", str(REPO / "ds_configs" / "z3.json"), "--train.dry_run", "true"]
    train([*options, *built])
    before = capsys.readouterr().out
    assert "the model is so small that more GPUs do not lower the peak" in before
    assert list(tmp_path.iterdir()) == [] and "GiB per GPU" in before
    build(parse_config([*options, *built], OBJECTIVES).build)
    capsys.readouterr()
    train(options)
    assert before.endswith(capsys.readouterr().out)  # DeepSpeed warns once, before the first report


def test_memory_of_a_layer_by_hand():
    """1,000 trained and 100 frozen weights. ZeRO-1 on 4 GPUs: the gradients of the other three quarters in float32, and the frozen weights
    in 2 bytes. ZeRO-3: a quarter of the frozen weights, and with hpz a copy of all weights that 2 GPUs share."""
    model = torch.nn.Sequential(torch.nn.Linear(100, 10, bias=False), torch.nn.Linear(10, 10, bias=False))
    model[1].requires_grad_(False)

    def card(gpus: int, **zero: int) -> int:
        return model_states(model, {"zero_optimization": zero}, gpus, 8)[0]

    assert card(4, stage=1) - card(4, stage=2) == 4 * 1000 * 3 // 4
    model[1].requires_grad_(True)
    trained = {stage: card(4, stage=stage) for stage in (2, 3)}
    assert card(4, stage=3, zero_hpz_partition_size=2) - trained[3] == 2 * 1100 // 2
    model.requires_grad_(True)[1].requires_grad_(False)
    frozen, without = card(4, stage=2), torch.nn.Sequential(model[0])
    assert frozen - model_states(without, {"zero_optimization": {"stage": 2}}, 4, 8)[0] == 2 * 100
    of_3 = [model_states(each, {"zero_optimization": {"stage": 3}}, 4, 8)[0] for each in (model, without)]
    assert of_3[0] - of_3[1] == 2 * 100 // 4


def test_buckets_of_a_stage(tmp_path):
    """Two while one is reduced; the weights that ZeRO-3 gathers; 2 bytes an element."""
    config = configured(REPO / "examples" / "llava15_7b.yaml", tmp_path)
    keep_three_layers(Path(config.model.name_or_path))
    model, buckets = meta_model(config.model, torch.bfloat16, attention_without_data()), {}
    for stage in (1, 2, 3):
        zero = {"stage": stage, "overlap_comm": True, "reduce_bucket_size": 1000, "stage3_max_live_parameters": 10}
        needed = working_memory(model, {"zero_optimization": zero}, 8, False)
        buckets[stage] = needed["gradient buckets"], needed.get("gathered weights")
    assert buckets == {1: (4000, None), 2: (4000, None), 3: (2000, 20)}
