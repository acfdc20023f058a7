"""Commands as a person types them: help, one-sentence answers to bad input, scores, evaluation, export, and the runs that need them."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import (
    ONE,
    PROMPT,
    REPO,
    contents,
    environment,
    losses,
    metrics,
    only_sentence,
    plain_logp,
    plain_scores,
    printed,
    read_json,
    read_rows,
    refused,
    run_train,
    run_trainings,
    tensors,
    train_arguments,
    write_json,
    write_manifest,
)
from PIL import Image
from safetensors.torch import save_file
from tiny_llava import TinyLlavaConfig, build_tiny_llava
from transformers import AutoProcessor, LlavaForConditionalGeneration

from cfvlm_ds.checkpoint import SaveError
from cfvlm_ds.cli.exits import exit_cleanly
from cfvlm_ds.cli.main import main
from cfvlm_ds.cli.models import load_scorer
from cfvlm_ds.cli.options import model_named
from cfvlm_ds.cli.train import with_quickstart
from cfvlm_ds.cluster.signals import EXIT_DISK_FULL
from cfvlm_ds.core.config import BuildConfig, ModelConfig
from cfvlm_ds.core.distributed import run_on_rank0
from cfvlm_ds.core.errors import ConfigError, DataError, OutOfMemory, StorageError
from cfvlm_ds.core.parsing import parse_config
from cfvlm_ds.data import read_manifest
from cfvlm_ds.data.decoding import MAX_PIXELS
from cfvlm_ds.data.identity import data_identity
from cfvlm_ds.data.stored_scores import read_scores
from cfvlm_ds.evaluation import score_groups
from cfvlm_ds.objectives import OBJECTIVES

_DATA = "check view formats convert download prepare propose edit verify select audit run status sample"
_OTHERS = "tiny score calibrate describe evaluate compare track export init"
COMMANDS = [
    *(["data", name] for name in _DATA.split(" ")),
    *([name] for name in _OTHERS.split(" ")),
    *(["cluster", name] for name in ("check", "output_dir")),
]


# --- where commands read and print --------------------------------------------------------------------------------------------------------


def test_a_terminal_that_lacks_a_letter_ends_no_command(tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", str(tmp_path / "犬.jsonl")])
    terminal.flush()
    assert ended.value.code == 2 and rb"\u72ac.jsonl: no such manifest" in terminal.buffer.getvalue()  # type: ignore[attr-defined]


def test_files_that_cannot_be_read_or_written_are_one_sentence(tmp_path, capsys):
    (tmp_path / "file").touch()
    said = refused(capsys, "tiny", "llava", tmp_path / "file" / "model")
    assert f"{tmp_path / 'file'}" in said and "Not a directory; free some space, or correct the path or its permissions" in said
    for command in (["data", "check"], ["export"]):
        assert "; " in refused(capsys, *command, "/" + "y" * 5000)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        *((kind("the disk of x is full"), 2) for kind in (ConfigError, DataError, StorageError, SaveError, OutOfMemory)),
        *((OSError(number, os.strerror(number), "x"), code)
          for number, code in ((errno.ENOSPC, EXIT_DISK_FULL), (errno.EDQUOT, EXIT_DISK_FULL), (errno.EACCES, 2))),
    ],
    ids=repr,
)  # fmt: skip
def test_what_a_user_can_correct_is_one_sentence_and_an_exit_code(error, code, capsys):
    """Whichever it is, and whichever rank found it."""

    def found():
        raise error

    with pytest.raises(SystemExit) as ended:
        exit_cleanly(lambda: run_on_rank0(ONE, found))
    assert ended.value.code == code and str(error) in only_sentence(capsys.readouterr().err)


def test_a_reader_that_has_enough_is_no_error(bad):
    """As ``| head`` is."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", "from cfvlm_ds.cli.main import main; main()", "data", "check", str(bad["good"])]
    done = subprocess.run(command, cwd=REPO, env=environment(), stdout=writer, stderr=subprocess.PIPE, text=True, timeout=100, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


# --- help ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [*COMMANDS, [], ["data"]], ids=" ".join)
def test_help_has_an_example_that_parses(command, capsys, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    example = " ".join(capsys.readouterr().out.split()).rpartition("example: ")[2]
    assert example.startswith(" ".join(["cfvlm-ds", *command]))
    ran = []
    monkeypatch.setattr("cfvlm_ds.cli.main.exit_cleanly", ran.append)
    main(example.split()[1:])
    assert len(ran) == 1


def test_the_list_of_commands_is_the_one_tested_here(capsys):
    listed = []
    for prefix in ([], ["data"], ["cluster"]):
        with pytest.raises(SystemExit):
            main([*prefix, "--help"])
        names = capsys.readouterr().out.split("{")[1].split("}")[0].split(",")
        listed += [[*prefix, name] for name in names if name not in ("data", "cluster")]
    assert sorted(listed) == sorted([*COMMANDS, ["train"]]), "whose options are those of train.py"


# --- bad input ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A sound manifest, and one with a damaged picture in row 2 of 3; test_data has the other defects."""
    folder = tmp_path_factory.mktemp("bad")
    good = write_manifest(folder / "good.jsonl", 3, seed=5, ragged=False)
    (folder / "images" / "corrupt.png").write_bytes((folder / "images" / "good-0-0.png").read_bytes()[:60])
    corrupt = folder / "corrupt_image.jsonl"
    corrupt.write_text(good.read_text().replace("images/good-1-1.png", "images/corrupt.png"))
    return {"good": good, "corrupt_image": corrupt}


def test_data_check_names_file_and_row_and_takes_its_options(bad, model_dir, tmp_path, capsys):
    found = refused(capsys, "data", "check", bad["corrupt_image"], "--model", model_dir)
    assert re.match(rf"error: {bad['corrupt_image']}:2: .*images/corrupt.png", found)
    assert "problems         none" in printed(capsys, "data", "check", bad["good"], "--model", model_dir)
    for option, value, said in (
        ("--max_pixels", "2000", "48x48"), ("--max_pixels", "1", "(5 more"), ("--root", tmp_path, "no such image file"),
        ("--format", "cfgrop", "'cfgroup'"),
    ):  # fmt: skip
        assert said in refused(capsys, "data", "check", bad["good"], option, value)


# --- train.py refuses before it trains ------------------------------------------------------------------------------------------------
def test_train_py_refuses_before_it_starts(bad, model_dir, manifests, tmp_path):
    """What reading alone shows of an evaluation set and of a model whose index names another's weights; test_validation has the options."""
    hostile = shutil.copytree(model_dir, tmp_path / "hostile", ignore=shutil.ignore_patterns("*.safetensors"))
    index = {"weight_map": dict.fromkeys(tensors(model_dir), str(model_dir / "model.safetensors"))}
    write_json(hostile / "model.safetensors.index.json", index)
    for options, place in (
        ([f"--data.evaluation.test={bad['corrupt_image']}"], f"{bad['corrupt_image']}:2: "),
        ([f"--model.name_or_path={hostile}"], f"{hostile}/model.safetensors.index.json: "),
    ):
        arguments = train_arguments(model_dir, manifests, tmp_path / "run", *options)
        (said,) = run_train(1, arguments, code=2)
        assert said.count(f"error: {place}") == said.count("error: ") == 1 and "Traceback" not in said and "step 1" not in said
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


# --- the quickstart ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["--model.name_or_path", "M", "--data.train", "F"],
        ["--data.evaluation.test=F"],
        ["--model", "{name_or_path: M}"],
    ],
)
def test_a_model_or_data_of_ones_own_is_no_quickstart(options):
    """Nothing but what was asked for and the documented defaults."""
    asked = parse_config(options, OBJECTIVES)
    found = parse_config(with_quickstart(options), OBJECTIVES)
    assert found.resolved == asked.resolved
    assert found.build == BuildConfig() and found.train.learning_rate == 1e-5 and found.train.output_dir == "runs/default"


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ([], {}),
        (["--train.output_dir=X", "--deepspeed", "ds_configs/z2.json"], {"output_dir": "X"}),
        (["--train.num_train_epochs=2", "--train.max_steps=9"], {"num_train_epochs": 2.0, "max_steps": 9}),
        (["--objective.csd.weight=0", "--model.projector.tuning=frozen"], {}),
    ],
)
def test_other_options_change_the_quickstart(options, changed):
    quickstart = parse_config(["--config", "examples/quickstart.yaml"], OBJECTIVES)
    found = parse_config(with_quickstart(options), OBJECTIVES)
    assert found.build.habits is not None and found.data == quickstart.data
    assert found.train == dataclasses.replace(quickstart.train, **changed)


