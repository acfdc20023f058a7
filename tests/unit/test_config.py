"""Parsing of a run's configuration: precedence, strictness, and what each mistake is answered with."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from conftest import REPO, refused

from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.data_config import EvaluationSet, Source
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.parsing import parse_config
from cfvlm_ds.core.reading import parse_yaml, read_yaml
from cfvlm_ds.objectives import OBJECTIVES


def parse(*argv: str) -> RunConfig:
    return parse_config(argv, OBJECTIVES, prog="train.py")


@pytest.fixture
def written(tmp_path):
    def write(text: str) -> list[str]:
        path = tmp_path / "run.yaml"
        path.write_bytes(text.encode(errors="surrogateescape"))
        return ["--config", str(path)]

    return write


def test_every_split_may_have_a_root_and_a_format_of_its_own(tmp_path):
    """From YAML and from the command line; what a split does not say is the training data's."""
    (file := tmp_path / "c.yaml").write_text(
        "data: {root: [/a, /b], evaluation: {plain: p.jsonl, own: {path: o.jsonl, root: /r, format: pairs}, train: {path: t.jsonl}}}"
    )
    data = parse("--config", str(file), "--data.train", "x.jsonl", "--data.evaluation.more.path", "m.jsonl").data
    roots = ["/a", "/b"]
    assert data.train_sets == {"train": Source("x.jsonl", roots, "auto")}
    assert data.evaluation_sets == {
        "plain": EvaluationSet("p.jsonl", roots, "auto"),
        "own": EvaluationSet("o.jsonl", "/r", "pairs"),
        "train": EvaluationSet("t.jsonl", roots, "auto"),
        "more": EvaluationSet("m.jsonl", roots, "auto"),
    }
    assert [parse(f"--data.root={root}").data.train_sets["train"].root for root in ("/a", "[/a,/b]")] == ["/a", ["/a", "/b"]]


def test_an_evaluation_set_is_a_manifest_or_a_benchmark(written):
    data = parse(*written("data: {evaluation: {a: m.jsonl, crepe: {benchmark: sugarcrepe, root: /b, limit: 7, probe: match}}}")).data
    assert list(data.evaluation_sets) == ["a"]
    assert data.benchmark_sets == {"crepe": EvaluationSet(root="/b", limit=7, benchmark="sugarcrepe", probe="match")}


MIXTURE = """
data:
  format: pairs
  root: /r
  train:
    - {path: a/groups.jsonl, format: cfgroup, weight: 2}
    - {path: b/chat.jsonl, name: chat, weight: 1, limit: 5, objectives: [align], root: /own}
"""


def test_training_data_may_be_a_list_of_sources(written):
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


