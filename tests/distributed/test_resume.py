"""Real runs that go on, with dropout and with changed options, and what is left of a run folder whose start was refused."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import losses, metrics, read_rows, run_plans, selected, train_arguments, write_manifest

TUNED = [part for module in ("vision_tower", "projector") for part in (f"--model.{module}.tuning", "frozen")]
TUNED += ["--model.language_model.tuning=lora", "--model.lora.dropout=0.3"]
OFTEN = ["--train.max_steps=4", "--train.save_steps=1", "--train.save_total_limit=0", "--train.per_device_train_batch_size=8"]
STAGES = {"z3": [], "z2": ["--deepspeed", "ds_configs/z2.json"]}
NEW = {
    "learning_rate": 0.02, "weight_decay": 0.25, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-5, "max_grad_norm": 0.01,
    "lr_scheduler_type": "linear", "warmup_ratio": 0.0,
}  # fmt: skip


def new_options() -> list[str]:
    return [part for name, value in NEW.items() for part in (f"--train.{name}", str(value))]


@pytest.fixture(scope="module")
def trained(model_dir, manifests, tmp_path_factory, request):
    """Two ranks: runs that were interrupted after their second step, or not; then starts that are refused. What each start said."""
    folder = tmp_path_factory.mktemp("resume")
    plans: dict[str, tuple[list[Any], list[str]]] = {}

    def plan(start: str, name: str, fault: list[Any], *extra: str) -> None:
        plans[start] = fault, train_arguments(model_dir, manifests, folder / name, *TUNED, *OFTEN, *extra)

    for stage in dict.fromkeys(["z3", *selected(request, "stage")]):
        given = STAGES[stage]
        plan(f"{stage} whole", f"{stage} whole", ["nothing"], *given)
        plan(f"{stage} first", f"{stage} broken", ["stopped", 2], *given)
        plan(f"{stage} allowed", f"{stage} allowed", ["branched", str(folder / f"{stage} broken")], *given, *new_options(),
             "--train.resume_changes=allow")  # fmt: skip
        plan(f"{stage} second", f"{stage} broken", ["nothing"], *given)
    tracked = ["--tracking.enabled=true", "--train.max_steps=2"]
    plan("tracked", "tracked", ["nothing"], *tracked)
    (folder / "other").mkdir()
    other = write_manifest(folder / "other" / "train.jsonl", 48, seed=9)
    refusals: dict[str, list[str]] = {
        "learning rate": ["--train.learning_rate=0.001", "--train.max_steps=4"],
        "finished": ["--train.weight_decay=0.5"],
        "rank": ["--model.lora.rank=4", "--train.max_steps=4", "--train.resume_changes=allow"],
        "full": ["--model.language_model.tuning=full", "--train.max_steps=4"],
        "stage": [*STAGES["z2"], "--train.max_steps=4"],
        "data": [f"--data.train={other}", "--train.max_steps=4", "--train.resume_changes=allow"],
        "never": ["--train.resume=never"],
        "named": ["--train.resume", str(folder / "tracked" / "checkpoint-9")],
        "late": ["--train.max_steps=4", "--train.resume_changes=allow"],
    }
    for name, extra in refusals.items():
        plan(name, "tracked", ["unchanged", str(folder / "tracked"), name == "late"], *tracked, *extra)
    said = run_plans(2, plans.values())
    return folder, {start: text.splitlines() for start, text in zip(plans, said, strict=True)}


@pytest.mark.parametrize("stage", ["z3", pytest.param("z2", marks=pytest.mark.long)])
def test_a_run_with_dropout_goes_on_bit_for_bit(stage, trained):
    """Two ranks, whose random numbers part at the first forward, since their rows have other sizes."""
    folder, said = trained
    assert any("resumed from" in line for line in said[f"{stage} second"]), said[f"{stage} second"]
    assert losses(folder / f"{stage} broken") == losses(folder / f"{stage} whole") and len(losses(folder / f"{stage} whole")) == 4


def shards(checkpoint: Path, rank: int) -> tuple[list[torch.Tensor], list[dict[str, Any]], dict[str, Any]]:
    """A rank's weights in float32 and AdamW's state of them, and the options that the file holds, as DeepSpeed has written them."""
    (file,) = [path for path in checkpoint.glob(f"*zero_pp_rank_{rank}_*optim_states.pt")]
    state = torch.load(file, weights_only=False)["optimizer_state_dict"]
    base = state.get("base_optimizer_state") or state["optimizer_state_dict"]
    weights = state["fp32_flat_groups"] if "fp32_flat_groups" in state else state["single_partition_of_fp32_groups"]
    return weights, [entry for _, entry in sorted(base["state"].items())], base["param_groups"][0]


@pytest.mark.parametrize("stage", ["z3", pytest.param("z2", marks=pytest.mark.long)])
def test_changed_options_of_the_optimizer_apply_to_the_first_step(stage, trained):
    """AdamW by hand from one checkpoint to the next: gradient from the first moment, then second moment, clipping, decay and step."""
    folder = trained[0]
    before, after = folder / f"{stage} broken" / "checkpoint-2", folder / f"{stage} allowed" / "checkpoint-3"
    b1, b2, rate = NEW["adam_beta1"], NEW["adam_beta2"], NEW["learning_rate"] * 2 / 4  # linear to 0 in four steps, after the second
    squares = 0.0
    for rank in (0, 1):
        old, new = shards(before, rank), shards(after, rank)
        for w2, w3, s2, s3 in zip(old[0], new[0], old[1], new[1], strict=True):
            gradient = (s3["exp_avg"] - b1 * s2["exp_avg"]) / (1 - b1)
            squares += float(gradient.double().square().sum())
            torch.testing.assert_close(s3["exp_avg_sq"], b2 * s2["exp_avg_sq"] + (1 - b2) * gradient**2, rtol=1e-3, atol=1e-10)
            step = (s3["exp_avg"] / (1 - b1**3)) / ((s3["exp_avg_sq"] / (1 - b2**3)).sqrt() + NEW["adam_epsilon"])
            torch.testing.assert_close(w3.detach(), w2.detach() * (1 - rate * NEW["weight_decay"]) - rate * step, rtol=1e-4, atol=1e-6)
            assert float((w3 - w2).detach().abs().max()) > 1e-3, "something must move"
    assert squares**0.5 == pytest.approx(NEW["max_grad_norm"], rel=1e-3)
    rows = [row for row in metrics(folder / f"{stage} allowed") if "loss" in row and row["step"] > 2]
    assert [(row["step"], row["learning_rate"]) for row in rows] == [(3, pytest.approx(NEW["learning_rate"] / 4)), (4, 0.0)]
    assert rows[0]["grad_norm"] > NEW["max_grad_norm"]


def test_allowed_changes_are_kept_with_the_run(trained):
    folder, said = trained
    (line,) = read_rows(folder / "z3 allowed" / "resume_changes.jsonl")
    assert line["step"] == 2 and line["changes"].keys() == {f"train.{name}" for name in NEW}
    assert line["changes"]["train.learning_rate"] == [0.003, 0.02]
    assert "after step 2: train.lr_scheduler_type was cosine and is linear" in said["z3 allowed"]
    assert yaml.safe_load((folder / "z3 allowed" / "config.yaml").read_text())["train"]["weight_decay"] == 0.25
    assert not (folder / "z3 broken" / "resume_changes.jsonl").exists()


REFUSED = {
    "learning rate": "tracked/checkpoint-2 was trained with other options: total steps (train.max_steps, train.num_train_epochs) was 2 "
    "and is 4; train.learning_rate was 0.003 and is 0.001; restore them, choose another train.output_dir, or add "
    "--train.resume_changes allow to continue with the new options after step 2",
    "finished": "tracked was trained with other options: train.weight_decay was 0.0 and is 0.5; restore them, or choose",
    "rank": "tracked/checkpoint-2 cannot be continued with these changes: model.lora.rank was 16 and is 4; restore them, or choose",
    "full": "cannot be continued with these changes: model.language_model.tuning was lora and is full; restore",
    "stage": "cannot be continued with these changes: --deepspeed zero_optimization.stage was 3 and is 2; restore",
    "data": "tracked/checkpoint-2 was trained on other data, from which ",
    "never": "already holds checkpoint-2; use train.resume=auto",
    "named": "checkpoint-9' is not a folder; give auto, never, restart or the path of a checkpoint",
    "late": "the scores are wrong",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_start_leaves_the_run_as_it_was(name, trained):
    """Every byte of the run folder, the MLflow store in it included, but for the ranks' signs of life and the cache of the data check."""
    said = trained[1][name]
    raised = [line.partition(" raised ")[2] for line in said if line.startswith("rank ") and " raised " in line]
    assert len(raised) == 2 and raised[0] == raised[1] and raised[0].startswith(("ConfigError: ", "DataError: ", "OtherData: ")), said
    assert REFUSED[name] in raised[0]
    (changed,) = [line.removeprefix("changed ") for line in said if line.startswith("changed ")]
    cache = [file for file in ast.literal_eval(changed) if file.startswith("prepared")]  # what is known of data and pictures
    assert ast.literal_eval(changed) == (cache if name in ("data", "never") else [])  # the second looks again after the other data
