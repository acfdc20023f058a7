"""Benchmarks as they are started: by ranks that share the work, after a kill, from a script of one's own, and within a training."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import caption, contents, draw, metrics, printed, read_json, read_rows, run_ranks, run_train, train_arguments, write_json
from test_suite import SCENES
from transformers import LlavaForConditionalGeneration

from cfvlm_ds.core.config import HabitsConfig, ModelConfig
from cfvlm_ds.demo.base import write_base
from cfvlm_ds.demo.habits import build_habits
from cfvlm_ds.models import adapter_fingerprint, fingerprint

COMMAND = """\
import sys
from cfvlm_ds.cli.main import main
main(sys.argv[1:])
"""
KILLED = """\
import os, signal, sys
from cfvlm_ds.cli.main import main
from cfvlm_ds.evaluation.suite.results import Partial

add, calls = Partial.add, [0]


def killed(self, rows):
    add(self, rows)
    calls[0] += 1
    if calls[0] == 2:
        os.kill(os.getpid(), signal.SIGKILL)


Partial.add = killed
main(sys.argv[1:])
"""
OWN = '''\
"""A benchmark of one's own: a table of photographs, each with a good and a bad text."""
import sys
from cfvlm_ds.cli.main import main
from cfvlm_ds.evaluation.benchmarks import BENCHMARKS, Benchmark, File, Item
from cfvlm_ds.evaluation.benchmarks.metrics import accuracy


def item(row):
    picture = row.picture(row["photo"], "photos")
    return Item(row["n"], ((picture,),), (row.text("good"), row.text("bad")), ((1, 0),), cluster=row["photo"])


