"""Parsing of a run's configuration: precedence, strictness, and what each mistake is answered with."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPO

from cfvlm_ds.cli.main import main
from cfvlm_ds.core import strict
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.data_config import EvaluationSet, Source
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.parsing import parse_config
from cfvlm_ds.core.reading import parse_yaml, read_yaml
from cfvlm_ds.objectives import OBJECTIVES


def parse(*argv: str) -> RunConfig:
    return parse_config(argv, OBJECTIVES, prog="train.py")


@pytest.fixture
def written(tmp_path: Path):
    def write(text: str) -> list[str]:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


def test_every_split_may_have_a_root_and_a_format_of_its_own(tmp_path: Path) -> None:
    """From YAML and from the command line; what a split does not say is the training data's."""
    (file := tmp_path / "c.yaml").write_text(
        "data: {root: [/a, /b], evaluation: {plain: p.jsonl, own: {path: o.jsonl, root: /r, format: pairs}, train: {path: t.jsonl}}}"
    )
    data = parse("--config", str(file), "--data.train", "x.jsonl", "--data.evaluation.more.path", "m.jsonl", "--data.root+", "/c").data
    roots = ["/a", "/b", "/c"]
    assert data.train_sets == {"train": Source("x.jsonl", roots, "auto")}
    assert data.evaluation_sets == {
        "plain": EvaluationSet("p.jsonl", roots, "auto"),
        "own": EvaluationSet("o.jsonl", "/r", "pairs"),
        "train": EvaluationSet("t.jsonl", roots, "auto"),
        "more": EvaluationSet("m.jsonl", roots, "auto"),
    }
    assert [parse(f"--data.root={root}").data.train_sets["train"].root for root in ("/a", "[/a,/b]")] == ["/a", ["/a", "/b"]]
    for place, given, said in (
        ("", '{"a": {"pth": "b.jsonl"}}', "unknown option 'data.evaluation.a.pth'; did you mean 'data.evaluation.a.path'"),
        ("", '{"a": {"path": "b.jsonl", "root": 3}}', "data.evaluation.a.root: expected a list of texts, a text or null, got 3"),
        (".a.root", "/x", "data.evaluation: 'a' is not a manifest; give NAME: PATH"),
        ("", "{a: ''}", "data.evaluation: 'a' is not a manifest; give NAME: PATH"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse(f"--data.evaluation{place}", given)


def test_an_empty_path_is_not_the_working_folder(tmp_path: Path) -> None:
    """As of a variable that was not set."""
    for given, said in (
        (["--data.train", '[{"path": ""}]'], "data.train: a source has an empty path"),
        (["--train.output_dir", ""], "train.output_dir is empty"),
        (["--config", ""], "--config is empty"),
        (["--config", str(tmp_path)], f"--config {tmp_path} is a folder; name the file of options in it"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse(*given)


def test_an_evaluation_set_is_a_manifest_or_a_benchmark(written) -> None:
    data = parse(*written("data: {evaluation: {a: m.jsonl, crepe: {benchmark: sugarcrepe, root: /b, limit: 7, probe: match}}}")).data
    assert list(data.evaluation_sets) == ["a"]
    assert data.benchmark_sets == {"crepe": EvaluationSet(root="/b", limit=7, benchmark="sugarcrepe", probe="match")}
    for given, said in (
        ("{benchmark: pope}", "benchmark 'pope' needs root, one folder"),
        ("{benchmark: pope, root: [/a, /b]}", "benchmark 'pope' needs root, one folder"),
        ("{benchmark: pope, root: /a, path: m.jsonl}", "has neither path nor format"),
        ("{path: m.jsonl, probe: match}", "probe 'match' is of a benchmark, and 'm.jsonl' is a manifest"),
        ("{root: /a}", "'crepe' is not a manifest; give NAME: PATH"),
        ("3", "data.evaluation.crepe: 3 is not a manifest; give NAME: PATH"),
        ("{pth: a}", "unknown option 'data.evaluation.crepe.pth'; did you mean 'data.evaluation.crepe.path'"),
        ("{path: a, root: 3}", "data.evaluation.crepe.root: expected a list of texts, a text or null, got 3"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            parse(*written(f"data: {{evaluation: {{crepe: {given}}}}}"))
        assert "\n" not in str(caught.value)


MIXTURE = """
data:
  format: pairs
  root: /r
  train:
    - {path: a/groups.jsonl, format: cfgroup, weight: 2}
    - {path: b/chat.jsonl, name: chat, weight: 1, limit: 5, objectives: [align], root: /own}
"""


def test_training_data_may_be_a_list_of_sources(written) -> None:
    """From YAML and from the command line; what a source does not say is the data's."""
    wanted = {
        "groups": Source("a/groups.jsonl", "/r", "cfgroup", name="groups", weight=2),
        "chat": Source("b/chat.jsonl", "/own", "pairs", limit=5, name="chat", weight=1, objectives=["align"]),
    }
    data = parse(*written(MIXTURE)).data
    assert data.is_mixture and data.train_sets == wanted and list(data.train_sets) == list(wanted)
    listed = '[{"path": "a/groups.jsonl", "weight": 1}, {"path": "b/x.jsonl", "weight": 0.5}]'
    assert list(parse("--data.train", listed).data.train_sets) == ["groups", "x"]
    assert not parse("--data.train", "a.jsonl").data.is_mixture


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("{path: a.jsonl, weight: -1}", "data.train.weight must be from"),
        ("{path: a.jsonl, limit: 0}", "data.train.limit must be from 1"),
        ("{path: a.jsonl, objectives: []}", "objectives of 'a.jsonl' is an empty list"),
        ("{path: a.jsonl, wieght: 1}", "unknown option 'data.train.wieght'; did you mean 'data.train.weight'?"),
        ("{path: a.jsonl, weight: much}", "data.train.weight: expected a number or null, got 'much'"),
        ("{weight: 1}", "data.train: {'weight': 1} is not a manifest; give FILE, or a list of"),
        ("3", "data.train: 3 is not a manifest; give FILE, or a list of"),
    ],
)
def test_a_source_that_is_none_is_one_sentence(written, source: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        parse(*written(f"data: {{train: [{source}]}}"))
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_sources_have_names_of_their_own() -> None:
    for listed, sentence in (
        ('[{"path": "a/x.jsonl"}, {"path": "b/x.json"}]', "a/x.jsonl and b/x.json are both called 'x'"),
        ('[{"path": "my data.jsonl"}]', "give my data.jsonl a name of letters"),
        ('[{"path": "a.jsonl", "name": "a/b"}]', "'a/b' names metrics"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            _ = parse("--data.train", listed).data.train_sets


def test_defaults_then_yaml_then_command_line(written) -> None:
    given = written("train: {max_steps: 7, seed: 3}\nobjective: {csd: {margin: 0.125}}\n")
    assert (parse().train.max_steps, parse().train.seed, parse().train.save_steps) == (-1, 0, 500)
    config = parse(*given, "--train.max_steps", "9", "--objective.fcd.margin=0.5")
    assert (config.train.max_steps, config.train.seed, config.train.save_steps) == (9, 3, 500)
    assert config.objective["csd"].margin == 0.125 and config.objective["fcd"].margin == 0.5
    assert parse("--train.max_steps", "9", *given).train.max_steps == 7, "options apply in the order they are written"


def test_the_help_matches_the_section_it_names() -> None:
    """What is parsed lands in the dataclass of its own section, with the type it declares."""
    config = parse("--model.projector.learning_rate", "1e-3", "--data.evaluation", '{"a": "b.jsonl"}', "--build.scenes.out_dir", "x")
    assert config.model.projector.learning_rate == 1e-3 and config.model.vision_tower.learning_rate is None
    assert config.data.evaluation == {"a": "b.jsonl"}
    assert config.build.scenes is not None and config.build.scenes.out_dir == "x" and config.build.tiny_llava is None


UNKNOWN_OPTIONS = {
    "train.learningrate": "train.learning_rate",
    "learning_rate": "train.learning_rate",
    "train.batch_size": "train.per_device_train_batch_size",
    "batch_size": "train.per_device_train_batch_size",
    "train.eval_batch_size": "train.per_device_eval_batch_size",
    "train.lr": "train.learning_rate",
    "lr": "train.learning_rate",
    "train.steps": "train.max_steps",
    "train.epochs": "train.num_train_epochs",
    "model.path": "model.name_or_path",
    "objective.csd.warmup_steps": "objective.csd.warmup",
    "objective.fcd.symetric": "objective.fcd.symmetric",
    "model.vision_tower.tunign": "model.vision_tower.tuning",
    "build.scenes.num_trian": "build.scenes.num_train",
    "dataset": "data.train",
    "manifest": "data.train",
    "freeze_vision_tower": "model.vision_tower.tuning",
    "model.lora.target_modules": "model.language_model.tuning",
    "lora_rank": "model.lora.rank",
    "train.report_to": "tracking.enabled",
    "train.deepspeed": "deepspeed",
}


@pytest.mark.parametrize("wrong", ["cutoff_len", "template", "max_samples", "train.optim", "loss_type"])
def test_nothing_is_suggested_for_an_option_without_a_like(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"; see --help$"):
        parse(f"--{wrong}", "1")


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("wrong", UNKNOWN_OPTIONS)
def test_unknown_option_names_the_nearest(wrong: str, joined: bool) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(*([f"--{wrong}=1"] if joined else [f"--{wrong}", "1"]))
    assert str(raised.value) == f"unknown option {wrong!r}; did you mean {UNKNOWN_OPTIONS[wrong]!r}?"


def test_what_other_programs_call_an_option_is_one_here() -> None:
    resolved = parse().resolved
    for option in set(strict._OTHER_NAMES.values()):
        value: Any = resolved
        for part in option.split("."):
            value = value[part]


MISTAKES = [
    ("train: {max_step: 7}", "unknown option 'train.max_step'; did you mean 'train.max_steps'?"),
    ("trian: {max_steps: 7}", "unknown option 'trian.max_steps'; did you mean 'train.max_steps'?"),
    ("model: {vision_tower: {tunign: lora}}", "unknown option 'model.vision_tower.tunign'; did you mean 'model.vision_tower.tuning'?"),
    ("objective: {csd: {wieght: 1}}", "unknown option 'objective.csd.wieght'; did you mean 'objective.csd.weight'?"),
    ("build: {scenes: {out_dir: x, num_trian: 3}}", "unknown option 'build.scenes.num_trian'; did you mean 'build.scenes.num_train'?"),
    ("lr: 3", "unknown option 'lr'; did you mean 'train.learning_rate'?"),
    ("train: {learning_rate: fast}", "train.learning_rate: expected a number, got 'fast'"),
    ("train: {max_steps: 1.5}", "train.max_steps: expected a whole number, got 1.5"),
    ("train: {bf16: maybe}", "train.bf16: expected auto, true or false, got 'maybe'"),
    ("model: {vision_tower: {tuning: freeze}}", "model.vision_tower.tuning: expected full, lora or frozen, got 'freeze'"),
    ("data: {root: 3}", "data.root: expected a list of texts, a text or null, got 3"),
    ("data: {evaluation: test.jsonl}", "data.evaluation: 'test.jsonl' is not a manifest; give NAME: PATH, or NAME: {path: PATH"),
    ("model: {vision_tower: frozen}", "model.vision_tower is a section of options, not 'frozen'; set model.vision_tower.tuning to it"),
    ("data: groups.jsonl", "data is a section of options, not 'groups.jsonl'; set data.train to it"),
    ("objective: {nll: {}}", "unknown term of the objective 'nll'; the terms are align, csd, fcd"),
    ("objective: {align: }", "objective.align: null is not a value; write align: {} for its defaults"),
    ("hello", "run.yaml: no options in it; write YAML as in examples/"),
    ("train: {seed: 1", "run.yaml: broken YAML at line 1, column 16 (expected ',' or '}'"),
    ("train:\n\tseed: 1", "run.yaml: broken YAML at line 2, column 1 ("),
    (["my.yaml"], "unknown option 'my.yaml'; a file of options is given by --config my.yaml"),
    (["org/name", "a.jsonl"], "unknown option 'org/name'; a model is given by --model.name_or_path MODEL and data by --data.train DATA"),
    (["--local_rank=0", "--num_gpus", "1"], "write `deepspeed --num_gpus 1 train.py`"),
    (["--train.dry_run"], "--train.dry_run needs a value; write --train.dry_run VALUE, which is true or false where"),
    (["--train.seed", "--train.max_steps", "3"], "--train.seed needs a value; write --train.seed VALUE"),
    (["--train.learning_rate=fast"], "train.learning_rate: expected a number, got 'fast'"),
    (["--objective.csd.mode", "crossed"], "objective.csd.mode: expected "),
    (["--model", "org/name"], "model is a section of options, not 'org/name'; set model.name_or_path to it"),
    (["--config", "qwen2_vl.yaml"], "or one of examples/qwen2_5_vl_72b.yaml"),
]


@pytest.mark.parametrize(("given", "sentence"), MISTAKES, ids=[str(given) for given, _ in MISTAKES])
def test_a_common_mistake_says_what_to_write(written, given: str | list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(*(written(given) if isinstance(given, str) else given))
    assert sentence in str(raised.value) and str(raised.value).isprintable() and "class '" not in str(raised.value)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("evaluate a b --batchsize 4", "error: cfvlm-ds evaluate does not take '--batchsize'; did you mean --batch_size?"),
        ("data check a --roots=b", "error: cfvlm-ds data check does not take '--roots'; did you mean --root?"),
        ("export runs/mine --merge", "error: cfvlm-ds export does not take '--merge'; see `cfvlm-ds export --help`"),
        ("score model data more", "error: cfvlm-ds score does not take 'more'; see `cfvlm-ds score --help`"),
    ],
)
def test_what_a_command_does_not_take_is_one_sentence(line: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(line.split())
    assert left.value.code == 2 and capsys.readouterr().err == f"{sentence}\n"


def test_a_term_may_be_named_with_its_option(written) -> None:
    assert set(parse(*written("objective: {align.weight: 1, csd: {}}")).objective) == {"align", "csd"}


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("train: {max_steps: null}", "train.max_steps"),
        ("train: 5", "train"),
        ("train: null", "train"),
        ("model: {vision_tower: 5}", "model.vision_tower"),
        ("objective: {csd: null}", "objective.csd"),
        ("data: {evaluation: [a.jsonl]}", "data.evaluation"),
    ],
)
def test_null_or_a_value_in_place_of_a_section(written, text: str, option: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(*written(text))
    assert str(raised.value).startswith(option) and "\n" not in str(raised.value)


def test_null_is_fine_where_it_is_the_default(written) -> None:
    assert parse(*written("data: {scores: null}\nmodel: {projector: {learning_rate: null}}")).data.scores is None


@pytest.mark.parametrize(("spelled", "meant"), [("true", True), ("false", False), ("auto", "auto")])
def test_bf16_is_spelled_as_yaml_and_the_command_line_do(written, spelled: str, meant: object) -> None:
    assert parse(*written(f"train: {{bf16: {spelled}}}")).train.bf16 == meant
    assert parse("--train.bf16", spelled).train.bf16 == meant


def test_missing_config_file() -> None:
    with pytest.raises(ConfigError, match=r"no/such\.yaml"):
        parse("--config", "no/such.yaml")
    with pytest.raises(ConfigError, match=r"train\.seed: expected a whole number"):
        parse("--train.seed", "[" * 5000)


@pytest.mark.parametrize(
    ("stated", "options", "terms"),
    [
        ("", [], ["align", "csd", "fcd"]),
        ("", ["--objective.csd.weight", "0"], ["align", "fcd"]),
        ("", ["--objective.csd.weight", "0", "--objective.dpo.beta=0.2"], ["align", "fcd", "dpo"]),
        ("train: {seed: 1}\nobjective: {}", [], ["align", "csd", "fcd"]),
        ("objective: {align: {}}", [], ["align"]),
        ("objective: {csd: {margin: 2}, align: {weight: 2}}", [], ["align", "csd"]),
        ("objective.dpo.beta: 0.2", [], ["dpo"]),
        ("objective: {dpo: {}}", ["--objective.fcd", "{}"], ["fcd", "dpo"]),
        ("objective: {dpo: {}, fcd: {weight: 0}}", ["--objective.align.weight=3"], ["align", "dpo"]),
    ],
)
def test_a_run_has_the_terms_that_are_named(stated: str, options: list[str], terms: list[str], written) -> None:
    """A file states the whole objective, the command line adds to it; none named is the default. Always in one order, as sums are."""
    config = parse(*(written(stated) if stated else ()), *options)
    assert list(config.objective) == list(config.resolved["objective"]) == terms
    assert parse(*written(yaml.safe_dump(dict(config.resolved)))).objective == config.objective


def test_several_files_state_the_objective_together(tmp_path: Path) -> None:
    for name in ("align", "dpo"):
        (tmp_path / name).write_text(f"objective: {{{name}: {{weight: 2}}}}")
    config = parse("--config", str(tmp_path / "dpo"), f"--config={tmp_path / 'align'}")
    assert config.loss == "2 align + 2 dpo"


def test_all_weights_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="weight 0"):
        parse(*(part for name in OBJECTIVES for part in (f"--objective.{name}.weight", "0")))


def test_print_config_parses_back_to_the_same(written, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*written("train: {max_steps: 7, bf16: false}\ndata: {evaluation: {a: b}}"), "--objective.csd.weight", "0.1"]
    given += ["--build.scenes.out_dir", "x", "--model.projector.learning_rate", "2e-4", "--deepspeed", "mine.json"]
    with pytest.raises(SystemExit) as ended:
        parse(*given, "--print_config")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    expected = parse(*given)
    assert expected.resolved["train"]["max_steps"] == 7 and "max_steps: 7" in printed
    again = parse(*written(printed))
    assert again.resolved == expected.resolved
    assert dataclasses.asdict(again.train) == dataclasses.asdict(expected.train)


def test_resolved_is_plain_yaml_and_complete(written) -> None:
    """config.yaml of a run folder holds every option, and starts the same run again."""
    resolved = parse("--train.seed", "5").resolved
    text = yaml.safe_dump(dict(resolved))
    assert parse(*written(text)).resolved == resolved
    assert set(resolved) == {"model", "data", "train", "tracking", "build", "objective", "deepspeed"}
    assert set(resolved["objective"]) == {"align", "csd", "fcd"}


def test_help_has_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert ended.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "deepspeed train.py --deepspeed ds_configs/z3.json --config" in printed
    assert "--train.max_grad_norm" in printed and "clip the global gradient norm" in printed


def test_the_launcher_s_local_rank_is_accepted() -> None:
    """The deepspeed launcher appends it to every rank's arguments; it must not be part of the run's definition."""
    assert parse("--local_rank=3").resolved == parse("--local_rank", "1").resolved == parse().resolved


def test_a_researcher_s_objective_gets_its_options() -> None:
    @dataclass(frozen=True)
    class Mine:
        weight: float = 1.0
        sharpness: int = 2
        layers: tuple[int, ...] = ()
        words: Path | None = None

    mapping = {**OBJECTIVES, "mine": Mine}
    config = parse_config(["--objective.mine.weight", "0.5", "--objective.mine.sharpness", "4"], mapping)
    assert config.objective["mine"] == Mine(0.5, 4)
    config = parse_config(["--objective.mine", "{layers: [1, 2], words: a.txt}"], mapping)
    assert config.objective["mine"] == Mine(layers=(1, 2), words=Path("a.txt"))
    assert "mine" not in parse_config([], mapping).objective, "being registered switches nothing on"
    with pytest.raises(ConfigError, match=r"unknown option 'objective\.mine\.sharpnes'; did you mean 'objective\.mine\.sharpness'"):
        parse_config(["--objective.mine.sharpnes", "4"], mapping)


EXAMPLES = sorted(path for path in (REPO / "examples").glob("*.yaml") if not path.name.startswith("build_"))


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_parses(path: Path) -> None:
    config = parse("--config", str(path))
    assert config.data.train and config.model.name_or_path
    assert (REPO / config.deepspeed).is_file()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--train.early_stopping", "3"], "train.early_stopping needs a metric; set train.save_best"),
        (["--train.save_best", "eval/iid/group"], "needs evaluations during training; set train.eval_steps"),
        (["--train.save_best", "eval/ood/group", "--train.eval_steps", "5"], "is not a metric of data.evaluation (iid); write eval/SPLIT/"),
        (["--train.adam_beta2", "1"], "train.adam_beta2 must be from 0 to 0.9999999999999999, not 1"),
        (["--train.per_device_train_batch_size", "0"], "train.per_device_train_batch_size must be from 1 to 1000000, not 0"),
        (["--train.learning_rate", ".nan"], "train.learning_rate must be from 0 to 1e+38, not .nan"),
        (["--objective.csd.warmup", "1.5"], "objective.csd.warmup must be from 0 to 1, not 1.5"),
        (["--objective.fcd.soft", "-1"], "soft must not be negative"),
        (["--objective.csd.hinge_cap", "-1"], "hinge_cap must not be negative"),
        (["--objective.align.temperature", "0"], "temperature must be positive"),
        (["--objective.dpo.beta", "0"], "beta must be positive"),
        (["--train.max_steps", "0"], "train.max_steps must be at least 1, or -1"),
        (["--data.evaluation", '{"a/b": "x.jsonl"}'], "data.evaluation: 'a/b' names files and metrics"),
        (["--train.save_minutes", "-1"], "train.save_minutes must not be negative, and is -1"),
    ],
)
def test_values_that_no_run_can_have(argv: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse("--data.evaluation.iid=iid.jsonl", *argv)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"train: {seed: \xff}", "can't decode byte 0xff"),
        (b"[" * 5000, "run.yaml"),
        (b'train: !!python/object/apply:os.system ["touch here"]', "could not determine a constructor"),
    ],
)
def test_what_is_no_configuration_is_one_sentence(content: bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_bytes(content)
    for given in (["--config", "run.yaml"], ["--config=run.yaml"]):
        with pytest.raises(ConfigError, match=r"run\.yaml") as raised:
            parse(*given)
        assert said in str(raised.value) and str(raised.value).isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_aliases_are_for_a_few_values(written) -> None:
    assert (
        parse(*written("train: {learning_rate: &rate 1.0e-4}\nmodel: {projector: {learning_rate: *rate}}")).model.projector.learning_rate
        == 1e-4
    )


def test_data_are_no_file_of_options(tmp_path: Path) -> None:
    data = tmp_path / "groups.jsonl"
    data.write_text("{\n" * 300_000)
    for given in (["--data.train", str(data)], [f"--data.train={data}"]):
        assert parse_config([*given, f"--data.evaluation.test={data}"], OBJECTIVES).data.train == str(data)


def test_what_is_given_in_an_unusual_place_is_read_or_refused(tmp_path: Path) -> None:
    """A term of the command line by its section, one more source, a scalar beside its own section, YAML that contains itself."""
    model = ["--model.name_or_path", "x"]
    run = parse_config(
        [*model, "--objective", "{retain: {weight: 3}}", "--data.train", "[{path: a}]", "--data.train+", "{path: b}"], OBJECTIVES
    )
    assert run.objective["retain"].weight == 3 and [each.path for each in run.data.train] == ["a", "b"]  # type: ignore[union-attr]
    (tmp_path / "a.yaml").write_text("train: 5\ntrain.seed: 3\n")
    for given, reason in (
        (["--config", str(tmp_path / "a.yaml")], "'train' occurs twice, by itself and in its section"),
        (["--data.evaluation", "&a {b: *a}"], "data.evaluation: '&a {b: \\*a}' is not a manifest"),
        (["--train.learning_rate", "9" * 400], "train.learning_rate: expected a number"),
    ):
        with pytest.raises(ConfigError, match=reason):
            parse_config([*model, *given], OBJECTIVES)


def test_values_without_quotes_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    """PyYAML knows 1.1, to which off is false, 010 is 8, 1:30 is 90 and 1e-5 is a text."""
    file = tmp_path / "a.yaml"
    given = {
        "off": "off", "no": "no", "1:30": "1:30", "2024-01-02": "2024-01-02", "010": 10.0, "1e-5": 1e-5, "-3": -3, "0x1F": 31, "1.": 1.0,
        ".5": 0.5, "true": True, "FALSE": False, "null": None, "~": None, "": None, "1_000": "1_000", "-": [None], "'5'": "5", "0": 0,
    }  # fmt: skip
    for text, value in given.items():
        file.write_text(f"key: {text}\n" if text != "-" else "key:\n-\n")
        read = read_yaml(file)["key"]
        assert (type(read), read) == (type(value), value), text
    assert math.isnan(parse_yaml(".nan")) and parse_yaml("-.inf") == -math.inf
    assert parse_yaml("a: &a {b: 1}\nc: {<<: *a, d: 2}") == {"a": {"b": 1}, "c": {"b": 1, "d": 2}}
    file.write_text("train: {self_check: off}\n")
    assert parse_config(["--model.name_or_path", "x", "--config", str(file)], OBJECTIVES).train.self_check == "off"


def test_a_printed_configuration_reads_back_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts that are numbers or switches to YAML 1.1 or 1.2 are quoted."""
    names = {"1e5": "a", "08": "b", "off": "c", "1_0": "d", "12e03": "e"}
    given = "".join(f"    '{name}': {path}\n" for name, path in names.items())
    (file := tmp_path / "a.yaml").write_text(f"data:\n  evaluation:\n{given}")
    for _ in range(2):
        with pytest.raises(SystemExit):
            parse_config(["--model.name_or_path", "1.e5", "--config", str(file), "--print_config"], OBJECTIVES)
        file.write_text(capsys.readouterr().out)
    run = parse_config(["--config", str(file)], OBJECTIVES)
    assert (run.data.evaluation, run.model.name_or_path) == (names, "1.e5")
    assert yaml.safe_load(file.read_text())["data"]["evaluation"] == names


def test_an_option_given_in_a_wrong_way_is_refused_and_never_lost(tmp_path: Path) -> None:
    """What an attack found: values dropped, read as another value, or a traceback."""
    model = ["--model.name_or_path", "x"]
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("train: 5\n")
    second.write_text("train.seed: 3\n")
    for given, reason in (
        (["--config", str(first), "--config", str(second)], "'train' occurs twice"),
        (["--config", str(first), "--train.seed", "3"], "'train' occurs twice"),
        (["--data.root", ""], "--data.root is empty"),
        (["--deepspeed="], "--deepspeed is empty"),
        (["--quiet", "quiet"], "unknown option 'quiet'"),
        (["--data", "&a {b: *a}"], "data"),
        (["--train.seed", "0x" + "f" * 5000], "train.seed must be from"),
        (["--config", "x" * 300], "no such file"),
        (["--train.bf16", "1"], "train.bf16: expected .*, got '1'"),
        (["--train.max_steps", "010"], "train.max_steps: expected a whole number, got '010'"),
    ):
        with pytest.raises(ConfigError, match=reason):
            parse_config([*model, *given], OBJECTIVES)
    run = parse_config([*model, "--data.root", "#x", "--data.train", "[{path: a}]"], OBJECTIVES)
    assert run.data.root == "#x"
    assert parse_config([*model, "--data.root", "null", "--data.root+", "b"], OBJECTIVES).data.root == ["b"]
    second.write_text("data.evaluation: {test: a.jsonl}\n")
    for more, path in ((["--data.evaluation.test", "{path: b, root: c}"], "b"), (["--data.evaluation.test.root", "c"], "a.jsonl")):
        other = parse_config([*model, "--config", str(second), *more], OBJECTIVES)
        assert other.data.evaluation["test"] == EvaluationSet(path, "c")
