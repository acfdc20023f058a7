"""ZeRO at world sizes that no test machine has: torch's fake process group makes this process rank 0 of 8, 64 or 512.

DeepSpeed partitions, allocates and steps as it would there. What the other ranks would send is this rank's own, so numbers mean nothing.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO, read_json, run_ranks, write_json
from test_dry_run import PUBLISHED, RECIPES, model_of

FILES = sorted((REPO / "ds_configs").glob("*.json"))
FEW = ("llava15_7b", "qwen2_5_vl_7b_lora")
SIZES = (8, 64, 512)
GPUS_PER_NODE = 8


def cases() -> list[Any]:
    """Recipe, DeepSpeed JSON and number of ranks: every recipe with two of the four JSONs, every JSON with every number. Only ZeRO-2 takes
    4-bit weights, for it does not divide them."""
    quick = [(recipe, file, 64) for k, file in enumerate(FILES) for recipe in RECIPES if recipe.stem == FEW[k % 2]]
    places = [(i, j) for i in range(len(RECIPES)) for j in range(len(FILES)) if (i + j) % 2 == 0 or "qlora" in RECIPES[i].stem]
    every = [(RECIPES[i], FILES[j], SIZES[(i + j) // 2 % len(SIZES)]) for i, j in places]
    possible = [case for case in dict.fromkeys([*quick, *every]) if case[1].stem == "z2" or "qlora" not in case[0].stem]
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.long, id="-".join(map(named, case))) for case in possible]


def named(part: Any) -> str:
    return part.stem if isinstance(part, Path) else str(part)


def shrunk(file: Path, kernels: bool, folder: Path) -> Path:
    """The JSON with sizes for a model of 100,000 parameters, without ``kernels`` that have to be compiled, and those of GPUs."""
    made = read_json(file)
    zero = made["zero_optimization"]
    zero |= {name: max(value // 10_000, 100) for name, value in zero.items() if isinstance(value, int) and value >= 10_000}
    zero |= {name: False for name in zero if name.startswith("zero_quantized")}
    if "optimizer" in made and not kernels:
        made["optimizer"]["params"]["torch_adam"], made["zero_force_ds_cpu_optimizer"] = True, False
    write_json(folder / file.name, made)
    return folder / file.name


def rank_0(recipe: Path, file: Path, ranks: int, model: Path, folder: Path) -> None:
    """An optimizer step and another forward, by the code of a run; writes what the rank then holds, and what the dry run plans for it."""
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(GPUS_PER_NODE)}
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from cfvlm_ds import engine
    from cfvlm_ds.batching.batch import STAND_IN, MicroBatch
    from cfvlm_ds.batching.collator import load_collator
    from cfvlm_ds.core.parsing import parse_config
    from cfvlm_ds.demo.family_checkpoints import write_small
    from cfvlm_ds.models import meta_model
    from cfvlm_ds.objectives import OBJECTIVES
    from cfvlm_ds.training.dry_run import attention_without_data, model_states, working_memory
    from cfvlm_ds.training.skipped import NonfiniteSteps, SkippedGroups
    from cfvlm_ds.training.step import OptimizerStep

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    world = engine.start()
    if not model.exists():
        write_small(model.name, model)
    options = {"--model.name_or_path": model, "--deepspeed": file, "--train.output_dir": folder / "run", "--train.bf16": "true"}
    config = parse_config(["--config", str(recipe), *(str(part) for pair in options.items() for part in pair)], OBJECTIVES)
    resolved = engine.resolve(engine.read_json(config.deepspeed), config, world.size, world.device, engine.hidden_size(config), 10)
    engine.validate(config, resolved, world.size, world.device)
    running = engine.initialize(config, resolved, world, 10)
    copied = [getattr(each, "ds_secondary_tensor", None) for each in running.module.parameters()]  # until the weights change
    collator = load_collator(config.model, config.data.max_pixels)
    micro_batch = MicroBatch((collator.scoring_everything()([STAND_IN]),))
    kept = SkippedGroups(config.data, folder / "run", {}, world), NonfiniteSteps(config.train, folder / "run", world)
    running.train()
    step = OptimizerStep(config, world, running, collator, *kept, lambda *_: None)
    measured = step.take(1, iter([micro_batch] * config.train.gradient_accumulation_steps), 0.0, torch.zeros(2), False).measured
    running(**micro_batch.forwards[0].model_inputs)
    plan = meta_model(config.model, torch.bfloat16, attention_without_data())
    found = held(running) | {
        "copies": [0 if each is None else each.numel() for each in copied],
        "steps": running.global_steps,
        "losses": [each.loss.item() for each in measured],
        "planned": model_states(plan, resolved.config, ranks, GPUS_PER_NODE),
        "planned buckets": working_memory(plan, resolved.config, 64, True)["gradient buckets"],
        "gathered": 4 * max(sum(each.numel() for each in module.parameters(recurse=False)) for module in plan.modules()),
    }
    write_json(folder / "held.json", found)


def held(running: Any) -> dict[str, Any]:
    """Every parameter's [optimizer group or None, size, this rank's part], and bytes by purpose."""
    optimizer, inner = running.optimizer, running.optimizer.optimizer
    divided = hasattr(optimizer, "fp32_partitioned_groups_flat")
    group = {id(each): k for k, group in enumerate([] if divided else optimizer.bit16_groups) for each in group}
    parameters = [
        [
            group.get(id(each), 0) if each.requires_grad else None,
            getattr(each, "ds_numel", each.numel()),
            getattr(each, "ds_tensor", each).numel(),
        ]
        for each in running.module.parameters()
    ]
    master = optimizer.fp32_partitioned_groups_flat if divided else optimizer.single_partition_of_fp32_groups
    if not divided:
        optimizer.setup_buckets()  # which it does in a backward, and drops at its end
    buffers = [
        part for each in optimizer.ipg_buckets.values() for part in (each.buffer if isinstance(each.buffer, list) else [each.buffer])
    ]
    return {
        "parameters": parameters,
        "master": sum(each.nbytes for each in master),
        "moments": sum(
            value.nbytes for state in inner.state.values() for value in state.values() if torch.is_tensor(value) and value.dim()
        ),
        "sums of gradients": optimizer.grad_partitions_flat_buffer.nbytes if divided else sum(each.nbytes for each in master),
        "buckets": [each.nbytes for each in buffers],
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize(("recipe", "file", "ranks"), cases())
def test_a_rank_trains_and_holds_its_part(recipe, file, ranks, models, tmp_path, request):
    """ZeRO-3 cuts each parameter into equal parts, rounded up; ZeRO-2 each group of the optimizer, at even numbers. The dry run plans
    what is held, without the rounding."""
    made = shrunk(file, request.node.get_closest_marker("long") is not None, tmp_path)
    model = models / PUBLISHED[model_of(recipe)][0]["model_type"]
    ((code, output),) = run_ranks(1, "test_world_sizes:rank_0", recipe, made, ranks, model, tmp_path)
    assert not code, output[-6000:]
    found, zero = read_json(tmp_path / "held.json"), read_json(made)["zero_optimization"]
    assert found["steps"] == 1 and found["losses"] and all(map(math.isfinite, found["losses"]))

    parameters, node = found["parameters"], zero.get("zero_hpz_partition_size", 1)
    trained: dict[int, int] = {}
    for (group, whole, own), copy in zip(parameters, found["copies"], strict=True):
        part = math.ceil(whole / ranks)
        assert own == (part if zero["stage"] == 3 else whole) and copy == (part * ranks // min(node, ranks) if node > 1 else 0)
        if group is not None:
            trained[group] = trained.get(group, 0) + (part if zero["stage"] == 3 else whole)
    parts = sum(trained.values()) if zero["stage"] == 3 else sum(2 * math.ceil(size / (2 * ranks)) for size in trained.values())
    assert [found[name] for name in ("master", "moments", "sums of gradients")] == [4 * parts, 8 * parts, 4 * parts]
    assert found["buckets"] == [2 * zero["reduce_bucket_size"]] * (1 if zero["stage"] == 3 else 2)
    assert sum(found["buckets"]) == found["planned buckets"]

    card, host = found["planned"]
    weights = 2 * (sum(own for _, _, own in parameters) + sum(found["copies"]))
    if "offload_param" in zero and zero["offload_param"]["device"] == "cpu":
        padding = GPUS_PER_NODE * 22 * len(parameters)  # less than an element of each parameter and rank, which the plan does not count
        assert card == found["gathered"] and -padding < host - GPUS_PER_NODE * (weights + 20 * parts) < 0.5 * host
    elif "qlora" not in recipe.stem:  # whose frozen weights are packed
        rounding = (18 + 2 * ranks // node * (node > 1)) * len(parameters)
        rounding += 2 * sum(trained.values()) // ranks if zero["stage"] == 2 else 0  # half-precision gradients, which the buckets hold
        assert abs(weights + 16 * parts - (card - (found["gathered"] if zero["stage"] == 3 else 0))) <= rounding
