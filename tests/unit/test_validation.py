"""What is known before a run begins: the DeepSpeed JSON to the last key, schedules, libraries, the model's configuration, paths."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import ONE, REPO, read_json, train_arguments, write_json
from transformers import SchedulerType, get_scheduler

from cfvlm_ds import engine
from cfvlm_ds.core.config import Schedule
from cfvlm_ds.core.distributed import World
from cfvlm_ds.core.errors import ConfigError, InputError
from cfvlm_ds.core.parsing import parse_config
from cfvlm_ds.objectives import OBJECTIVES
from cfvlm_ds.training.dry_run import dry_run
from cfvlm_ds.training.read_data import RunData, SourceData
from cfvlm_ds.training.run import _fitted
from cfvlm_ds.training.validation import validate

CPU = torch.device("cpu")


def said(tmp_path: Path, changes: dict[str, Any], *argv: str, base: str = "z3", ranks: int = 1, device: torch.device | None = CPU) -> str:
    """The one sentence about a shipped JSON with values changed; a dict goes into its section. Empty where nothing is wrong with it."""
    given = read_json(REPO / "ds_configs" / f"{base}.json")
    for key, value in changes.items():
        given[key] = given[key] | value if isinstance(value, dict) and isinstance(given.get(key), dict) else value
    write_json(path := tmp_path / "ds.json", given)
    config = parse_config(["--deepspeed", str(path), *argv], OBJECTIVES)
    try:
        resolved = engine.resolve(engine.read_json(str(path)), config, ranks, device or CPU, 96, 50)
        engine.validate(config, resolved, ranks, device)
    except ConfigError as error:
        assert "\n" not in str(error)
        return str(error).replace(str(path), "ds.json")
    return ""


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "'gradient_cliping'; did you mean 'gradient_clipping'?": ("z3", {"gradient_cliping": 1.0}),
    "'frobnicate'; DeepSpeed has no such key": ("z3", {"frobnicate": 1}),
    "'zero_optimization.offload_param.devise'; did you mean 'device'?": ("z3", {"zero_optimization": {"offload_param": {"devise": 0}}}),
    "'bf16.enabeld'; did you mean 'enabled'?": ("z3", {"bf16": {"enabeld": True}}),
    "'optimizer.typ'; did you mean 'type'?": ("z3", {"optimizer": {"typ": "AdamW"}}),
    "optimizer.type is missing": ("z3", {"optimizer": {"params": {}}}),
    "bf16.enabled must": ("z3", {"bf16": {"enabled": "false"}}),
    'zero_optimization.stage must be 0, 1, 2 or 3, not "3"': ("z3", {"zero_optimization": {"stage": "3"}}),
    "offload_param.device: ": ("z3", {"zero_optimization": {"offload_param": {"device": "gpu"}}}),
    "not a DeepSpeed configuration": ("z3", {"zero_optimization": {"offload_param": "cpu"}}),
    "Apex AMP": ("z3", {"amp": {"enabled": True}}),
    'offload_optimizer needs an "optimizer" section': ("z3", {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
    "zero_optimization.offload_param needs stage 3": ("z2", {"zero_optimization": {"cpu_offload_param": True}}),
    "offload_param needs stage 3": ("z2", {"zero_optimization": {"offload_param": {"device": "cpu"}}}),
    "fp16.enabled=true needs a GPU": ("z3", {"fp16": {"enabled": True}}),
    "zero_quantized_weights=true": ("z3_zeropp", {}),
    "stage 0": ("z3", {"zero_optimization": {"stage": 0}}),
    "gradient_allreduce_op=sum": ("z2", {"gradient_allreduce_op": "sum"}),
    "compute_grad_norm=false": ("z2", {"zero_optimization": {"compute_grad_norm": False}}),
    "parameter_alignment=true": ("z2", {"zero_optimization": {"parameter_alignment": True}}),
    "managed_gradient_accumulation=false": ("z3", {"managed_gradient_accumulation": False}),
    "prescale_gradients": ("z3", {"prescale_gradients": True}),
    "gradient_predivide_factor": ("z3", {"gradient_predivide_factor": 2}),
    "sequence_parallel_size": ("z3", {"sequence_parallel_size": 2}),
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_deepspeed_would_not_do_as_it_is_written_is_refused_by_key(named, tmp_path):
    base, changes = REFUSED[named]
    assert named in said(tmp_path, changes, base=base)


def test_comments_and_every_key_that_deepspeed_asks_for_pass(tmp_path):
    assert said(tmp_path, {"_comment": "ours", "//": "too", "prescale_gradients": False, "dump_state": False, "log_level": None}) == ""
    sections = {name: {} for name in ("tensorboard", "comms_logger", "aio", "checkpoint", "data_types", "flops_profiler", "torch_autocast")}
    assert said(tmp_path, sections | {"activation_checkpointing": {"profile": False}}) == ""
    plain = {"zero_optimization": {"zero_quantized_weights": False, "zero_quantized_gradients": False}}
    assert said(tmp_path, plain, base="z3_zeropp", ranks=16) == said(tmp_path, plain, base="z3_zeropp", ranks=2) == ""
    assert "zero_hpz_partition_size=8" in said(tmp_path, plain, base="z3_zeropp", ranks=12)
    assert said(tmp_path, {}, base="z3_zeropp", device=None) == said(tmp_path, {"fp16": {"enabled": True}}, device=None) == "", "dry run"


def test_schedules_are_those_of_transformers_that_need_no_options():
    usable = set()
    for kind in SchedulerType:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        with contextlib.suppress(ValueError, TypeError):
            schedule: Any = get_scheduler(kind, optimizer, 1, 10)
            optimizer.step()
            schedule.step()
            usable.add(kind.value)
    assert usable == {*get_args(Schedule)}
    for name in ("cosin", "reduce_lr_on_plateau"):
        with pytest.raises(ConfigError, match=r"train\.lr_scheduler_type"):
            parse_config(["--train.lr_scheduler_type", name], OBJECTIVES)


FROZEN = [part for module in ("vision_tower", "projector", "language_model") for part in (f"--model.{module}.tuning", "frozen")]
LORA = ["--model.language_model.tuning", "lora", "--model.lora.load_in_4bit", "true"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model", "{name_or_path: ''}"], "model.name_or_path"),
        (["--data.train", "[]"], "data.train"),
        (["--objective.batch_align.pmi", "0", "--train.hard_negatives", "1"], "batch_align "),
        (
            ["--train.hard_negatives", "1", *(part for term in ("csd", "fcd") for part in (f"--objective.{term}.weight", "0"))],
            "train.hard_negatives keeps",
        ),
        (["--objective.sham.weight", "1", "--data.max_tokens_per_forward", "100"], "sham compares"),
        (["--data.train", "absent.jsonl"], "absent.jsonl"),
        (["--data.format", "cfgrop"], "'cfgroup'"),
        (["--objective.dpo.weight", "1"], "stored scores"),
        (["--objective.dpo.weight", "1", "--data.scores", "absent"], "absent: "),
        (["--objective.batch_align.weight", "1"], "batch_align"),
        (["--objective.batch_align.pmi", "0", "--train.per_device_train_batch_size", "1"], "batch_align "),
        (FROZEN, "every module is frozen"),
        ([*FROZEN, *LORA], "4-bit weights under ZeRO-3"),
        (LORA, "model.language_model.tuning"),
        (["--model.attn_implementation", "flash_attention_2"], "flash_attention_2"),
        (["--model.name_or_path", "no/model"], "model.name_or_path"),
        (["--deepspeed", "ds_configs/z4.json"], "ds_configs/z4.json"),
        (["--train.resume", "checkpoint-9"], "train.resume 'checkpoint-9'"),
    ],
)
def test_options_that_end_a_run_are_found_before_pictures_are_opened(options, sentence, model_dir, tmp_path):
    """A manifest of nothing but its name, and no process group: what is not refused passes."""
    (manifest := tmp_path / "train.jsonl").touch()
    arguments = train_arguments(model_dir, {"train": manifest}, tmp_path / "run")
    validate(parse_config(arguments, OBJECTIVES), ONE)
    with pytest.raises(InputError) as raised:
        validate(parse_config([*arguments, *options], OBJECTIVES), ONE)
    assert sentence in str(raised.value) and not (tmp_path / "run").exists()


def test_what_is_built_first_is_not_looked_for(tmp_path):
    """And only that: a manifest elsewhere is missed before 40,000 pictures are drawn."""
    habits, tiny = tmp_path / "habits", tmp_path / "tiny"
    quickstart = ["--config", "examples/quickstart.yaml", "--build.habits.out_dir", str(habits), "--build.base", str(tiny)]
    quickstart += ["--model.name_or_path", str(tiny), "--data.train", str(habits / "train.jsonl")]
    evaluated = [f"--data.evaluation={{test: {habits / 'test_combo.jsonl'}}}"]
    world = ONE
    validate(parse_config([*quickstart, *evaluated], OBJECTIVES), world)
    for options, sentence in (
        ([*evaluated, *FROZEN], "every module is frozen"),
        ([*evaluated, "--model.name_or_path", str(tmp_path / "other")], "other' does not exist"),
        ([f"--data.evaluation={{test: {tmp_path / 'test.jsonl'}}}"], "test.jsonl: no such manifest"),
    ):
        with pytest.raises(InputError, match=sentence):
            validate(parse_config([*quickstart, *options], OBJECTIVES), world)


@pytest.mark.parametrize(
    "option", ["data.train", "data.root", "data.scores", "data.evaluation.test", "model.name_or_path", "train.rounds.pictures.path"]
)
def test_a_path_that_is_only_beside_the_yaml_is_named(option, model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (manifest := tmp_path / "train.jsonl").touch()
    given = train_arguments(model_dir, {"train": manifest}, tmp_path / "run")
    arguments = [str(REPO / each) if (REPO / each).is_file() else each for each in given]
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "run.yaml").write_text("train: {seed: 1}")
    rounds = ["--train.rounds", "{number: 1, judge: answers}"] if "rounds" in option else []
    config = parse_config([*arguments, "--config", "conf/run.yaml", *rounds, f"--{option}", "mine"], OBJECTIVES)
    if option not in ("data.root", "data.scores", "train.rounds.pictures.path"):  # which nothing needs here
        with pytest.raises(InputError, match=re.escape(f"relative paths are resolved against {tmp_path}")):
            validate(config, ONE)
    (tmp_path / "conf" / "mine").mkdir()
    with pytest.raises(
        ConfigError,
        match=rf"mine does not exist \(relative paths are resolved against {tmp_path}\); use conf/mine, which exists next to the YAML file",
    ):
        validate(config, ONE)


def test_a_dry_run_refuses_what_a_run_refuses(model_dir, tmp_path):
    wrong = read_json(REPO / "ds_configs" / "z3.json") | {"gradient_cliping": 1}
    write_json(tmp_path / "ds.json", wrong)
    with pytest.raises(ConfigError, match="did you mean 'gradient_clipping'"):
        dry_run(parse_config(["--model.name_or_path", str(model_dir), "--deepspeed", str(tmp_path / "ds.json")], OBJECTIVES))
    with pytest.raises(ConfigError, match="4-bit weights under ZeRO-3"):
        dry_run(parse_config(["--model.name_or_path", str(model_dir), *FROZEN, *LORA], OBJECTIVES))


@pytest.mark.parametrize(
    ("options", "ranks", "fits"),
    [
        ({}, 4, 6),
        ({"gradient_accumulation_steps": 3}, 4, 2),
        ({"per_device_train_batch_size": 8}, 4, "set train.per_device_train_batch_size to at most 6"),
        ({"gradient_accumulation_steps": 2}, 26, "start at most 25 ranks"),
        ({"gradient_accumulation_steps": 26, "max_tokens_per_micro_batch": 900}, 1, "set train.gradient_accumulation_steps to at most 25"),
    ],
)
def test_a_step_takes_no_group_twice(options, ranks, fits, capsys):
    """25 groups: a default is what fits, and says so; what is asked for and does not fit is refused with what does."""
    sections = {name: "data" if name.startswith("max") else "train" for name in options}
    config = parse_config([part for name, value in options.items() for part in (f"--{sections[name]}.{name}", str(value))], OBJECTIVES)
    groups: Any = type("Groups", (list,), {"together": None})(range(25))
    data, world = RunData(groups, {}, {}, None, None, sources={"train": SourceData(groups, {})}), World(0, ranks, CPU)
    if isinstance(fits, str):
        with pytest.raises(ConfigError, match=fits):
            _fitted(config, data, world)
        return
    found = _fitted(config, data, world)
    assert found.train.micro_batch_size == fits and found.resolved["train"]["per_device_train_batch_size"] in (None, fits)
    assert ("is lowered from 8 to 6, because an epoch has only 25 groups" in capsys.readouterr().out) == (not options and ranks == 4)
