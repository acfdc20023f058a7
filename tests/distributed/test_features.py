"""The feature cache, for every family: with it scores, losses and gradients are those of the tower, which never runs again."""

# ruff: noqa: F401, F811  (fixtures of other tests)
from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ONE, losses, read_json, run_plans, run_trainings, selected, write_json
from PIL import Image
from safetensors.torch import load_file, save_file
from test_families import configured, linear
from test_families import groups as small_groups
from test_family_training import arguments, manifest, models

from cfvlm_ds.batching.batch import blinded
from cfvlm_ds.batching.collator import Collator, load_collator
from cfvlm_ds.batching.image_source import CachedFeatures
from cfvlm_ds.batching.precompute_features import precompute_features
from cfvlm_ds.core.config import LoraConfig, ModelConfig, ModuleConfig
from cfvlm_ds.core.distributed import World
from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.parsing import parse_config
from cfvlm_ds.data.features import Features, read_features, write_features
from cfvlm_ds.demo.family_checkpoints import SMALL, write_small
from cfvlm_ds.models import Scorer, family_of, load_model
from cfvlm_ds.objectives import OBJECTIVES

EVALUATED = ("llava", "llava_onevision")
ON_RANKS = {1: tuple(SMALL), 2: (*EVALUATED, "qwen2_5_vl", "qwen3_vl")}  # families that train on so many
FEW = ((1, "qwen3_vl_moe"), (2, "llava"))
UNLIKE = ("llava", "qwen2_5_vl", "qwen3_vl_moe", "internvl")  # one token number, windows, features for several layers and experts, tiles
TRAINED = [
    pytest.param((ranks, family), marks=() if (ranks, family) in FEW else pytest.mark.long)
    for ranks in ON_RANKS
    for family in ON_RANKS[ranks]
]


class Engine:
    """A Scorer with what the pass asks of DeepSpeed's engine; counts the runs of its tower."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        loaded = load_model(replace(model, vision_tower=ModuleConfig("frozen")), dtype)
        self.module = Scorer(loaded, family_of(loaded.config))
        self.tower_runs = 0
        self.module.model.get_submodule(self.module.family.vision_tower[0]).register_forward_hook(self._count)

    def _count(self, *arguments: Any) -> None:
        self.tower_runs += 1

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)


@pytest.fixture(scope="module")
def groups(small_groups, tmp_path_factory):
    """Those of the families' tests, and a picture of several windows (Qwen2.5-VL) in both directions."""
    path = tmp_path_factory.mktemp("large") / "large.png"
    noise = np.random.default_rng(0).integers(0, 256, (120, 150, 1), np.uint8)
    Image.fromarray(noise.repeat(3, axis=2)).save(path)
    return [replace(small_groups[-1], id="large", images=((path,),)), *small_groups]


@pytest.fixture(scope="module", params=[pytest.param(name, marks=() if name in UNLIKE else pytest.mark.long) for name in SMALL])
def folder(request, tmp_path_factory):
    return write_small(request.param, tmp_path_factory.mktemp("families") / request.param)


def filled(where: Path, model: ModelConfig, engine: Engine, groups: list[CounterfactualGroup]) -> Collator:
    collator, numbers = load_collator(model), torch.get_rng_state()
    collator = collator.taking_features(precompute_features(where, model, engine, collator.files, groups, ONE, 0))
    assert torch.equal(torch.get_rng_state(), numbers), "dropout has the numbers that it has without a cache"
    return collator


