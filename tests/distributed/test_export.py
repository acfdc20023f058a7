"""Exports of real ZeRO checkpoints of three ranks: every name, file, shape, dtype and value, whatever the stage, the source's form and the
frozen module; refusals; and memory that does not grow with the model. The command and a run's own export are in test_cli."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ONE, contents, environment, read_json, run_ranks, tensors, write_json
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cfvlm_ds.checkpoint import TrainState, save
from cfvlm_ds.core.distributed import World
from cfvlm_ds.core.errors import ConfigError, InputError, StorageError
from cfvlm_ds.core.parsing import parse_config
from cfvlm_ds.export import export_hf
from cfvlm_ds.export.zero import ZeroWeights
from cfvlm_ds.objectives import OBJECTIVES
from cfvlm_ds.training.results import refuse_export
from cfvlm_ds.training.run import locked

RANKS = 3  # most weights are no multiple of it, so that every kind of padding occurs
TOWER = "model.vision_tower"
BF16 = ("z3 frozen", "z1 frozen", "moe z2")
NORM = "language_model.model.norm.weight"

FACTOR = 1.001


def start(name: str, shape: Any) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def value(name: str, shape: Any, bf16: bool = False) -> torch.Tensor:
    """What the checkpoint's fp32 weight of this name holds; a bf16 run has started from rounded values."""
    return (start(name, shape).bfloat16().float() if bf16 else start(name, shape)) * FACTOR