mine = File("mine.tsv", columns=("n", "photo", "good", "bad"), rows=3)
BENCHMARKS["mine"] = Benchmark("Mine", (mine,), item, accuracy, "accuracy", ("match", "caption"))
main(sys.argv[1:])
'''


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "sugarcrepe" / "data").mkdir(parents=True)
    for number in range(9):
        draw(folder / "coco" / "val2017" / f"{number}.png", [*SCENES[number % 3]])
    for place, subset in enumerate(("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")):
        rows = [
            {
                "filename": f"{n}.png",
                "caption": caption(scene),
                "negative_caption": caption([("blue", scene[0][1]), ("green", scene[1][1])]),
            }
            for n, scene in ((3 * k + place % 3, SCENES[place % 3]) for k in range(3))
        ]
        write_json(folder / "sugarcrepe" / "data" / f"{subset}.json", dict(enumerate(rows)))
    (folder / "mine" / "photos").mkdir(parents=True)
    draw(folder / "mine" / "photos" / "a.png", SCENES[0])
    (folder / "mine" / "mine.tsv").write_text(
        "n\tphoto\tgood\tbad\n1\ta.png\ta red circle\ta green circle\n2\ta.png\ta blue square\ta cat\n"
    )
    return folder


def started(ranks: int, script: str, arguments: list[str], folder: Path, name: str) -> list[tuple[int, str]]:
    (path := folder / f"{name}.py").write_text(script)
    return run_ranks(ranks, "forkserver_ranks:script", str(path), arguments, timeout=200)


def options(model_dir: Path, root: Path, out: Path, *more: str) -> list[str]:
    asked = ["--benchmarks", "sugarcrepe", "--probes", "caption", "--batch_size", "2", "--draws", "20", "--num_workers", "0"]
    return ["evaluate", str(model_dir), *asked, "--benchmark_root", str(root), "--out", str(out), *more]


def test_ranks_and_a_kill_give_the_bytes_of_one_undisturbed_rank(model_dir, root, tmp_path):
    """One rank; three; and two of which one is killed after two of three rounds, which two others go on from."""
    for ranks in (1, 3):
        ended = started(ranks, COMMAND, options(model_dir, root, tmp_path / f"ranks-{ranks}"), tmp_path, f"on-{ranks}")
        assert [code for code, _ in ended] == [0] * ranks, ended
        assert sum(text.count("points") for _, text in ended) == 1, "one rank prints"
    whole = contents(tmp_path / "ranks-1")
    assert set(whole) == {"results.md", "sugarcrepe/caption/results.json", "sugarcrepe/caption/items.jsonl"}
    assert contents(tmp_path / "ranks-3") == whole
    ended = started(2, KILLED, options(model_dir, root, tmp_path / "killed"), tmp_path, "killed")
    assert all(code for code, _ in ended) and "sugarcrepe/caption/scores.jsonl" in contents(tmp_path / "killed"), ended
    ended = started(2, COMMAND, options(model_dir, root, tmp_path / "killed"), tmp_path, "again")
    assert [code for code, _ in ended] == [0, 0], ended
    assert "items are on disk; only the others are computed" in ended[0][1]
    assert contents(tmp_path / "killed") == whole


@pytest.mark.long
def test_a_model_in_parts_says_the_same(model_dir, root, tmp_path):
    ended = started(2, COMMAND, options(model_dir, root, tmp_path / "parts", "--zero3"), tmp_path, "parts")
    ended += started(1, COMMAND, options(model_dir, root, tmp_path / "whole"), tmp_path, "whole")
    assert [code for code, _ in ended] == [0, 0, 0], ended
    one, other = ([row["seen"] for row in read_rows(tmp_path / name / "sugarcrepe/caption/items.jsonl")] for name in ("parts", "whole"))
    assert len(one) == len(other) == 21 and all(a[0] == pytest.approx(b[0], rel=1e-5) for a, b in zip(one, other, strict=True))


def test_a_benchmark_of_ones_own_is_registered_from_a_script(model_dir, root, tmp_path):
    """Evaluated, and compared with itself, by a script that touches nothing of the package."""
    arguments = ["evaluate", str(model_dir), "--benchmarks", "mine", "--benchmark_root", str(root), "--out", str(tmp_path / "out")]
    ((code, said),) = started(1, OWN, arguments, tmp_path, "own")
    assert (
        code == 0
        and "mine.tsv has 2 rows, the published 3" in said
        and re.search(r"\| mine \(own files\) \| match \| 2 \| \d \| accuracy \|", said)
    )
    ((code, said),) = started(1, OWN, ["compare", str(tmp_path / "out"), str(tmp_path / "out")], tmp_path, "compared")
    assert code == 0 and "| mine (own files) | match | accuracy |" in said


def test_a_partitioned_training_writes_what_evaluate_writes(manifests, tmp_path, capsys):
    """Before and after training, each of two ranks writes a part of the texts; the export alone writes the same as at the end."""
    world = build_habits(HabitsConfig(str(tmp_path / "world"), num_train=1, num_test=3), progress=lambda line: None)
    run_dir, probe, model_dir = tmp_path / "run", "write:max_new_tokens=8", write_base(tmp_path / "base")
    LlavaForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32).save_pretrained(model_dir)  # as the run computes
    evaluated = {"wrote": {"benchmark": "habits", "root": str(world), "probe": probe}}
    more = ["--data.evaluation", json.dumps(evaluated), "--train.max_steps=2", "--train.eval_on_start=true", "--train.export=true"]
    run_train(2, train_arguments(model_dir, manifests, run_dir, *more))
    assert sum("eval/wrote/hallucinated" in row and "eval/wrote/covered" in row for row in metrics(run_dir)) == 2
    arguments = ["--benchmarks", "habits", "--benchmark_root", world, "--probes", probe]
    printed(capsys, "evaluate", run_dir, *arguments, "--out", tmp_path / "alone")
    printed(capsys, "evaluate", model_dir, *arguments, "--out", tmp_path / "before")
    (before,) = (run_dir / "baseline").rglob("items.jsonl")
    (base,) = (tmp_path / "before").rglob("items.jsonl")
    texts = [row["said"] for row in read_rows(base)]
    assert [row["said"] for row in read_rows(before)] == texts and len(set(map(str, texts))) == len(texts) == 6, "a text for each picture"
    assert "| wrote | write.8 | hallucinated |" in (run_dir / "results.md").read_text()
    (of_run,), (alone,) = (list(folder.rglob("items.jsonl")) for folder in (run_dir / "benchmarks", tmp_path / "alone"))
    assert alone.read_bytes() == of_run.read_bytes() and len(read_rows(alone)) == 6
    found = [read_json(path.parent / "results.json") for path in (of_run, alone)]
    assert found[0]["model"] == found[1]["model"] and found[0]["metrics"] == found[1]["metrics"]
    assert "| habits | write.8 | hallucinated |" in printed(capsys, "compare", tmp_path / "alone", tmp_path / "alone")


def test_a_training_evaluates_benchmarks(model_dir, manifests, root, tmp_path, capsys):
    """In its metrics, for save_best, and as results that compare reads; of adapters, beside a manifest, on two ranks."""
    run_dir = tmp_path / "run"
    root = shutil.copytree(root, tmp_path / "benchmarks")
    trained = sorted((manifests["train"].parent / "images").glob("train-*.png"))
    shutil.copyfile(trained[0], root / "coco" / "val2017" / "0.png")
    own, shown = ({path.read_bytes() for path in found} for found in ((root / "coco").rglob("*.png"), trained))
    evaluated = {"crepe": {"benchmark": "sugarcrepe", "root": str(root), "probe": "caption"}, "test": str(manifests["test"])}
    more = ["--data.evaluation", json.dumps(evaluated), "--train.max_steps=2", "--train.eval_steps=1", "--train.export=true"]
    more += ["--train.save_best=eval/crepe/macro/swap_obj", "--model.language_model.tuning=lora"]
    more += [f"--model.{module}.tuning=frozen" for module in ("vision_tower", "projector")]
    (said, _), recorded = run_train(2, train_arguments(model_dir, manifests, run_dir, *more)), metrics(run_dir)
    assert f"data.evaluation.crepe: {len(own & shown)} of its {len(own)} pictures also occur in the training set" in said
    assert "21 items of SugarCrepe, probe caption, in" in said and "after step 1, crepe: macro " in said
    evaluated = [row for row in recorded if "eval/crepe/macro" in row]
    shown = re.search(r"after step 1, crepe: macro ([\d.]+) \(blank image ([\d.]+), random scores [\d.]+\)", said)
    assert shown and [float(each) for each in shown.groups()] == pytest.approx(
        [evaluated[0]["eval/crepe/macro"], evaluated[0]["eval/crepe/blind_macro"]], abs=0.051
    )
    assert len(evaluated) == 2 and {"eval/crepe/blind_macro", "eval/crepe/accuracy", "eval/test/pair"} <= evaluated[0].keys()
    assert re.search(r"\| crepe \(own files\) \| caption \| 21 \| \d+ \| macro \|", (run_dir / "results.md").read_text())
    compared = printed(capsys, "compare", run_dir / "benchmarks", run_dir / "benchmarks")
    assert "| crepe (own files) | caption | macro |" in compared and "different prompts" not in compared
    record = read_json(run_dir / "benchmarks/crepe/caption/results.json")
    assert record["versions"]["torch"] == torch.__version__ and record["settings"] == {"limit": None}
    identity = fingerprint(ModelConfig(str(model_dir))) | {"adapter": adapter_fingerprint(run_dir / "adapter")}
    assert {part: record["model"][part] for part in identity} == identity, "of the exported adapters on their base"
    assert "Describe the image." in record["prompt"]
    for change, sentence in (
        (["--train.save_best=eval/crepe/macro/nothing"], "is not a metric of data.evaluation"),
        (["--data.evaluation.crepe.benchmark=sugarcreep"], "data.evaluation.crepe: "),
    ):
        arguments = train_arguments(model_dir, manifests, tmp_path / "no", *more, *change)
        assert sentence in run_train(1, arguments, code=2)[0]
