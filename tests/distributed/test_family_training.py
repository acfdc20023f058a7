"""Every family trained under real ZeRO-3: two ranks, of which one may have no image, equal one; what is exported is what was trained."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import losses, metrics, plain_scores, run_trainings, save_groups, selected, tensors
from PIL import Image

from cfvlm_ds.core.config import LoraConfig
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup
from cfvlm_ds.data import GroupSampler, read_manifest
from cfvlm_ds.data.identity import data_identity
from cfvlm_ds.data.stored_scores import read_scores
from cfvlm_ds.demo.family_checkpoints import SMALL, write_small
from cfvlm_ds.export import export_hf
from cfvlm_ds.export.zero import ZeroWeights

FEW = {("qwen2_5_vl", "lora"), ("qwen3_vl_moe", "full")}  # windows; features for several layers, and experts


def each(*tunings: str) -> pytest.MarkDecorator:
    """A test of every family with these tunings."""
    pairs = [(family, tuning) for family in SMALL for tuning in tunings]
    return pytest.mark.parametrize(
        "on", [pytest.param(pair, marks=() if pair in FEW else pytest.mark.long, id="-".join(pair)) for pair in pairs]
    )


STEPS, GLOBAL_BATCH, SEED = 3, 4, 0
LORA = {"rank": 4, "alpha": 16.0}
# Adapters of every kind are tried in some family: DoRA in a tower with windows, rsLoRA in the plainest.
KINDS = {"qwen2_5_vl": {"dora": True}, "llava": {"rslora": True}}


def write_groups(path: Path, num: int, text_only: bool) -> Path:
    """Pairs of images of various sizes, and (from the third row on, every other one) text alone; one row shows two pictures at once."""
    generator, groups = random.Random(num), []
    for g in range(num):
        files = [path.parent / f"{path.stem}-{g}-{k}.png" for k in range(2)]
        for file in files:
            Image.effect_noise((generator.randrange(28, 90), generator.randrange(28, 90)), 80).convert("RGB").save(file)
        texts = (Candidate("describe", f"a red circle {g}"), Candidate("describe", f"two blue dogs on a lawn {g}"))
        images: Any = ((files[0], files[1]), (files[1], files[0])) if g == 1 else ((files[0],), (files[1],))
        group = CounterfactualGroup(f"{path.stem}-{g}", images, texts, ((1, 0), (0, 1)))
        if text_only and g > 2 and g % 2:
            group = CounterfactualGroup(group.id, ((),), texts, ((1, 0),))
        groups.append(group)
    return save_groups(path, groups)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups")
    return {"train": write_groups(folder / "train.jsonl", 12, True), "test": write_groups(folder / "test.jsonl", 3, False)}


def arguments(model: Path, manifest: dict[str, Path], out: Path, tuning: str, ranks: int) -> list[str]:
    """Two ranks recompute activations and one does not: the gradients must be equal all the same."""
    lora = LORA | KINDS.get(model.name, {})
    options = {
        "--config": "tests/support/train.yaml",
        "--deepspeed": "tests/support/z3_partitioned.json",
        "--model.name_or_path": str(model),
        "--model.gradient_checkpointing": str(ranks == 2).lower(),
        "--model.vision_tower.tuning": tuning,
        "--model.language_model.tuning": tuning,
        "--model.projector.tuning": "frozen" if tuning == "lora" else "full",
        "--model.projector.learning_rate": "1e-3",
        **{f"--model.lora.{name}": str(value).lower() for name, value in lora.items()},
        "--data.train": str(manifest["train"]),
        "--data.evaluation": json.dumps({"test": str(manifest["test"])} if ranks == 2 else {}),
        "--train.output_dir": str(out),
        "--train.max_steps": str(STEPS),
        "--train.per_device_train_batch_size": str(GLOBAL_BATCH // ranks),
        "--train.seed": str(SEED),
        "--train.export": str(ranks == 2).lower(),
        "--train.self_check": "error",
    }
    return [part for pair in options.items() for part in pair]


class Checkpoints(dict[str, Path]):
    """Family -> its small checkpoint, which is written when a test first asks for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, family: str) -> Path:
        self[family] = write_small(family, self.folder / family)
        return self[family]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return Checkpoints(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def trained(models, manifest, tmp_path_factory, request):
    """(family, tuning, ranks) -> run folder."""
    out, chosen = tmp_path_factory.mktemp("runs"), selected(request, "on") or FEW
    found = {(*pair, ranks): out / f"{'-'.join(pair)}-{ranks}" for pair in chosen for ranks in (1, 2)}
    for ranks in (1, 2):
        runs = [arguments(models[family], manifest, folder, tuning, ranks) for (family, tuning, of), folder in found.items() if of == ranks]
        run_trainings(ranks, *runs, timeout=900)
    return found


def test_one_rank_has_no_image_at_some_step(manifest):
    """The data do what the tests below say."""
    groups = read_manifest(manifest["train"])
    layout = {"num_groups": len(groups), "groups_per_micro_batch": GLOBAL_BATCH // 2, "gradient_accumulation_steps": 1, "world_size": 2}
    streams = [iter(GroupSampler(**layout, rank=rank, seed=SEED)) for rank in range(2)]
    shown = [[any(groups[g].num_pictures for g in next(stream)) for stream in streams] for _ in range(STEPS)]
    assert [True, False] in shown or [False, True] in shown, shown


@each("full", "lora")
def test_two_ranks_equal_one(on, trained):
    """Images on one rank only, gradient checkpointing on and off, ZeRO-3: one trajectory. fp32, relative 2e-4."""
    expected = losses(trained[(*on, 1)])
    assert losses(trained[(*on, 2)]) == pytest.approx(expected, rel=2e-4)
    assert len(expected) == STEPS and len(set(expected)) == STEPS


@each("full")
def test_exports_have_the_sources_names_and_dtypes(on, models, trained):
    source, exported = tensors(models[on[0]]), tensors(trained[(*on, 2)] / "export")
    assert {name: (t.shape, t.dtype) for name, t in exported.items()} == {name: (t.shape, t.dtype) for name, t in source.items()}
    trained = [name for name in source if source[name].dim() and "audio" not in name]
    assert sum(not torch.equal(exported[name], source[name]) for name in trained) > len(trained) / 2, "it trained"


@each("lora")
def test_adapters_leave_the_model_as_it_was(on, trained, models):
    """After some steps of both modules' adapters the frozen projector, and every weight beside an adapter, is bit for bit the source's."""
    folder = trained[(*on, 2)]
    held, merged_names = ZeroWeights(folder / f"checkpoint-{STEPS}"), 0
    before = ZeroWeights(trained[(*on, 1)] / f"checkpoint-{STEPS}")
    from transformers import AutoModelForImageTextToText

    source = AutoModelForImageTextToText.from_pretrained(models[on[0]], dtype=torch.float32).state_dict()
    for name in held.weights:
        if ".lora_" not in name:
            assert torch.equal(held.tensor(name, torch.float32), source[name.replace(".base_layer.", ".")].float()), name
            merged_names += ".base_layer." in name
        elif "lora_B" in name:
            assert held.tensor(name, torch.float32).any(), f"{name} has trained"
            torch.testing.assert_close(held.tensor(name, torch.float32), before.tensor(name, torch.float32), rtol=1e-2, atol=1e-4)
    assert merged_names > 8


@pytest.mark.long  # test_export and test_cli have it of LLaVA
def test_a_fresh_process_scores_the_exports_as_the_run_did(models, trained, manifest, tmp_path):
    """The whole model, the adapters in peft's format, and the adapters merged, under transformers and peft alone; relative 1e-4."""
    wanted = {}
    for (family, tuning, ranks), folder in trained.items():
        if tuning == "full" and ranks == 2:
            wanted[f"{folder / 'export'}"] = folder
        elif ranks == 2:
            adapters = LoraConfig(**(LORA | KINDS.get(family, {})))
            merged = export_hf(folder / f"checkpoint-{STEPS}", str(models[family]), tmp_path / family, lora=adapters)
            wanted |= {f"{models[family]}+{folder / 'adapter'}": folder, f"{merged}": folder}
    groups = read_manifest(manifest["test"])
    data = data_identity(groups, [manifest["test"].parent])
    for (model, folder), found in zip(wanted.items(), plain_scores(manifest["test"], *wanted), strict=True):
        for name, stored in read_scores(folder / "scores" / "test.jsonl", groups, data).items():
            for ours, theirs in zip(stored.logp, found[name], strict=True):
                assert ours == pytest.approx(theirs, rel=1e-4), (model, name)


@pytest.mark.long
def test_the_routers_are_balanced_over_the_whole_step(models, manifest, tmp_path):
    """One rank and two, in one micro-batch, in several and in parts, recomputed or not: one trajectory. fp32, relative 2e-4."""
    ways: dict[str, tuple[int, dict[str, str]]] = {
        "one": (1, {}),
        "ranks": (2, {}),
        "accumulated": (1, {"per_device_train_batch_size": "1", "gradient_accumulation_steps": "4"}),
        "both, in parts": (2, {"per_device_train_batch_size": "1", "gradient_accumulation_steps": "2"}),
        "unbalanced": (1, {"router_balance": "0"}),
    }
    for ranks in (1, 2):
        runs = []
        for name, (of, options) in ways.items():
            own = {"router_balance": "5", "export": "false", "logging_steps": "1"} | options
            few = [part for option, value in own.items() for part in (f"--train.{option}", value)] + ["--data.evaluation", "{}"]
            few += ["--data.max_tokens_per_forward=150"] * ("parts" in name)  # no tree is larger
            if of == ranks:
                runs.append([*arguments(models["qwen3_vl_moe"], manifest, tmp_path / name, "full", ranks), *few])
        run_trainings(ranks, *runs, timeout=900)
    rows = {name: [row for row in metrics(tmp_path / name) if "loss" in row] for name in ways}
    keys = ["loss", "loss/router_balance", *(f"router/load/{expert:03d}" for expert in range(4))]
    expected = [[row[key] for key in keys] for row in rows["one"]]
    assert len(expected) == STEPS
    for name in ("ranks", "accumulated", "both, in parts"):
        assert [[row[key] for key in keys] for row in rows[name]] == [pytest.approx(row, rel=2e-4) for row in expected], name
    without, balanced = rows["unbalanced"][0]["loss"], rows["one"][0]
    assert balanced["loss"] == pytest.approx(without + 5 * balanced["loss/router_balance"], rel=2e-4)
    assert "loss/router_balance" not in rows["unbalanced"][0] and rows["unbalanced"][0]["router/load/000"] == pytest.approx(expected[0][2])
    assert rows["unbalanced"][-1]["router/load/000"] != pytest.approx(expected[-1][2], rel=1e-3), "it matters"
