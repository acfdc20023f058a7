"""Training that goes on with another number of ranks, 4 to 2 to 1 and 1 to 2, against one that was never interrupted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO, losses, metrics, read_json, run_plans, selected, train_arguments, write_json

from cfvlm_ds.checkpoint.loading import reshard
from cfvlm_ds.export.zero import ZeroWeights

STEPS, GROUPS = 6, 16
FROZEN = ["--model.vision_tower.tuning=frozen"]


@pytest.fixture(scope="module")
def runs(model_dir, manifests, tmp_path_factory, request):
    """Runs of one global batch size under ZeRO-3 (frozen tower, so many elements a sub-group that their number changes with the ranks) and
    ZeRO-2 (whose round robin orders weights by the number of ranks); and all that was said."""
    folder = tmp_path_factory.mktemp("resize")
    config = read_json(REPO / "tests/support/z3_partitioned.json")
    config["zero_optimization"]["sub_group_size"] = 20_000
    write_json(folder / "z3.json", config)

    wanted = {"z3 whole", "z3 down", *selected(request, "name")}
    wanted |= {"z2 whole"} if "z2 down" in wanted else set()

    def plan(family: int, ranks: int, plans: Mapping[str, int]) -> str:
        """The named runs with so many ranks, up to a step."""
        rows: list[tuple[list[Any], list[str]]] = []
        for name, stop in ((name, stop) for name, stop in plans.items() if name in wanted):
            stage = ["--deepspeed", "ds_configs/z2.json"] if name.startswith("z2") else ["--deepspeed", str(folder / "z3.json"), *FROZEN]
            options = [f"--train.max_steps={STEPS}", "--train.save_steps=2", "--train.save_total_limit=0", *stage]
            options += [f"--train.per_device_train_batch_size={GROUPS // ranks}"]
            fault = ["stopped", stop] if stop < STEPS else ["nothing"]
            arguments = train_arguments(model_dir, manifests, folder / name, *options)
            rows += [(["full at resize"], arguments)] * (family == 2 and name == "z3 down") + [(fault, arguments)]
        return "".join(run_plans(ranks, rows)) if rows else ""

    families = [
        plan(0, 1, {"z3 up": 2}),
        plan(1, 4, {"z3 down": 2, "z2 down": 2}),
        plan(2, 2, {"z3 whole": STEPS, "z2 whole": STEPS, "z3 down": 4, "z2 down": 4, "z3 up": STEPS}),
        plan(3, 1, {"z3 down": STEPS, "z2 down": STEPS}),
    ]
    said = "".join(families)
    raised = [line.split(" raised ")[1] for line in said.splitlines() if line.startswith("rank ") and " raised " in line]
    full = [line for line in raised if line != "Stopped: as planned"]
    down = re.escape(str(folder / "z3 down"))
    refused = rf"StorageError: {down}/checkpoint-2 cannot be resharded in {down} \(.*File too large.*\); free some space, or start 4 ranks"
    assert len(full) == 2 * ("z3 down" in wanted) and all(re.fullmatch(refused, line) for line in full), full
    return folder, said


@pytest.mark.parametrize("name", ["z3 down", *(pytest.param(name, marks=pytest.mark.long) for name in ("z2 down", "z3 up"))])
def test_the_trajectory_goes_on(name, runs):
    """Losses and gradient norms within 2e-5, final weights within 2e-5 of the largest: the order of additions differs, nothing else."""
    folder, said = runs
    whole = folder / f"{name[:2]} whole"
    assert len(losses(folder / name)) == STEPS
    recorded = [[row for row in metrics(run_dir) if "loss" in row] for run_dir in (whole, folder / name)]
    for want, have in zip(*recorded, strict=True):
        for key in ("step", "loss", "grad_norm", "learning_rate", "epoch"):
            assert have[key] == pytest.approx(want[key], rel=2e-5), (key, want["step"])
    expected, found = ZeroWeights(whole / f"checkpoint-{STEPS}"), ZeroWeights(folder / name / f"checkpoint-{STEPS}")
    assert set(expected.weights) == set(found.weights)
    for weight in expected.weights:
        torch.testing.assert_close(found.tensor(weight, torch.float32), expected.tensor(weight, torch.float32), rtol=2e-5, atol=2e-5)
    assert f"{folder / name}/checkpoint-2 was written by {1 if 'up' in name else 4} ranks; resharding it for 2" in said
    assert not list((folder / name).glob("*.partial")), "the resharded copy is gone"


def flat_sizes(shapes: Sequence[Mapping[str, torch.Size]], ranks: int) -> list[int]:
    return [sum(-(-shape.numel() // ranks) for shape in group.values()) for group in shapes]


@pytest.mark.parametrize("ranks", [1, 3, 7])
def test_every_weight_and_moment_is_there_bit_for_bit(ranks, runs, tmp_path):
    """The resharded checkpoint is read by the export's reader of ZeRO checkpoints, and so are its moments, laid where the weights lie."""
    source = runs[0] / "z3 down" / "checkpoint-2"
    shapes = torch.load(source / "zero_pp_rank_0_mp_rank_00_model_states.pt", weights_only=False)["param_shapes"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    cut.mkdir()
    for rank in range(ranks):
        reshard(source, cut, rank, ranks, shapes, flat_sizes(shapes, ranks))
    for key in (None, "exp_avg", "exp_avg_sq"):
        one, other = (ZeroWeights(moments(folder, key, whole.with_name(f"{folder.name}-{key}"))) for folder in (source, cut))
        assert set(one.weights) == set(other.weights) and len(one.trained) > 20
        for name in one.weights:
            assert torch.equal(one.tensor(name, torch.float32), other.tensor(name, torch.float32)), (name, key)


def moments(folder: Path, key: str | None, target: Path) -> Path:
    """A copy of a checkpoint's files in which the moments ``key`` stand in for the weights."""
    target.mkdir()
    for file in folder.glob("*_states.pt"):
        state = torch.load(file, weights_only=False)
        if "optimizer_state_dict" in state and key:
            zero = state["optimizer_state_dict"]
            zero["fp32_flat_groups"] = [entry[key] for _, entry in sorted(zero["optimizer_state_dict"]["state"].items())]
        torch.save(state, target / file.name)
    return target