def test_scores_and_gradients_are_those_of_the_tower(folder, groups, tmp_path):
    """Sizes, tiles, several pictures in a prompt and text alone mixed in a batch; in one row and in parts; relative 1e-5.

    In float64, because gradients of a decay (Qwen3.5) are small sums of large terms; experts have no float64 product.
    """
    model = configured(folder)
    engine, plain = Engine(model, torch.float32 if "moe" in folder.name else torch.float64), load_collator(model)
    cached = filled(tmp_path, model, engine, groups)
    passed = engine.tower_runs
    found = []
    for collator in (plain, cached):
        before = engine.tower_runs
        whole = collator(groups)
        parts = collator.parts(groups, whole.num_tokens // 3)
        assert len(parts) > 1
        logp = sum(part.scores(engine(**part.model_inputs)).logp for part in parts)
        scores = whole.scores(engine(**whole.model_inputs))
        torch.testing.assert_close(logp, scores.logp, rtol=1e-5, atol=1e-5)
        weights = torch.randn(scores.logp.shape, generator=torch.Generator().manual_seed(0))
        trained = {name: p for name, p in engine.module.model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad((weights * scores.logp).sum(), list(trained.values()))
        found.append((scores.logp.detach(), dict(zip(trained, grads, strict=True)), engine.tower_runs - before, whole))
    (logp, grads, runs, whole), (own_logp, own_grads, own_runs, own) = found
    assert runs > 0 and own_runs == 0 and passed == len(cached.files.all_keys(groups)), "each picture once, and then never"
    torch.testing.assert_close(own_logp, logp, rtol=1e-5, atol=1e-5)
    projector = [name for name in grads if engine.module.family.module_of(name) == "projector"]
    assert projector and all(grads[name].any() for name in projector)
    for name, grad in grads.items():
        assert (own_grads[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-7, name
    for name in ("input_ids", "position_ids", "images_of_tree", "visual_tokens"):
        assert str(own.model_inputs[name]) == str(whole.model_inputs[name]), name


def test_adapters_of_the_projector_drop_out_alike(folder, groups, tmp_path):
    """From the same random numbers, where the second factor of an adapter is not zero; fp32, relative 1e-5. Dropout draws along memory: a
    tower whose output lies there in another order has other numbers, as docs/families.md says."""
    model = configured(folder, projector=ModuleConfig("lora"), lora=LoraConfig(rank=2, dropout=0.5))
    if "projector" not in linear(Engine(configured(folder)).module):
        with pytest.raises(ConfigError, match=r"the projector of model type .* has no linear layer for an adapter"):
            Engine(model)
        return
    engine, found = Engine(model), []
    with torch.no_grad():
        for name, parameter in engine.module.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
        for seed, collator in ((0, load_collator(model)), (0, filled(tmp_path, model, engine, groups)), (1, None)):
            batch = (collator or load_collator(model))(groups)
            torch.manual_seed(seed)
            engine.module.train()
            found.append(engine(**batch.model_inputs))
    apart, by_seed = ((other - found[0]).abs().max() for other in found[1:])
    assert apart > 1e-3 if folder.name == "llava_onevision" else apart < 1e-5
    assert by_seed > 1e-3, "dropout matters"


def test_the_blank_control_is_that_of_the_tower(folder, groups, tmp_path):
    model = configured(folder)
    engine, plain = Engine(model), load_collator(model)
    blind = [blinded(group) for group in groups]
    with torch.no_grad():
        first, second = (
            (batch := collator(blind)).scores(engine(**batch.model_inputs)).logp
            for collator in (plain, filled(tmp_path, model, engine, groups))
        )
    torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-5)


def test_a_second_run_does_not_run_the_tower_and_bfloat16_stays_apart(folder, groups, tmp_path):
    """In bfloat16 scores with and without are equal bit for bit; a Pixtral tower has all pictures in one row and rounds with it: 0.05."""
    model, engine = configured(folder), Engine(configured(folder))
    filled(tmp_path / "cache", model, engine, groups)
    again = Engine(model)
    filled(tmp_path / "cache", model, again, groups)
    assert engine.tower_runs > 0 and again.tower_runs == 0
    narrow = Engine(model, torch.bfloat16)
    batch = filled(tmp_path / "cache", model, narrow, groups)(groups[1:2])
    assert narrow.tower_runs == engine.tower_runs
    assert {tensor.dtype for tensor in batch.model_inputs["image_inputs"]["tower_features"].values()} == {torch.bfloat16}
    own, tower = (narrow(**inputs) for inputs in (batch.model_inputs, load_collator(model)(groups[1:2]).model_inputs))
    assert torch.equal(own, tower) or (folder.name == "mistral3" and (own - tower).abs().max() < 0.05)


@pytest.fixture(scope="module")
def trained(models, manifest, tmp_path_factory, request):
    """(family, "tower" or "cache", ranks) -> run folder. Two families also evaluate, and have workers."""
    out = tmp_path_factory.mktemp("runs")
    found, chosen = {}, selected(request, "on")
    for ranks in (1, 2):
        runs = []
        for family in (family for of, family in chosen if of == ranks):
            for kind in ("tower", "cache"):
                found[family, kind, ranks] = folder = out / f"{family}-{kind}-{ranks}"
                cache = ["--data.feature_cache", str(out / f"features-{family}-{ranks}")] * (kind == "cache")
                few = ["--model.vision_tower.tuning=frozen", "--train.max_steps=3", "--train.export=false"]
                few += ["--data.evaluation", json.dumps({"test": str(manifest["test"])} if family in EVALUATED else {})]
                few += [f"--data.num_workers={int(family in EVALUATED)}"]
                runs.append([*arguments(models[family], manifest, folder, "full", ranks), *few, *cache])
        run_trainings(ranks, *runs, timeout=900, by="gather_counter:train_all")
    return found


@pytest.mark.parametrize("on", TRAINED, ids="{0[1]}-{0[0]}".format)
def test_a_training_has_the_losses_of_the_tower(on, trained):
    """ZeRO-3, projector and language model trained, a rank without an image at some step, evaluation included; fp32, relative 1e-6."""
    ranks, family = on
    tower, cache = trained[family, "tower", ranks], trained[family, "cache", ranks]
    assert losses(cache) == pytest.approx(losses(tower), rel=1e-6)
    assert len(set(losses(cache))) == 3
    for split, rows in read_json(tower / "results.json").items():
        own = read_json(cache / "results.json")[split]
        assert [row["metrics"] for row in own] == [pytest.approx(row["metrics"], rel=1e-5) for row in rows]


@pytest.mark.parametrize("on", TRAINED, ids="{0[1]}-{0[0]}".format)
def test_no_step_runs_or_gathers_the_tower(on, trained):
    ranks, family = on
    before, after = read_json(trained[family, "cache", ranks] / "watched.json").values()
    assert before["runs"] > 0 and len(before) > 3 and after == {}
    without = read_json(trained[family, "tower", ranks] / "watched.json")["before"]
    assert without["runs"] > 0 and without.keys() == before.keys(), "the same weights, seen by the same means"


@pytest.fixture(scope="module")
def next_dir(tmp_path_factory):
    return write_small("llava_next", tmp_path_factory.mktemp("next") / "llava_next")


def edited(folder: Path, source: Path, file: str, change: Any) -> Path:
    """A copy of the model with one file changed."""
    shutil.copytree(source, folder)
    if file.endswith(".json"):
        values = read_json(folder / file)
        change(values)
        write_json(folder / file, values)
    else:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, {"format": "pt"})
    return folder


def place(where: Path, model: ModelConfig, groups: list[CounterfactualGroup], **options: Any) -> Path:
    """Where the features of the groups are."""
    collator = filled(where, model, Engine(model, **options), groups)
    assert isinstance(collator.images, CachedFeatures)
    return collator.images.cache.place


def test_what_changes_features_changes_their_names(next_dir, groups, tmp_path):
    """One weight, the processor, a limit and the dtype; not the folder."""

    def one_weight(part: str) -> Any:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            name = next(name for name in tensors if part in name)
            tensors[name].view(-1)[-1] += 1e-3

        return change

    tower = edited(tmp_path / "tower", next_dir, "model.safetensors", one_weight("vision_tower"))
    copy = edited(tmp_path / "copy", next_dir, "model.safetensors", lambda tensors: None)
    mean = edited(tmp_path / "mean", next_dir, "processor_config.json", lambda v: v["image_processor"].update(image_mean=[0.4, 0.4, 0.4]))
    cache, few = tmp_path / "cache", groups[:1]
    same = [place(cache, configured(folder), few) for folder in (next_dir, copy)]
    assert len(set(same)) == 1
    different = [place(cache, model, few) for model in (configured(tower), configured(mean), configured(next_dir, max_tiles=2))]
    different.append(place(cache, configured(next_dir), few, dtype=torch.bfloat16))
    assert len({*same, *different}) == 5


def test_a_picture_is_known_by_its_bytes(next_dir, groups, tmp_path):
    """A copy under another name costs nothing; other bytes under the same name are another picture."""
    model, engine = configured(next_dir), Engine(configured(next_dir))
    group = groups[-1]
    copy = Path(shutil.copy(group.images[0][0], tmp_path / "copy.png"))
    filled(tmp_path / "cache", model, engine, [group])
    runs, moved = engine.tower_runs, replace(group, images=((copy,),))
    filled(tmp_path / "cache", model, engine, [moved])
    assert runs == 2 and engine.tower_runs == 2, "blank and the picture"
    Image.new("RGB", Image.open(copy).size, "red").save(copy)
    batch = filled(tmp_path / "cache", model, engine, [moved])([moved])
    assert engine.tower_runs == 3
    with torch.no_grad():
        assert torch.equal(engine(**batch.model_inputs), engine(**load_collator(model)([moved]).model_inputs))


@pytest.mark.parametrize("damage", ["cut short", "another byte", "gone"])
def test_a_damaged_file(damage, next_dir, groups, tmp_path):
    """Where it is read, one sentence names it and says to remove it; a fill computes what is gone."""
    model, engine, group = configured(next_dir), Engine(configured(next_dir)), groups[-1]
    collator = filled(tmp_path, model, engine, [group])
    whole = collator([group]).model_inputs
    assert isinstance(collator.images, CachedFeatures)
    cache = collator.images.cache
    file = cache.file(cache.known[collator.files.all_keys([group])[-1]])
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content if damage == "another byte" else content[:-1])
    if damage == "gone":
        file.unlink()
    with pytest.raises(DataError, match=rf"^{file}: features cannot be read \(.+\); remove the file and start the run again, with a"):
        collator([group])
    file.unlink(missing_ok=True)
    before = engine.tower_runs
    again = filled(tmp_path, model, engine, [group])([group]).model_inputs
    assert engine.tower_runs == before + 1 and torch.equal(engine(**again), engine(**whole))
    assert not [path for path in tmp_path.rglob("*.*") if path.suffix != ".safetensors"]


def test_a_file_is_whole_whoever_else_writes_it(tmp_path):
    """Runs may fill one folder at the same time."""
    file = tmp_path / "ab" / "picture.safetensors"
    features = Features((3, 2), [7], {"projector": torch.arange(2e4)}, {"grid": torch.tensor([[1, 2, 2]])})
    write_features(file, features)

    def work(writes: bool) -> None:
        for _ in range(20):
            if writes:
                write_features(file, features)
            else:
                assert torch.equal(read_features(file).tower["projector"], features.tower["projector"])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [True, False] * 4))
    assert list(tmp_path.rglob("*.*")) == [file]