MISTAKES: dict[str, tuple[str, ...]] = {
    "train.early_stopping": ("--train.early_stopping 3",),
    "'train.max_steps'": ("train: {max_step: 7}", "trian: {max_steps: 7}", "--train.steps 3"),
    "'train.learning_rate'": ("--learning_rate=1",),
    "'train.per_device_train_batch_size'": ("--batch_size=1",),
    "'train.num_train_epochs'": ("--train.epochs 1",),
    "'model.name_or_path'": ("--model.path 1",),
    "'model.lora.rank'": ("--lora_rank 1",),
    "'objective.csd.weight'": ("objective: {csd: {wieght: 1}}",),
    "'data.train.weight'": ("data: {train: [{path: a.jsonl, wieght: 1}]}",),
    "'deepspeed'": ("--train.deepspeed 1",),
    "; see --help": tuple(f"--{name} 1" for name in ("cutoff_len", "train.optim", "lr")),
    "train.learning_rate": ("train: {learning_rate: fast}", "--train.learning_rate=fast", f"--train.learning_rate {'9' * 400}",
                            "--train.learning_rate .nan"),
    "train.max_steps": ("train: {max_steps: 1.5}", "train: {max_steps: null}", "--train.max_steps 010", "--train.max_steps 0"),
    "train.bf16": ("train: {bf16: maybe}", "--train.bf16 1"),
    "train.seed": ("--train.seed " + "[" * 5000, "--train.seed 0x" + "f" * 5000, "--train.seed --train.max_steps 3"),
    "train.dry_run": ("--train.dry_run",),
    "train.adam_beta2": ("--train.adam_beta2 1",),
    "train.save_best": ("--train.save_best eval/iid/group", "--train.save_best eval/ood/group --train.eval_steps 5"),
    "train.output_dir is empty": ("--train.output_dir=",),
    **{f"train.{name}": (f"--train.{name} -1",) for name in ("save_minutes", "stop_margin_s", "hang_timeout_s")},
    "train": ("train: 5", "train: null"),
    "'train' occurs twice": ("train: 5\ntrain.seed: 3\n",),
    "model.vision_tower.tuning": ("model: {vision_tower: {tuning: freeze}}", "model: {vision_tower: frozen}", "model: {vision_tower: 5}"),
    "model.name_or_path": ("--model org/name", "org/name a.jsonl"),
    "data.root": ("data: {root: 3}", "--data.root="),
    "data.train": ("data: groups.jsonl", *(f"data: {{train: [{source}]}}" for source in (
        "{path: a, weight: -1}", "{path: a, weight: much}", "{path: a, limit: 0}", "{weight: 1}", "3", "{path: ''}"))),
    "objectives of 'a.jsonl'": ("data: {train: [{path: a.jsonl, objectives: []}]}",),
    "'y' has no weight": ("data: {train: [{path: x.jsonl, weight: 1}, {path: y.jsonl}]}",),
    "both called 'x'": ("data: {train: [{path: a/x.jsonl}, {path: b/x.json}]}",),
    "'a/b'": ("data: {train: [{path: a.jsonl, name: a/b}]}", "data: {evaluation: {a/b: x.jsonl}}"),
    "data.evaluation": ("data: {evaluation: test.jsonl}", "data: {evaluation: [a.jsonl]}", "--data.evaluation.a.root /x",
                        "--data.evaluation=&a{b:*a}", *(f"data: {{evaluation: {{a: {each}}}}}" for each in ("{root: /a}", "3", "''"))),
    "'pope'": tuple(f"data: {{evaluation: {{a: {{benchmark: pope{more}}}}}}}" for more in ("", ", root: [/a, /b]", ", root: /a, path: m")),
    "'match'": ("data: {evaluation: {a: {path: m.jsonl, probe: match}}}",),
    "'nll'": ("objective: {nll: {}}",),
    "objective.align": ("objective: {align: }",),
    "objective.csd": ("objective: {csd: null}", "--objective.csd.mode crossed", "--objective.csd.warmup 1.5"),
    "weight 0": (" ".join(f"--objective.{name}.weight 0" for name in OBJECTIVES),),
    **{f"{option} must": (f"--objective.{term}.{option} {value}",) for term, option, value in (
        ("csd", "hinge_cap", -1), ("csd", "margin", 0), ("batch_align", "temperature", 0), ("dpo", "beta", 0),
        ("contrast_distill", "beta", 0))},
    "run.yaml": ("hello", "[" * 5000, "train: {seed: \udcff}", 'train: !!python/object/apply:os.system ["touch here"]'),
    "run.yaml: broken YAML at line 1, column 16": ("train: {seed: 1",),
    "--config": ("my.yaml", "--config=", "--config .", "--config no/such.yaml", f"--config {'x' * 300}"),
    "one of examples/qwen2_5_vl_72b.yaml": ("--config qwen2_vl.yaml",),
    "`deepspeed --num_gpus 1 train.py`": ("--local_rank=0 --num_gpus 1",),
    "--deepspeed": ("--deepspeed=",),
    }  # fmt: skip
"""What a refusal has to name -> files of options, or command lines that begin with --, or words that are no option."""


@pytest.mark.parametrize("named", MISTAKES)
def test_a_mistake_is_one_sentence_that_names_the_option(written, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in MISTAKES[named]:
        line = given.startswith("--") or given in ("my.yaml", "org/name a.jsonl")
        with pytest.raises(ConfigError) as raised:
            parse("--data.evaluation.iid=iid.jsonl", *(given.split(" ") if line else written(given))).data.train_sets  # noqa: B018
        said = str(raised.value)
        assert named in said and said.isprintable() and "class '" not in said, given[:80]
        assert len(said) < 900 + len(given) and "here" not in os.listdir(tmp_path)


def test_a_mistyped_file_of_options_is_the_one_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("twenty.yaml").touch()
    with pytest.raises(ConfigError, match=r"did you mean 'twenty.yaml'\?$"):
        parse("--config", "twnty.yaml")


def test_a_value_of_one_file_and_a_section_of_another_are_refused(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("train: 5\n")
    second.write_text("train.seed: 3\ndata.evaluation: {test: a.jsonl}\n")
    for more in (["--config", str(second)], ["--train.seed", "3"]):
        with pytest.raises(ConfigError, match="'train' occurs twice"):
            parse("--config", str(first), *more)
    for given, path in ((["--data.evaluation.test", "{path: b, root: c}"], "b"), (["--data.evaluation.test.root", "c"], "a.jsonl")):
        assert parse("--config", str(second), *given).data.evaluation["test"] == EvaluationSet(path, "c")


def test_values_in_unusual_places_are_read(written, tmp_path):
    run = parse("--objective", "{retain: {weight: 3}}", "--data.train", "[{path: a}]", "--data.root", "#x")
    assert run.objective["retain"].weight == 3 and [each.path for each in run.data.train] == ["a"] and run.data.root == "#x"  # type: ignore[union-attr]
    assert parse("--data.root", "null").data.root is None
    shared = parse(*written("train: {learning_rate: &rate 1.0e-4}\nmodel: {projector: {learning_rate: *rate}, max_pixels: null}"))
    assert shared.model.projector.learning_rate == 1e-4
    for spelled, meant in (("true", True), ("false", False), ("auto", "auto")):
        assert parse(*written(f"train: {{bf16: {spelled}}}")).train.bf16 == parse("--train.bf16", spelled).train.bf16 == meant
    (data := tmp_path / "groups.jsonl").write_text("{\n" * 300_000)  # which no option reads
    for given in (["--data.train", str(data)], [f"--data.train={data}"]):
        assert parse(*given, f"--data.evaluation.test={data}").data.train == str(data)
    assert set(parse(*written("objective: {align.weight: 1, csd: {}}")).objective) == {"align", "csd"}


def test_defaults_then_yaml_then_command_line(written):
    given = written("train: {max_steps: 7, seed: 3}\nobjective: {csd: {margin: 0.125}}\n")
    assert (parse().train.max_steps, parse().train.seed, parse().train.save_steps) == (-1, 0, 500)
    config = parse(*given, "--train.max_steps", "9", "--objective.fcd.margin=0.5")
    assert (config.train.max_steps, config.train.seed, config.train.save_steps) == (9, 3, 500)
    assert config.objective["csd"].margin == 0.125 and config.objective["fcd"].margin == 0.5
    assert parse("--train.max_steps", "9", *given).train.max_steps == 7, "options apply in the order they are written"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("evaluate a b --batchsize 4", "'--batchsize'; did you mean --batch_size?"),
        ("export runs/mine --merge", "'--merge'; see `cfvlm-ds export --help`"),
    ],
)
def test_what_a_command_does_not_take_is_one_sentence(line, named, capsys):
    assert named in refused(capsys, *line.split())


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
def test_a_run_has_the_terms_that_are_named(stated, options, terms, written):
    """A file states the whole objective, the command line adds to it; none named is the default. Always in one order, as sums are."""
    config = parse(*(written(stated) if stated else ()), *options)
    assert list(config.objective) == list(config.resolved["objective"]) == terms
    assert parse(*written(yaml.safe_dump(dict(config.resolved)))).objective == config.objective