class Wrapper(torch.nn.Module):
    """Names as in Scorer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model


def write(out: str, jobs: list[tuple[str, str, int, str | None]]) -> None:
    """A rank: it starts from known values, scales the float32 copies that DeepSpeed trains by a factor no bfloat16 has, and saves."""
    import deepspeed
    from transformers import AutoModelForImageTextToText

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name, source, stage, frozen in jobs:
        bf16 = name in BF16
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.bfloat16 if bf16 else torch.float32)
        groups: list[dict[str, list[Any]]] = [{"params": []}, {"params": []}]
        for weight, p in model.named_parameters():
            p.requires_grad_(not frozen or not weight.startswith(frozen))
            if p.requires_grad:
                p.data.copy_(start(weight, p.shape))
                groups[p.dim() > 1]["params"].append(p)
        zero = {"stage": stage, "sub_group_size": 5000, "stage3_param_persistence_threshold": 0, "round_robin_gradients": stage == 2}
        config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": bf16}, "zero_optimization": zero}
        engine, *_ = deepspeed.initialize(model=Wrapper(model), model_parameters=groups, optimizer=torch.optim.AdamW(groups), config=config)
        optimizer = engine.optimizer
        for flat in optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups:
            flat.data.mul_(FACTOR)
        save(engine, TrainState(step=1), Path(out) / name, World(rank, ranks, torch.device("cpu")), 0)
        engine.destroy()


# --- sources and checkpoints ----------------------------------------------------------------------------------------------------------


def build(config: Any, folder: Path) -> Path:
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return folder


def llava(folder: Path, text: Any) -> Path:
    from transformers import CLIPVisionConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=24, patch_size=12
    )
    return build(LlavaConfig(vision_config=vision, text_config=text), folder)


def qwen3_vl_moe(folder: Path) -> Path:
    """Tied embeddings, and experts as the published checkpoints have them: turned against the model's."""
    from transformers import Qwen3VLMoeConfig

    text = {"vocab_size": 41, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 12, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_experts": 3, "num_experts_per_tok": 2}
    text |= {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    vision = {"hidden_size": 16, "intermediate_size": 24, "depth": 1, "num_heads": 2, "patch_size": 4, "out_hidden_size": 16}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    build(Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=True), folder)
    stored = load_file(folder / "model.safetensors")
    turned = {name: t.transpose(1, 2).contiguous() if ".experts." in name else t for name, t in stored.items()}
    save_file(turned, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def sources(model_dir, tmp_path_factory):
    """``llava``, and the same in other forms; ``mixtral``, whose experts are stored apart; ``moe``; ``wide``, of 180 MB."""
    from transformers import LlamaConfig, MixtralConfig

    out = tmp_path_factory.mktemp("sources")
    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    wide = {"vocab_size": 16001, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 1, "num_attention_heads": 8}
    found = {
        "llava": model_dir,
        "mixtral": llava(out / "mixtral", MixtralConfig(vocab_size=41, num_hidden_layers=2, num_local_experts=3, **small)),
        "moe": qwen3_vl_moe(out / "moe"),
        "wide": llava(out / "wide", LlamaConfig(**wide)),
    }
    stored = tensors(model_dir)

    sharded = out / "sharded"  # bfloat16 but for one weight, neighbours in different files, and a tensor no model has a place for
    shutil.copytree(model_dir, sharded, ignore=shutil.ignore_patterns("*.safetensors"))
    placed = defaultdict(dict)
    for index, (name, tensor) in enumerate(sorted(stored.items())):
        placed[f"model-{index % 3 + 1:05d}-of-00003.safetensors"][name] = tensor if name == NORM else tensor.bfloat16()
    placed["model-00002-of-00003.safetensors"]["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(7)
    for file, held in placed.items():
        save_file(held, sharded / file, {"format": "pt"})
    weight_map = {name: file for file, held in placed.items() for name in held}
    write_json(sharded / "model.safetensors.index.json", {"metadata": {"total_parameters": 5}, "weight_map": weight_map})
    for left in ("optimizer.pt", "training_args.bin", "trainer_state.json", "pytorch_model.bin.index.json"):
        (sharded / left).write_text("{}")
    found["sharded"] = sharded

    found["bin"] = out / "bin"
    shutil.copytree(model_dir, found["bin"], ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(stored, found["bin"] / "pytorch_model.bin")

    found["both"] = out / "both"  # tied, and stored under both names
    shutil.copytree(found["moe"], found["both"])
    stored = load_file(found["moe"] / "model.safetensors")
    head = {"lm_head.weight": stored["model.language_model.embed_tokens.weight"].clone()}
    save_file(stored | head, found["both"] / "model.safetensors", {"format": "pt"})
    return found


@pytest.fixture(scope="module")
def checkpoints(sources, tmp_path_factory):
    out = tmp_path_factory.mktemp("zero")
    plan = [  # name, source, stage, what is frozen
        ("z3", "llava", 3, None),
        ("z2", "llava", 2, None),
        ("z3 frozen", "llava", 3, TOWER),
        ("z2 frozen", "llava", 2, TOWER),
        ("z1 frozen", "llava", 1, TOWER),
        ("moe", "moe", 3, None),
        ("moe z2", "moe", 2, None),
        ("mixtral", "mixtral", 3, None),
        ("wide", "wide", 3, None),
    ]
    jobs = [(name, str(sources[source]), stage, frozen) for name, source, stage, frozen in plan]
    ended = run_ranks(RANKS, "test_export:write", str(out), jobs, timeout=180)
    assert [code for code, _ in ended] == [0] * RANKS, ended
    return {name: out / name / "checkpoint-1" for name, *_ in plan}


Export = Callable[..., Path]


@pytest.fixture
def export(checkpoints, sources, tmp_path):
    """Export a checkpoint and a source, by their names or folders."""

    def export(checkpoint, source, *said, out=tmp_path / "out", **more):
        return export_hf(checkpoints.get(checkpoint, checkpoint), str(sources.get(source, source)), out, *said, **more)

    return export


def headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118  (not a dict)
                part = handle.get_slice(name)
                found[name] = (file.name, tuple(part.get_shape()), part.get_dtype())
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What transformers computes with, in float32, each tied weight once."""
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_trained(folder: Path) -> None:
    assert all(torch.equal(tensor, value(name, tensor.shape)) for name, tensor in weights(folder).items())


# --- what is written ------------------------------------------------------------------------------------------------------------------

CASES = [("z3", "llava"), ("z2", "llava"), ("z3 frozen", "llava"), ("z2 frozen", "llava"), ("z1 frozen", "llava")]
CASES += [("z3", "sharded"), ("z2 frozen", "sharded"), ("moe", "moe"), ("moe z2", "moe"), ("moe", "both"), ("mixtral", "mixtral")]


@pytest.mark.parametrize(("checkpoint", "source"), CASES)
def test_every_tensor(checkpoint, source, export, sources):
    said = []
    alive = []
    out = export(checkpoint, source, said.append, alive=lambda: alive.append(1))
    stored = headers(sources[source])
    assert headers(out) == stored, "names, files, shapes, dtypes"
    assert len(alive) >= len(stored), "a sign of life for each"
    bf16, before = checkpoint in BF16, weights(sources[source])
    for name, tensor in weights(out).items():
        if "frozen" in checkpoint and name.startswith(TOWER):
            expected = before[name].bfloat16() if bf16 else before[name]  # a bf16 run holds no more of what it does not train
        else:
            expected = value(name, tensor.shape, bf16)
        if source == "sharded" and not name.endswith("language_model.norm.weight"):
            expected = expected.bfloat16()
        assert torch.equal(tensor, expected.float()), name
    assert [EXTRA in line for line in said] == [True] * (source == "sharded"), "what the checkpoint does not hold"
    if source == "both":  # of a tied weight's names each has its value
        held, expected = tensors(out), value("model.language_model.embed_tokens.weight", (41, 16))
        assert all(torch.equal(held[name], expected) for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"))


EXTRA = "vision_tower.vision_model.embeddings.position_ids"


def test_index_and_the_source_s_other_files(export, sources):
    source = sources["sharded"]
    out = export("z3", source)
    index = read_json(out / "model.safetensors.index.json")
    assert index["weight_map"] == read_json(source / "model.safetensors.index.json")["weight_map"]
    sizes = {"BF16": 2, "F32": 4, "I64": 8}
    total = sum(sizes[dtype] * torch.Size(shape).numel() for _, shape, dtype in headers(source).values())
    assert index["metadata"] == {"total_parameters": 5, "total_size": total}
    assert torch.equal(load_file(out / "model-00002-of-00003.safetensors")[EXTRA], torch.arange(7))
    left = {"optimizer.pt", "training_args.bin", "trainer_state.json", "pytorch_model.bin.index.json", "README.md"}
    assert {path.name for path in out.iterdir()} == {path.name for path in source.iterdir()} - left
    for path in source.glob("*"):
        if path.name not in left and path.suffix != ".safetensors" and "index" not in path.name:
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_source_without_safetensors_gets_the_library_s_own_names(export, sources):
    out = export("z3", "bin")
    assert headers(out) == headers(sources["llava"]), "which the library saved"
    assert not list(out.glob("*.bin"))
    assert_trained(out)


def edited(checkpoint: Path, folder: Path, pattern: str, change: Any) -> Path:
    """A copy of a checkpoint whose files of this pattern are changed, and which is complete again."""
    shutil.copytree(checkpoint, folder / checkpoint.name)
    for file in (folder / checkpoint.name).glob(pattern):
        state = torch.load(file, weights_only=False)
        change(state)
        torch.save(state, file)
    listed = folder / checkpoint.name / "complete.json"
    description = read_json(listed)
    description["files"] = {name: ((listed.parent / name).stat().st_size, 0) for name in description["files"]}
    del description["crc32"]
    description["crc32"] = zlib.crc32(json.dumps(description, sort_keys=True).encode())
    write_json(listed, description)
    return folder / checkpoint.name


def test_a_frozen_module_that_was_not_kept_comes_from_the_source(export, checkpoints, sources, tmp_path):
    checkpoint = edited(
        checkpoints["z3 frozen"], tmp_path, "*model_states.pt", lambda s: s.update(frozen_param_shapes=None, frozen_param_fragments=None)
    )
    said = []
    exported = weights(export(checkpoint, "llava", said.append))
    before = weights(sources["llava"])
    assert all(torch.equal(exported[name], before[name]) for name in before if name.startswith(TOWER))
    assert sum(name.startswith(TOWER) for name in before) == int(said[0].split()[1]) and str(sources["llava"]) in said[0]
    with pytest.raises(ConfigError, match=r"lacks .*vision_tower.* has no safetensors to copy it from"):
        export_hf(checkpoint, str(sources["bin"]), tmp_path / "other")


# --- what is refused, and what remains then -------------------------------------------------------------------------------------------


def with_layers(source: Path, folder: Path, layers: int, **text: int) -> Path:
    """The model of ``source`` with another number of layers or width."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source)
    config.text_config.update({"num_hidden_layers": layers, **text})
    return build(config, folder)


@pytest.mark.parametrize(
    ("layers", "text", "said"),
    [
        (4, {}, r"missing, .*layers\.3\."),
        (2, {}, r"do not exist there, .*layers\.2\."),
        (3, {"intermediate_size": 40}, r"mlp\.\w+\.weight has shape"),
        (1, {}, rf"{NORM} with shape \[1\]"),
        (77, {}, rf"{NORM} with shape \[77\]"),
    ],
)
def test_a_source_that_does_not_fit(layers, text, said, export, sources, tmp_path):
    """The last two have a header that is right by itself, of a tensor with fewer or more values than its weight."""
    source = tmp_path / "source"
    if NORM in said:
        shutil.copytree(sources["llava"], source)
        save_file(tensors(source) | {NORM: torch.zeros(layers)}, source / "model.safetensors", {"format": "pt"})
    else:
        with_layers(sources["llava"], source, layers, **text)
    with pytest.raises(ConfigError, match=said if NORM in said else f"{source}.*{said}"):
        export("z3", source)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["z3", "z2"])
@pytest.mark.parametrize("pattern", ["*model_states.pt", "*optim_states.pt"])
def test_parts_of_a_checkpoint_that_are_lost_or_odd(stage, pattern, checkpoints, tmp_path):
    """Each part of what an export reads, in turn: found, or one sentence."""
    optimizer = "optim" in pattern
    lost = 0
    keys = ("partition_count", "zero_stage", "fp32_flat_groups", "single_partition_of_fp32_groups", "optimizer_state_dict")
    for number, key in enumerate(keys if optimizer else ("param_shapes", "frozen_param_shapes", "shared_params", "buffer_names", "module")):
        for odd in (None, "x", ...):

            def change(state, key=key, odd=odd):
                holder = state["optimizer_state_dict"] if optimizer and key != "optimizer_state_dict" else state
                if odd is ... or key not in holder:
                    holder.pop(key, None)
                else:
                    holder[key] = odd

            damaged = edited(checkpoints[stage], tmp_path / f"{number} {odd!r:.9}", pattern, change)
            try:
                ZeroWeights(damaged)
            except ConfigError as error:
                lost += 1
                assert str(damaged) in str(error), error
    assert lost >= 5


def test_a_checkpoint_that_is_not_what_it_says(export, checkpoints, tmp_path):
    def drop(state):
        state["param_shapes"][0].popitem()

    def foreign(state):
        state["other"] = resource.struct_rusage

    def fewer(state):
        state["optimizer_state_dict"]["partition_count"] = 4

    cases = [
        ("z3", "*model_states.pt", drop, "elements per rank, but each rank's file has"),
        ("z2", "*model_states.pt", drop, r"elements, but the files have \d+; use another"),
        ("z3", "*model_states.pt", foreign, "contains objects other than tensors"),
        ("z3", "*optim_states.pt", fewer, "was written by 4 ranks but contains 3 shards"),
    ]
    for index, (name, pattern, change, said) in enumerate(cases):
        checkpoint = edited(checkpoints[name], tmp_path / str(index), pattern, change)
        with pytest.raises(ConfigError, match=said):
            export(checkpoint, "llava")


@pytest.fixture
def older(export, tmp_path):
    """An earlier export, which must be there unchanged at the end."""
    out = export("z2 frozen", "llava")
    before = contents(tmp_path)
    yield out
    assert contents(tmp_path) == before


def test_a_full_disk_leaves_the_older_export(older, export, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"out .*File too large"):
            export("z3", "llava", out=older)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match=r"out needs 0\.0 GB"):
        export("z3", "llava", out=older)


def test_folders_that_must_not_be_replaced(export, sources, tmp_path):
    source = tmp_path / "models" / "source"
    shutil.copytree(sources["llava"], source)
    (tmp_path / "file").write_text("")
    refused = {source: "in use", tmp_path / "models": "in use", tmp_path: "in use", tmp_path / "file" / "out": "cannot be written"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    for out, said in {**refused, tmp_path / "mine": "thesis"}.items():
        with pytest.raises(InputError, match=said):
            export("z3", source, out=out)
    assert headers(source) == headers(sources["llava"]) and (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize("name", ["{outside}", "../{outside.name}", "sub/x.safetensors", "config.json", "..", ["x"]], ids=str)
def test_an_index_that_names_files_elsewhere(name, export, sources, tmp_path):
    """The file that it names is one of safetensors with the model's own tensors, which an export would otherwise rewrite."""
    source, outside = tmp_path / "source", tmp_path / "other.safetensors"
    shutil.copytree(sources["sharded"], source)
    first = source / "model-00001-of-00003.safetensors"
    (source / "sub").mkdir()
    for copy in (outside, source / "sub" / "x.safetensors"):
        shutil.copy(first, copy)
    index = read_json(source / "model.safetensors.index.json")
    name = name.format(outside=outside) if isinstance(name, str) else name
    index["weight_map"] = {key: name if file == first.name else file for key, file in index["weight_map"].items()}
    write_json(source / "model.safetensors.index.json", index)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"source/model\.safetensors\.index\.json: "):
        export("z3", source)
    assert contents(tmp_path) == before


def test_links_are_neither_copied_from_elsewhere_nor_written_through(export, sources, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.jinja").write_text("a private key")
    for kind in ("file", "folder"):
        source = tmp_path / kind
        shutil.copytree(sources["llava"], source)
        if kind == "file":
            (source / "NOTICE").symlink_to(tmp_path / "secret" / "key.jinja")
        else:
            (source / "additional_chat_templates").symlink_to(tmp_path / "secret")
        with pytest.raises(ConfigError, match=r"secret/key\.jinja"):
            export("z3", source)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text("mine")
    for name in ("out", "out.replaced.partial", "out.partial"):
        (tmp_path / name).symlink_to(mine)
        if name == "out.partial":
            export("z3", "llava")
            assert (tmp_path / "out" / "config.json").is_file() and not (tmp_path / "out").is_symlink()
        else:
            with pytest.raises(ConfigError, match=f"{name} is a link to {mine}"):
                export("z3", "llava")
            (tmp_path / name).unlink()
        assert [path.name for path in mine.iterdir()] == ["config.json"] and (mine / "config.json").read_text() == "mine"


def test_an_export_replaces_an_older_one_and_what_a_killed_one_left(export, tmp_path):
    """What somebody has kept of an older one under a name of their own is theirs."""
    for name in ("out.partial", "out.replaced.partial", "out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("stale")
    for checkpoint in ("z2 frozen", "z3"):
        export(checkpoint, "llava")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.old"] and (tmp_path / "out.old" / "config.json").exists()
    assert_trained(tmp_path / "out")


def test_the_place_of_an_export_is_refused_before_a_training(tmp_path):
    """Where it could not be put when the training is over: the run's folder is as it was."""
    for name, make, said in (
        ("others", lambda out: (out.mkdir(), (out / "thesis.pdf").touch()), "thesis"),
        ("file", lambda out: out.touch(), "folder"),
        ("link", lambda out: out.symlink_to(tmp_path), "link"),
        ("source", lambda out: (out.mkdir(), (out / "config.json").touch()), "in use"),
    ):
        (run_dir := tmp_path / name).mkdir()
        make(run_dir / "export")
        source = str(run_dir / "export") if name == "source" else str(tmp_path / "model")
        config = parse_config(["--model.name_or_path", source, f"--train.output_dir={run_dir}"], OBJECTIVES)
        before = [str(path) for path in run_dir.rglob("*")]
        refused = pytest.raises(ConfigError, match=rf"{said}.*choose another train\.output_dir")
        with refused, locked(run_dir, ONE, partial(refuse_export, config)):
            raise AssertionError
        assert [str(path) for path in run_dir.rglob("*")] == before
        refuse_export(parse_config([*ADAPTERS, f"--train.output_dir={run_dir}"], OBJECTIVES))


ADAPTERS = ["--model.name_or_path=m"]
ADAPTERS += [
    f"--model.{part}.tuning={how}" for part, how in (("vision_tower", "frozen"), ("projector", "lora"), ("language_model", "lora"))
]


# --- memory ---------------------------------------------------------------------------------------------------------------------------

MEASURE = """
import json, sys
from pathlib import Path
from cfvlm_ds.export import export_hf
def peak():
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
out, first, *wide = sys.argv[1:]
export_hf(Path(first), "org/model", Path(out) / "hub", lambda line: None)
before = peak()
export_hf(Path(wide[0]), wide[1], Path(out) / "wide", lambda line: None)
print(json.dumps(peak() - before))
"""


def test_memory_stays_far_below_the_model_and_a_hub_name_serves(checkpoints, sources, tmp_path):
    """A fresh process exports a small model by its hub name, which imports all there is, and then one of 180 MB."""
    repository = tmp_path / "cache" / "models--org--model"
    (snapshot := repository / "snapshots" / "abc").mkdir(parents=True)
    shutil.copytree(sources["llava"], repository / "blobs")
    for path in (repository / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(checkpoints["z3"]), str(checkpoints["wide"]), str(sources["wide"])]
    offline = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, env=environment() | offline, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    size, peak = (sources["wide"] / "model.safetensors").stat().st_size, int(done.stdout.split()[-1])  # DeepSpeed may print before
    assert size > 180e6 and peak < 0.6 * size, f"{peak / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"
    assert headers(tmp_path / "hub") == headers(sources["llava"]) and not any(path.is_symlink() for path in (tmp_path / "hub").iterdir())
    for name, tensor in load_file(tmp_path / "wide" / "model.safetensors").items():
        if name.startswith("language_model.model.layers.0.mlp"):
            assert torch.equal(tensor, value(name.replace("language_model.model", "model.language_model"), tensor.shape))