def test_slurm_finds_the_folder_of_the_same_run(capsys):
    for options, folder in (([], "runs/quickstart"), (["--model.name_or_path=M", "--data.train=F"], "runs/default")):
        main(["cluster", "output_dir", "--", *options])
        assert capsys.readouterr().out.strip().endswith(f"/{folder}")


# --- runs ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scores_file(model_dir, manifests, tmp_path_factory):
    out = tmp_path_factory.mktemp("scores") / "new" / "train.jsonl"
    main(["score", str(model_dir), str(manifests["train"]), "--out", str(out), "--batch_size", "7"])
    return out


@pytest.mark.parametrize(("dtype", "off"), [("float32", (0, 0)), ("bfloat16", (1e-5, 0.02))])
def test_reference_scores_in_a_training_runs_dtype(model_dir, manifests, scores_file, tmp_path, dtype, off):
    """On a CPU the default is float32; bfloat16 changes every score, by its rounding of 2^-8."""
    main(["score", str(model_dir), str(manifests["train"]), "--out", str(tmp_path / "o.jsonl"), "--batch_size", "7", "--dtype", dtype])
    every = [[row["logp"] for row in read_rows(file)[1:]] for file in (scores_file, tmp_path / "o.jsonl")]
    usual, found = (np.concatenate([np.ravel(matrix) for matrix in one]) for one in every)
    difference = np.abs(found / usual - 1)
    assert off[0] <= difference.mean() <= off[1], difference.mean()