def test_several_files_state_the_objective_together(tmp_path):
    for name in ("align", "dpo"):
        (tmp_path / name).write_text(f"objective: {{{name}: {{weight: 2}}}}")
    config = parse("--config", str(tmp_path / "dpo"), f"--config={tmp_path / 'align'}")
    assert config.loss == "2 align + 2 dpo"


def test_print_config_parses_back_to_the_same(written, capsys):
    given = [*written("train: {max_steps: 7, bf16: false}\ndata: {evaluation: {a: b}}"), "--objective.csd.weight", "0.1"]
    given += ["--build.habits.out_dir", "x", "--model.projector.learning_rate", "2e-4", "--deepspeed", "mine.json"]
    with pytest.raises(SystemExit) as ended:
        parse(*given, "--print_config")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    expected = parse(*given)
    assert expected.resolved["train"]["max_steps"] == 7 and "max_steps: 7" in printed
    for text in (printed, yaml.safe_dump(dict(expected.resolved))):  # as config.yaml of a run folder is
        again = parse(*written(text))
        assert again.resolved == expected.resolved
        assert dataclasses.asdict(again.train) == dataclasses.asdict(expected.train)
    assert set(expected.resolved) == {"model", "data", "train", "tracking", "build", "objective", "deepspeed"}


def test_a_researcher_s_objective_gets_its_options():
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
    with pytest.raises(ConfigError, match=r"'objective\.mine\.sharpness'"):
        parse_config(["--objective.mine.sharpnes", "4"], mapping)


EXAMPLES = sorted(path for path in (REPO / "examples").glob("*.yaml") if not path.name.startswith("build_"))


def test_every_example_parses():
    assert len(EXAMPLES) > 3
    for path in EXAMPLES:
        config = parse("--config", str(path))
        assert config.data.train and config.model.name_or_path and (REPO / config.deepspeed).is_file()


def test_values_without_quotes_are_those_of_yaml_1_2(tmp_path):
    """PyYAML knows 1.1, to which off is false, 010 is 8, 1:30 is 90 and 1e-5 is a text."""
    file = tmp_path / "a.yaml"
    given = {
        "off": "off", "1:30": "1:30", "2024-01-02": "2024-01-02", "010": 10.0, "1e-5": 1e-5, "-3": -3, "0x1F": 31, "FALSE": False,
        "~": None, "": None, "1_000": "1_000", "'5'": "5",
    }  # fmt: skip
    for text, value in given.items():
        file.write_text(f"key: {text}\n")
        read = read_yaml(file)["key"]
        assert (type(read), read) == (type(value), value), text
    assert math.isnan(parse_yaml(".nan")) and parse_yaml("-.inf") == -math.inf
    assert parse_yaml("a: &a {b: 1}\nc: {<<: *a, d: 2}") == {"a": {"b": 1}, "c": {"b": 1, "d": 2}}
    file.write_text("train: {self_check: off}\n")
    assert parse_config(["--model.name_or_path", "x", "--config", str(file)], OBJECTIVES).train.self_check == "off"
