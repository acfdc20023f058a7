"""What a run may change when it goes on, what it may not, and what is left when it is refused."""

from __future__ import annotations

import ast
import json
import re
import shutil
from typing import Any

import pytest
from conftest import ONE, REPO, read_json, write_json

from cfvlm_ds.checkpoint import SCHEMA, TrainState
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.parsing import parse_config
from cfvlm_ds.data import GroupSampler
from cfvlm_ds.data.identity import data_identity
from cfvlm_ds.objectives import OBJECTIVES
from cfvlm_ds.training import option_changes, run_start

Z3 = {"zero_optimization": {"stage": 3, "overlap_comm": True}, "bf16": {"enabled": False}, "gradient_clipping": 1.0}

DATA = {**data_identity([], []), "rows": 7}


def test_every_option_says_what_its_change_means():
    declared = option_changes.ON_RESUME
    assert declared["model.vision_tower.tuning"] == "refuse" and declared["train.learning_rate"] == "confirm" and len(declared) > 60


def test_every_deepspeed_setting_that_is_shipped_says_what_its_change_means():
    def leaves(values: dict[str, Any], prefix: str = "") -> set[str]:
        below = [leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key} for key, value in values.items()]
        return set().union(*below)

    files = [*(REPO / "ds_configs").glob("*.json"), REPO / "tests" / "support" / "z3_partitioned.json"]
    shipped = set().union(*(leaves(read_json(file)) for file in files))
    parts = {name: {name.rsplit(".", n)[0] for n in range(name.count(".") + 1)} for name in shipped}
    undeclared = sorted(name for name, above in parts.items() if not above & option_changes.DEEPSPEED.keys())
    assert len(files) > 4 and len(shipped) > 20
    assert not undeclared, f"{undeclared}: add them, or their section, to DEEPSPEED in cfvlm_ds/training/option_changes.py"
    names = ("zero_optimization.reduce_bucket_size", "zero_optimization.stage", "of_a_future_release.x")
    assert [option_changes.on_resume_of(name) for name in names] == ["free", "refuse", "confirm"]


@pytest.fixture
def told(monkeypatch):
    """A function from options, and what else a run is told, to its record."""
    monkeypatch.setattr(option_changes, "model_hashes", lambda name, alive, say: {"weights": name.split("@")[0], "inputs": "i"})

    def record(*options: str, ranks: int = 2, steps: int = 38, **deepspeed: Any) -> dict[str, Any]:
        config = parse_config(["--model.name_or_path", "base@here", *options], OBJECTIVES)
        return option_changes.record(config, {**Z3, **deepspeed}, ranks, steps)

    return record


LORA = ("--model.language_model.tuning", "lora")
RESUMABLE = (
    ("train.learning_rate", "1e-05", "0.1"), ("train.weight_decay", "0.0", "0.1"), ("train.adam_beta2", "0.999", "0.95"),
    ("train.lr_scheduler_type", "cosine", "linear"), ("model.projector.learning_rate", "not set", "0.1"),
    ("model.lora.alpha", "32.0", "8.0"), ("model.lora.dropout", "0.0", "0.1"), ("model.max_pixels", "not set", "999"),
    ("objective.csd.margin", "1.0", "2.0"), ("objective.csd.weight", "8.0", "0.0"), ("objective.dpo.weight", "0.0", "1.0"),
    ("train.gradient_accumulation_steps", "16", "64"),
)  # fmt: skip
FIXED = (
    ("model.lora.rank", "16", "4"), ("model.lora.dora", "False", "True"), ("model.vision_tower.tuning", "full", "frozen"),
    ("train.seed", "0", "1"), ("data.max_tokens_per_micro_batch", "not set", "500"), ("model.name_or_path", "base@here", "other@here"),
)  # fmt: skip


@pytest.mark.parametrize(("option", "before", "after"), [*RESUMABLE, *FIXED])
def test_what_decides_what_is_trained_is_named_and_may_be_allowed_where_a_checkpoint_can_continue(option, before, after, told):
    given = "4" if "accumulation" in option else after  # of 16 groups
    found = option_changes.compare(told(*LORA), told(*LORA, f"--{option}={given}"))
    (change,) = found
    assert option in str(change) and f"was {before}" in str(change) and f"is {after}" in str(change)
    is_fixed = (option, before, after) in FIXED
    assert change.fixed == is_fixed
    message = option_changes.refused(found, "run/checkpoint-7", 7, allowed=is_fixed)
    assert message is not None and message.startswith("run/checkpoint-7 ") and str(change) in message
    assert is_fixed or option_changes.refused(found, "run/checkpoint-7", 7, allowed=True) is None