def test_a_run_in_another_dtype_than_its_reference_scores_warns(model_dir, manifests, scores_file, tmp_path):
    options = ["--objective.dpo.weight=1", "--objective.align.weight=0", f"--data.scores={scores_file}", "--train.max_steps=1"]
    said = [
        run_train(1, train_arguments(model_dir, manifests, tmp_path / f"bf16={half}", *options, f"--train.bf16={half}"))[0]
        for half in ("false", "true")
    ]
    assert [f"{scores_file} was computed in float32, but this run trains in bfloat16" in one for one in said] == [False, True], said


def test_scores_that_are_not_finite_are_not_written(model_dir, manifests, tmp_path, capsys):
    broken = shutil.copytree(model_dir, tmp_path / "model") / "processor_config.json"
    described = read_json(broken)
    described["image_processor"]["image_mean"] = [math.nan] * 3
    write_json(broken, described)
    said = refused(capsys, "score", broken.parent, manifests["test"], "--out", tmp_path / "out.jsonl")
    assert said.startswith(f"error: {broken.parent}: scores of 10 of 10 groups") and not (tmp_path / "out.jsonl").exists()


@pytest.fixture(scope="module")
def runs(model_dir, manifests, scores_file, tmp_path_factory):
    """Short trainings in one process: ``z2``, ``z3`` (evaluated and exported), ``dpo``, and DPO of adapters with two kinds of reference."""
    folder = tmp_path_factory.mktemp("runs")
    dpo = ["--objective.dpo.weight=1", "--objective.align.weight=0"]
    modules = {"vision_tower": "frozen", "projector": "frozen", "language_model": "lora"}
    adapters = [*dpo, *(part for name, tuning in modules.items() for part in (f"--model.{name}.tuning", tuning))]
    extra = {
        "z2": ["--deepspeed", "ds_configs/z2.json"],
        "z3": [f"--data.evaluation.test={manifests['test']}", "--train.export=true"],
        "dpo": [*dpo, f"--data.scores={scores_file}", f"--data.evaluation.test={manifests['test']}"],
        "stored": [*adapters, f"--data.scores={scores_file}", "--model.lora.dropout=0", "--train.max_steps=3"],
        "off": [*adapters, "--train.max_steps=3", "--train.export=true", f"--data.evaluation.test={manifests['test']}"],
    }
    options = {
        name: train_arguments(model_dir, manifests, folder / name, "--train.max_steps=2", "--train.warmup_ratio=0", *more)
        for name, more in extra.items()
    }
    output = run_trainings(1, *options.values(), by="rank_functions:traced")
    traces = re.findall(r"^invalidated (\[.*\])$", output, re.MULTILINE)
    write_json(folder / "traces.json", dict(zip(options, map(json.loads, traces), strict=True)))
    return folder