def test_a_picture_that_cannot_be_read_is_an_error_where_it_is_used(next_dir, groups, tmp_path):
    """So data.on_error decides on it as without the cache."""
    broken, gone = tmp_path / "broken.png", tmp_path / "gone.png"
    broken.write_bytes(Path(groups[0].images[0][0]).read_bytes()[:200])
    bad = [replace(groups[-1], id=path.stem, images=((path,),)) for path in (broken, gone)]
    collator = filled(tmp_path / "cache", configured(next_dir), Engine(configured(next_dir)), [*bad, groups[-1]])
    kept, dropped = collator.readable([*bad, groups[-1]])
    assert [group.id for group in kept] == [groups[-1].id]
    assert "truncated or corrupt" in dropped[0][1] and "gone.png: image cannot be read (No such file" in dropped[1][1]


def test_a_rank_without_room_ends_all_in_one_sentence(models, manifest, tmp_path):
    options = [*arguments(models["llava"], manifest, tmp_path / "run", "full", 2), "--model.vision_tower.tuning=frozen"]
    options += ["--data.feature_cache", str(tmp_path / "features")]
    (said,) = run_plans(2, [(["no room"], options)])
    assert len(re.findall(r"rank \d raised \w+: data\.feature_cache: .*File too large", said)) == 2