def test_deepspeed_settings(told):
    def said(**deepspeed: Any) -> list[str]:
        return [f"{change}{' (fixed)' if change.fixed else ''}" for change in option_changes.compare(told(), told(**deepspeed))]

    assert said(zero_optimization={"stage": 3, "reduce_bucket_size": 5, "offload_param": {"device": "cpu"}}, steps_per_print=3) == []
    assert said(optimizer={"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}}) == []
    assert said(zero_optimization={"stage": 2}) == ["--deepspeed zero_optimization.stage was 3 and is 2 (fixed)"]
    assert said(zero_optimization={"stage": 3, "zero_quantized_weights": True}) == [
        "--deepspeed zero_optimization.zero_quantized_weights was False and is True"
    ]
    precision = "precision (train.bf16, bf16 and fp16 of the DeepSpeed JSON) was fp32 and is bf16 (fixed)"
    assert said(bf16={"enabled": True}) == [precision]
    offloaded = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    assert said(optimizer={"type": "AdamW"}, zero_optimization=offloaded) == [
        "--deepspeed optimizer was AdamW of torch and is AdamW of DeepSpeed on the CPU (fixed)"
    ]
    assert said(optimizer={"type": "Lamb"}) == ["--deepspeed optimizer was AdamW of torch and is Lamb (fixed)"]


def test_what_changes_nothing_passes(told):
    """Other ranks with as many groups a step, other places, speed and records, and options that are not in use."""
    same = ("--train.per_device_train_batch_size", "4", "--train.gradient_accumulation_steps", "1")
    assert option_changes.compare(told(), told(*same, ranks=4)) == []
    free = ("--model.name_or_path", "base@there", "--data.train", "moved.jsonl", "--train.output_dir", "o", "--train.save_steps", "3")
    free += ("--data.num_workers=3", "--data.max_tokens_per_forward=99", "--model.attn_implementation=sdpa", "--train.bf16=false")
    assert option_changes.compare(told(), told(*free, "--tracking.experiment", "e", "--train.on_nonfinite", "skip")) == []
    assert option_changes.compare(told(), told("--model.lora.rank", "4", "--objective.dpo.weight", "0")) == [], (
        "nothing has adapters, or this term"
    )
    frozen = ("--model.projector.tuning", "frozen")
    assert option_changes.compare(told(*frozen), told(*frozen, "--model.projector.learning_rate", "1")) == []
    packed = ("--data.max_tokens_per_micro_batch", "500", "--train.per_device_train_batch_size")
    assert option_changes.compare(told(*packed, "8"), told(*packed, "4")) == []


def test_other_ranks_or_epochs_are_named(told):
    found = [str(change) for change in option_changes.compare(told(), told(ranks=1, steps=75))]
    assert ["was 16 and is 8" in found[0], "was 38 and is 75" in found[1]] == [True] * len(found)
    assert option_changes.compare(told(), told("--train.max_steps", "38")) == [], "as many steps, said in another way"


def test_a_model_is_known_by_its_files(model_dir, tmp_path):
    """Moved, it is the same; other weights, another architecture or another chat template are told apart."""
    copy = tmp_path / "moved"
    shutil.copytree(model_dir, copy)
    first = option_changes.model_hashes(str(model_dir))
    assert first is not None and option_changes.model_hashes(str(copy)) == first and option_changes.model_hashes("nobody/has-this") is None
    for name, part in (("model.safetensors", "weights"), ("config.json", "weights"), ("chat_template.jinja", "inputs")):
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(whole[:-2] + b"?" + whole[-1:])
        now = option_changes.model_hashes(str(copy))
        assert now is not None and {key for key in first if now[key] != first[key]} == {part}, name
        (copy / name).write_bytes(whole)
    (copy / "generation_config.json").write_text("{}")
    assert option_changes.model_hashes(str(copy)) == first


def test_secrets_neither_leave_nor_count(told):
    url = "https://me:hunter2@host/data.jsonl"
    assert "hunter2" not in json.dumps(told("--data.train", url)) and option_changes.compare(told("--data.train", url), told()) == []


def test_a_finished_run_is_what_the_folder_says(told, tmp_path):
    """Of this revision: else it is refused, and nothing is touched."""
    config = parse_config(["--model.name_or_path", "base@here", "--train.output_dir", str(tmp_path)], OBJECTIVES)
    sampler = GroupSampler(num_groups=8, groups_per_micro_batch=2, gradient_accumulation_steps=1, rank=0, world_size=1, seed=0)
    record = option_changes.record(config, Z3, 1, 5)
    files = {"finished.json": json.dumps({"schema": SCHEMA, "step": 5, "record": record})}

    def start() -> Any:
        for name, content in files.items():
            (tmp_path / name).write_text(content)
        before = sorted(tmp_path.iterdir())
        try:
            return run_start.decide(config, Z3, ONE, sampler, DATA, {}, 5)
        finally:
            assert sorted(tmp_path.iterdir()) == before

    assert start() is None
    for other in ({"schema": 1}, {}):
        files["finished.json"] = json.dumps({"step": 5, "record": record, **other})
        with pytest.raises(ConfigError, match=f"^{tmp_path} was written by another version"):
            start()


def test_other_data_are_not_taken_for_the_trained_data(told, tmp_path):
    config = parse_config(["--model.name_or_path", "base@here", "--data.train", "five.jsonl"], OBJECTIVES)
    sampler = GroupSampler(num_groups=5, groups_per_micro_batch=1, gradient_accumulation_steps=1, rank=0, world_size=1, seed=0)
    start = run_start.Start(tmp_path, [], {}, 5, {"rows": 5})
    message = f"{tmp_path} was trained on other data, from which five.jsonl differs in the number of rows (5, was 7); restore"
    with pytest.raises(run_start.OtherData, match=re.escape(message)):
        start.check(TrainState(data={"rows": 7}, record={}), config, sampler)


def test_a_finished_run_is_refused_other_data_and_names_other_evaluation_sets(told, tmp_path, capsys):
    options = ["--model.name_or_path", "base@here", "--train.output_dir", str(tmp_path), "--data.train", "five.jsonl"]
    config = parse_config(options, OBJECTIVES)
    ended = {
        "schema": SCHEMA,
        "step": 5,
        "record": option_changes.record(config, Z3, 1, 5),
        "data": DATA,
        "evaluation": {"a": DATA, "b": DATA},
    }
    write_json(tmp_path / "finished.json", ended)
    sampler = GroupSampler(num_groups=8, groups_per_micro_batch=2, gradient_accumulation_steps=1, rank=0, world_size=1, seed=0)
    fewer = {**DATA, "rows": 5}
    assert run_start.decide(config, Z3, ONE, sampler, DATA, {"a": fewer, "b": DATA, "new": DATA}, 5) is None
    assert "5 of 5: nothing to do; a has changed since in the number of rows (5, was 7); new was not evaluated\n" in capsys.readouterr().out
    with pytest.raises(run_start.OtherData, match=r"was trained on other data, from which five\.jsonl differs in"):
        run_start.decide(config, Z3, ONE, sampler, fewer, {}, 5)


def test_a_run_that_early_stopping_ended_has_finished_until_the_option_changes(told, tmp_path, capsys):
    options = ["--model.name_or_path", "base@here", "--train.output_dir", str(tmp_path), "--train.early_stopping=2"]
    options += ["--data.evaluation.a=b", "--train.save_best=eval/a/pair", "--train.eval_steps=1"]
    config = parse_config(options, OBJECTIVES)
    ended = {"schema": SCHEMA, "step": 3, "total_steps": 5, "record": option_changes.record(config, Z3, 1, 5)}
    write_json(tmp_path / "finished.json", ended)
    sampler = GroupSampler(num_groups=8, groups_per_micro_batch=2, gradient_accumulation_steps=1, rank=0, world_size=1, seed=0)
    assert run_start.decide(config, Z3, ONE, sampler, DATA, {}, 5) is None
    said = capsys.readouterr().out
    assert "finished at step 3 of 5" in said and "remove" not in said, (
        "without its checkpoint, the run would be trained again over its export"
    )
    (tmp_path / "checkpoint-3").mkdir()
    assert run_start.decide(config, Z3, ONE, sampler, DATA, {}, 5) is None
    assert f"remove {tmp_path / 'finished.json'} to evaluate it again" in capsys.readouterr().out
    assert [run_start._finished_at(tmp_path, patience) for patience in (2, 3, None)] == [(3, 5), (3, 3), (3, 3)]


def test_no_data_loader_draws_from_the_random_numbers_of_the_run():
    """Its iterators draw a seed each, which dropout would miss after a resume."""
    calls = [
        (path.name, {keyword.arg for keyword in node.keywords})
        for path in (REPO / "cfvlm_ds").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "DataLoader"
    ]
    assert len(calls) >= 3 and not [name for name, given in calls if "generator" not in given], "generator=isolated_rng()"