@pytest.fixture(scope="module")
def plain(runs, model_dir, manifests):
    """Scores of the adapters on their base, of the base, and of the export, in a process without this package."""
    return plain_scores(manifests["test"], f"{model_dir}+{runs / 'off' / 'adapter'}", str(model_dir), str(runs / "z3" / "export"))


def test_stage_2_and_stage_3_take_the_same_steps(runs):
    assert len(losses(runs / "z3")) == 2
    assert losses(runs / "z2") == pytest.approx(losses(runs / "z3"), rel=1e-5)
    assert read_json(runs / "z2" / "ds_config.json")["zero_optimization"]["stage"] == 2


def test_dpo_starts_at_log_2(runs):
    """At the first step the policy is the reference, so every margin is 0 (arXiv 2305.18290, equation 7)."""
    first, second = (row for row in metrics(runs / "dpo") if "loss" in row)
    assert first["loss/dpo"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["dpo/margin"] == pytest.approx(0, abs=1e-5)
    assert abs(second["loss/dpo"] - math.log(2)) > 1e-4, "the policy moves away from the reference"


def test_a_reference_without_adapters_leaves_the_prefetch_of_weights_alone(runs):
    """Once a step is recorded, ZeRO-3 fetches weights before they are used, in that forward and in the trained one."""
    traces = read_json(runs / "traces.json")
    assert traces["off"][2] == traces["stored"][2] == 0 < traces["off"][0]


def test_without_its_adapters_the_model_is_the_reference(runs):
    """The same losses as with the scores that the model had before, three steps under ZeRO-3."""
    assert losses(runs / "off") == pytest.approx(losses(runs / "stored"), rel=1e-5)
    assert losses(runs / "off")[0] != pytest.approx(losses(runs / "off")[1], abs=1e-4)


def test_an_evaluation_compares_adapters_with_the_model_without_them(runs, model_dir, manifests):
    """DPO by hand, of the scores that the run has left and of those of the model that it began with; the other terms are there too."""
    groups = read_manifest(manifests["test"])
    scorer, collator, world = load_scorer(ModelConfig(str(model_dir)), max_pixels=MAX_PIXELS)
    before = score_groups(scorer, collator, groups, world)
    after = {row["id"]: row["logp"] for row in map(json.loads, (runs / "off" / "scores" / "test.jsonl").read_text().splitlines()[1:])}
    means = []
    for group, reference in zip(groups, before, strict=True):
        ratio = [[now - was for now, was in zip(*rows, strict=True)] for rows in zip(after[group.id], reference.logp.tolist(), strict=True)]
        pairs = []
        for i, row in enumerate(group.match):  # of the star's cells: all texts on the first image, the first text on all
            false = [c for c, truth in enumerate(row) if truth == 0 and (i == 0 or c == 0)]
            pairs += [0.1 * (ratio[i][d] - ratio[i][c]) for c, truth in enumerate(row) if truth == 1 for d in false]
        means += [sum(math.log1p(math.exp(each)) for each in pairs) / len(pairs)] if pairs else []
    found = metrics(runs / "off")[-1]
    assert found["eval/test/loss_dpo"] == pytest.approx(sum(means) / len(means), rel=1e-5) != pytest.approx(math.log(2), abs=1e-6)
    assert found["eval/test/loss"] == pytest.approx(found["eval/test/loss_dpo"] + sum(
        weight * found[f"eval/test/loss_{name}"] for name, weight in (("csd", 0.5), ("fcd", 0.7))
    ))  # fmt: skip
    whole = metrics(runs / "dpo")[-1]
    assert "eval/test/loss_csd" in whole and "eval/test/loss_dpo" not in whole and "eval/test/loss" not in whole
    assert "eval/test/loss_dpo is not computed: it needs reference scores" in (runs / "dpo" / "results.md").read_text()


def test_export_of_adapters(runs, model_dir, tmp_path, capsys):
    """The run's own adapters are those of the command, which merges them when not told otherwise."""
    main(["export", str(runs / "off"), "--adapter", "--out", str(tmp_path / "adapter")])
    written = tensors(tmp_path / "adapter")
    assert written.keys() == tensors(runs / "off" / "adapter").keys() and not (runs / "off" / "export").exists()
    assert len({path.stat().st_mode for path in (tmp_path / "adapter").iterdir()}) == 1  # as the umask has it
    assert read_json(tmp_path / "adapter" / "adapter_config.json")["base_model_name_or_path"] == str(model_dir)
    main(["export", str(runs / "off"), "--out", str(tmp_path / "merged")])
    merged, source = tensors(tmp_path / "merged"), tensors(model_dir)
    changed = {name for name in source if not merged[name].equal(source[name])}
    assert changed == {name for name in source if "language_model" in name and "_proj." in name}
    assert "no adapters" in refused(capsys, "export", runs / "z3", "--adapter", "--out", tmp_path / "none")
    before, limits = tensors(tmp_path / "adapter"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        assert "adapter cannot be written" in refused(capsys, "export", runs / "off", "--adapter", "--out", tmp_path / "adapter")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(tensors(tmp_path / "adapter")[name].equal(tensor) for name, tensor in before.items())


def test_adapters_on_a_base_of_4_bits(manifests, tmp_path):
    """QLoRA under ZeRO-2, with bitsandbytes' CPU code: near the whole base's loss at the first step, and adapters that peft loads."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    captions = [candidate.text for group in read_manifest(manifests["train"]) for candidate in group.candidates]
    model = build_tiny_llava(TinyLlavaConfig(str(tmp_path / "model"), hidden_size=64, vision_hidden_size=32), captions)
    modules = {"vision_tower": "frozen", "projector": "frozen", "language_model": "lora"}
    options = ["--deepspeed", "ds_configs/z2.json", "--train.export=true"]
    options += [part for name, tuning in modules.items() for part in (f"--model.{name}.tuning", tuning)]
    trainings = [
        train_arguments(model, manifests, tmp_path / name, *options, "--model.lora.load_in_4bit", wanted)
        for name, wanted in (("whole", "false"), ("quarter", "true"))
    ]
    run_trainings(1, *trainings)
    whole, quarter = losses(tmp_path / "whole"), losses(tmp_path / "quarter")
    assert quarter[0] == pytest.approx(whole[0], rel=0.05) and quarter[0] != pytest.approx(whole[0], rel=1e-4)
    assert quarter[-1] < quarter[0] - 0.3
    adapted = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(model), tmp_path / "quarter" / "adapter")
    assert sum(bool(p.any()) for name, p in adapted.named_parameters() if "lora_B" in name) == 3 * 7
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "quarter"), "--out", str(tmp_path / "merged")])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda weights, name: weights.pop(name), "has 1 missing keys: "),
        (lambda weights, name: weights.update({name: weights[name][:3]}), "has 1 mismatched keys: "),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_not_this_model_is_named_under_zero_3(edit, message, model_dir, manifests, tmp_path):
    broken = shutil.copytree(model_dir, tmp_path / "broken")
    weights = tensors(broken)
    name = next(name for name in weights if "linear_1.weight" in name)
    edit(weights, name)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    (output,) = run_train(1, train_arguments(broken, manifests, tmp_path / "run"), code=2)
    assert f"{message}model.{name}" in output


def test_manifests_of_one_name_have_a_row_each(model_dir, manifests, tmp_path, capsys):
    lines = manifests["test"].read_text().splitlines()
    for folder, rows in (("iid", lines[:2]), ("ood", lines[2:3])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.jsonl").write_text("\n".join(rows))
    named = [str(tmp_path / folder / "test.jsonl") for folder in ("iid", "ood")]
    options = ["--root", str(manifests["test"].parent), "--out", str(tmp_path / "r.json")]
    shown, written = printed(capsys, "evaluate", model_dir, *named, *options), read_json(tmp_path / "r.json")
    assert list(written) == ["iid/test", "ood/test"] and all(name in shown for name in written)
    assert named[0] in refused(capsys, "evaluate", model_dir, named[0], named[0])


def test_evaluate_prints_the_table_of_the_run(runs, manifests, tmp_path, capsys):
    """The exported folder, scored in one process with another batch size, has the run's own results."""
    out = tmp_path / "e" / "r.json"
    said = printed(capsys, "evaluate", runs / "z3" / "export", manifests["test"], "--out", out, "--batch_size", "3").strip()
    shown = "\n".join(line for line in said.splitlines() if not line.startswith("evaluating "))  # of a slow machine
    of_run = (runs / "z3" / "results.md").read_text().partition("(train.eval_on_start is false).\n\n")[2]
    assert of_run.startswith(shown) and "| random scores |" in shown and "| test | mean of edit types, blank image |" in shown
    found, of_run = (read_json(path)["test"] for path in (out, runs / "z3" / "results.json"))
    assert found[-1].pop("nll") == pytest.approx(of_run[-1].pop("nll"), rel=1e-6), "sums of other batches"
    assert [row | {"losses": {}} for row in of_run] == found and of_run[-1]["losses"].keys() == {"align", "csd", "fcd"}


def test_exports_have_cards_with_what_the_run_knows(runs, tmp_path):
    """Written with the export, completed by the evaluation, and the same, as are the weights, when the checkpoint is exported again."""
    card = (runs / "z3" / "export" / "README.md").read_text()
    for line in (runs / "z3" / "results.md").read_text().splitlines():
        if line.startswith(("| test | mean", "| random scores")):
            assert line.replace("| mean of edit types |", "| `mean of edit types` |") in card, line
    for given in (runs / "z3", runs / "z3" / "checkpoint-2"):
        main(["export", str(given), "--out", str(tmp_path / given.name)])
        again, first = contents(tmp_path / given.name), contents(runs / "z3" / "export")
        assert again.keys() == first.keys() and again["model.safetensors"] == first["model.safetensors"]
    assert (tmp_path / "z3" / "README.md").read_text() == card
    assert "library_name: peft" in (runs / "off" / "adapter" / "README.md").read_text()


def test_evaluate_takes_run_folders_and_adapters(runs, plain, manifests, capsys):
    """A run folder stands for its export, or for its adapters; these score as peft's own model does."""
    assert printed(capsys, "evaluate", runs / "z3", manifests["test"]).strip() in (runs / "z3" / "results.md").read_text()
    (adapted, base, _), groups, tables = plain, read_manifest(manifests["test"]), []
    for named in (runs / "off", runs / "off" / "adapter"):
        model, adapter = model_named(str(named))
        scorer, collator, world = load_scorer(model, adapter, max_pixels=MAX_PIXELS)
        for group, score in zip(groups, score_groups(scorer, collator, groups, world), strict=True):
            assert score.logp.tolist() == [pytest.approx(line, rel=1e-4) for line in adapted[group.id]], group.id
        tables.append(printed(capsys, "evaluate", named, manifests["test"]))
    assert tables[0] == tables[1] and "| random scores |" in tables[0]
    moved = [
        abs(a - b) for name in base for line, other in zip(adapted[name], base[name], strict=True) for a, b in zip(line, other, strict=True)
    ]
    assert max(moved) > 0.05, "the adapters have an effect"
    assert "contains only adapters, but stored scores need a whole model" in refused(capsys, "score", runs / "off", manifests["test"])
    assert f"{runs / 'z2'} is a run folder without an export" in refused(capsys, "evaluate", runs / "z2", manifests["test"])
    weights = tensors(runs / "off" / "adapter")
    weights.popitem()
    broken = shutil.copytree(runs / "off" / "adapter", runs / "broken")
    save_file(weights, broken / "adapter_model.safetensors")
    assert "1 weights have no counterpart" in refused(capsys, "evaluate", broken, manifests["test"])


def test_describe_writes_and_prefers_as_the_library_does(runs, model_dir, manifests, tmp_path, capsys, monkeypatch):
    export, texts = runs / "z3" / "export", ("a red circle and a blue square", "a blue square and a red circle")
    (picture,) = read_manifest(manifests["test"])[0].images[0]
    model, processor = LlavaForConditionalGeneration.from_pretrained(export).eval(), AutoProcessor.from_pretrained(export)
    inputs = processor(images=Image.open(picture), text="USER: <image>\nWhat is this? ASSISTANT:", return_tensors="pt")
    whole = model.generate(**inputs, do_sample=False, max_new_tokens=7)
    expected = processor.decode(whole[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    main(["describe", str(runs / "z3"), str(picture), "--prompt", "What is this?", "--max_new_tokens", "7"])
    assert capsys.readouterr().out == f"{picture}\n{expected}\n\n" and expected

    main(["describe", str(export), str(picture), "--choices", *texts])
    *lines, preferred = capsys.readouterr().out.splitlines()[2:5]
    rows = [line.split(maxsplit=4) for line in lines]
    nats = {text: plain_logp(model, processor, (picture,), PROMPT, text)[0].sum().item() for text in texts}
    assert [row[4].strip("'") for row in rows] == sorted(texts, key=nats.__getitem__, reverse=True)
    for seen, behind, blank, gain, text in rows:
        assert float(seen) == pytest.approx(nats[text.strip("'")], abs=0.006) and float(behind) == pytest.approx(
            max(nats.values()) - nats[text.strip("'")], abs=0.011
        )
        assert float(gain) == pytest.approx(float(seen) - float(blank), abs=0.011)
    assert rows[0][4] in preferred
    for wrong in (texts[:1], texts[:1] * 2):
        assert "at least two texts" in refused(capsys, "describe", export, picture, "--choices", *wrong)

    (broken := tmp_path / "broken.png").write_bytes(b"no picture")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{broken}\n{picture}\n\nnever read\n"))
    with pytest.raises(SystemExit):
        main(["describe", str(model_dir), "--max_new_tokens", "3"])
    printed = capsys.readouterr()
    assert f"\n{picture}\n" in printed.out and "never read" not in printed.out
    assert f"error: {broken}: " in printed.err, "the others were described"
    assert f"{tmp_path / 'none.png'}" in refused(capsys, "describe", model_dir, picture, tmp_path / "none.png")


def test_export_scores_the_same_under_plain_transformers(runs, plain, manifests):
    groups = read_manifest(manifests["test"])
    stored = read_scores(runs / "z3" / "scores" / "test.jsonl", groups, data_identity(groups, [manifests["test"].parent]))
    assert set(plain[2]) == set(stored)
    for name, scores in stored.items():
        for ours, theirs in zip(scores.logp, plain[2][name], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5), name


def test_export_of_a_damaged_checkpoint_leaves_nothing(runs, tmp_path, capsys):
    shutil.copytree(runs / "z3" / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copy(runs / "z3" / "config.yaml", tmp_path)
    shard = next((tmp_path / "checkpoint-2").glob("*optim_states.pt"))
    whole = bytearray(shard.read_bytes())
    whole[len(whole) // 2] ^= 1
    for content, defect in ((whole, "damaged"), (whole[:-1], "instead of")):  # one bit of a weight, and a file cut short
        shard.write_bytes(content)
        said = refused(capsys, "export", tmp_path / "checkpoint-2")
        assert shard.name in said and defect in said and not (tmp_path / "export").exists()
