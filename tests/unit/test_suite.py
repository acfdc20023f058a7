"""Benchmarks that a model is asked, from official files to results: scores against plain forwards, resumption, intervals, comparisons."""

from __future__ import annotations

import io
import json
import math
import os
import random
import re
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import test_benchmarks
import torch
from conftest import ONE as ALONE
from conftest import caption, contents, draw, plain_logp, printed, read_json, refused
from PIL import Image
from pyarrow import parquet
from test_benchmarks import put

from cfvlm_ds.batching.collator import Collator, load_collator
from cfvlm_ds.cli.main import main
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.distributed import ProgressBarrier
from cfvlm_ds.core.errors import ConfigError, DataError, InputError
from cfvlm_ds.demo.family_checkpoints import write_small
from cfvlm_ds.evaluation import generation
from cfvlm_ds.evaluation.before_after import FEWEST_CHANGED
from cfvlm_ds.evaluation.benchmarks import BENCHMARKS, Item, Judged, Outcome, load
from cfvlm_ds.evaluation.benchmarks.base import clusters_of, spread
from cfvlm_ds.evaluation.benchmarks.metrics import accuracy, tag, together
from cfvlm_ds.evaluation.benchmarks.sugarcrepe import ROWS
from cfvlm_ds.evaluation.generation import writing_digest
from cfvlm_ds.evaluation.probes import Caption, Generate, Match, log_share, variants
from cfvlm_ds.evaluation.suite import runner as asking
from cfvlm_ds.evaluation.suite.bootstrap import (
    FEWEST_DRAWN,
    draw_of,
    drawn_together,
    draws_for,
    exchange_intervals,
    exchanges,
    interval,
    intervals,
    values_of,
)
from cfvlm_ds.evaluation.suite.comparing import compare_results, comparison_table
from cfvlm_ds.evaluation.suite.results import ITEMS, RESULTS, SCORES, Result, read_results, result_of, write_result
from cfvlm_ds.evaluation.suite.runner import Asked, Settings, evaluate_benchmarks
from cfvlm_ds.evaluation.suite.selection import Chosen, choose, load_items, way_named
from cfvlm_ds.evaluation.suite.tables import logged, markdown, omissions, overview, summary
from cfvlm_ds.models import Scorer, family_of, load_model, load_processor
from cfvlm_ds.models.forest_attention import stock_attention

PUBLIC = dict(BENCHMARKS)
"""Benchmarks before a command adds that of the built-in world."""
GREY = Image.new("RGB", (336, 336), (128, 128, 128))
FEW = Settings(batch_size=2, draws=20)
SCENES = [[("red", "circle"), ("blue", "square")], [("green", "circle"), ("red", "square")], [("yellow", "square"), ("blue", "circle")]]


@pytest.fixture(scope="module")
def collator(model_dir):
    return load_collator(ModelConfig(str(model_dir), attn_implementation="sdpa"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """SugarCrepe and POPE of a few rows, in their official form, whose pictures are drawn."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for number, scene in enumerate(SCENES):
        draw(folder / "coco" / "val2017" / f"{number}.png", scene)
        draw(folder / "coco" / "val2014" / f"{number}.png", scene)
    for place, subset in enumerate(ROWS):
        put(folder / f"sugarcrepe/data/{subset}.json", {str(number): _row(number, place) for number in range(len(SCENES))})
    rows = [
        {"question_id": 10 * n + k, "image": f"{n}.png", "text": f"Is there a {colour} {shape}?", "label": ("yes", "no")[k]}
        for n, scene in enumerate(SCENES)
        for k, (colour, shape) in enumerate((scene[0], ("green", "square")))
    ]
    write_pope(folder, rows)
    return folder


def write_pope(folder: Path, rows: list[dict[str, Any]]) -> None:
    for split in ("random", "popular", "adversarial"):
        put(folder / f"pope/output/coco/coco_pope_{split}.json", "".join(json.dumps(row) + "\n" for row in rows))


def _row(number: int, place: int) -> dict[str, str]:
    scene = SCENES[number]
    return {
        "filename": f"{number}.png",
        "caption": caption(scene),
        "negative_caption": caption([("blue", scene[0][1]), (("yellow", "green", "red")[place % 3], scene[1][1])]),
    }


def asked(scorer: Any, collator: Collator, identity: str = "a", say: Any = None) -> Asked:
    return Asked(scorer, collator, ALONE, "model", {"weights": identity, "inputs": "b"}, {"dtype": "float32"}, say)


def ask(model: Asked, root: Path, out: Path, names: str, *probes: str, settings: Settings = FEW, limit: int | None = None) -> list[Result]:
    chosen = [(each, load_items(each, print, limit=limit, skip=settings.skip)) for each in choose(names.split(","), root, probes)]
    return evaluate_benchmarks(model, chosen, out, settings)


# Scores -----------------------------------------------------------------------------------------------------------------------------------


def test_every_score_is_that_of_plain_forwards(scorer, collator, root, model_dir, tmp_path):
    """Caption, match and yes/no by the public path, against the library's own forward of one image and one string."""
    processor = load_processor(ModelConfig(str(model_dir)))

    known: dict[Any, float] = {}

    def plain(image: Any, prompt: str, text: str) -> float:
        if (key := (image if isinstance(image, tuple) else "grey", prompt, text)) not in known:
            with torch.no_grad():
                known[key] = float(plain_logp(scorer.model, processor, image, prompt, text)[0].sum())
        return known[key]

    def together_(image: Any, prompt: str, text: str) -> float:
        return float(torch.tensor([plain(image, prompt, each) for each in variants(text)], dtype=torch.float64).logsumexp(0))

    def matched(image: Any, prompt: str, text: str) -> float:
        question = Match().template.replace("{text}", text)
        return log_share(together_(image, question, "Yes"), together_(image, question, "No"))

    def captioned(image: Any, prompt: str, text: str) -> float:
        return plain(image, "Describe the image.", text)

    naive = {"caption": captioned, "match": matched, "yes_no": together_}
    results = ask(asked(scorer, collator), root, tmp_path / "out", "sugarcrepe,pope", "caption", "match", "yes_no", limit=10)
    assert [result.place for result in results] == ["sugarcrepe/caption", "sugarcrepe/match", "pope/yes_no"]
    for result in results:
        items = {item.id: item for item in load(BENCHMARKS[result.name], root / result.name).items}
        assert 3 <= len(result.outcomes) < len(items)
        for outcome in result.outcomes[:4]:
            item, rule = items[outcome.item.id], naive[result.label]
            for scores, image in ((outcome.seen[0], item.images[0]), (outcome.blank, GREY)):
                assert scores == pytest.approx([rule(image, item.prompt, text) for text in item.texts], rel=1e-4)


def test_questions_of_a_picture_are_asked_behind_one_encoding(scorer, collator, root, tmp_path):
    pictures: list[int] = []

    def forward(**inputs: Any) -> torch.Tensor:
        pictures.append(len(inputs["images_of_tree"]))
        return scorer(**inputs)

    (result,) = ask(asked(forward, collator), root, tmp_path / "out", "pope", settings=Settings(draws=0))
    assert len(result.outcomes) == 18 and sum(pictures) == 3 + 1, "a tree for each of three pictures, and one of the blank one"


def test_generated_text_is_the_librarys_own(scorer, collator, root, model_dir, tmp_path):
    say = partial(generation.write, scorer.model, collator, ALONE.device, do_sample=False)
    (result,) = ask(asked(scorer, collator, say=say), root, tmp_path / "out", "pope", "generate:max_new_tokens=6", limit=2)
    assert result.label == "generate.6" and result.outcomes
    processor, items = load_processor(ModelConfig(str(model_dir))), load(BENCHMARKS["pope"], root / "pope").items
    for outcome in result.outcomes[:2]:
        item = next(each for each in items if each.id == outcome.item.id)
        head = f"USER: <image>\n{item.prompt} ASSISTANT:"
        with torch.no_grad(), stock_attention(scorer.model):
            inputs = processor(images=[Image.open(*item.images[0]).convert("RGB")], text=[head], return_tensors="pt")
            ids = scorer.model.generate(**inputs, do_sample=False, max_new_tokens=6, pad_token_id=2)[0, inputs.input_ids.shape[1] :]
        assert outcome.said == (processor.tokenizer.decode(ids, skip_special_tokens=True).strip(),)
        assert outcome.seen[0] == (1.0, 0.0), "the authors take every answer without a no for a yes"
    digest, options = writing_digest(scorer.model), scorer.model.generation_config.to_dict()
    scorer.model.generation_config.repetition_penalty = 8.0
    penalised = writing_digest(scorer.model)
    scorer.model.generation_config.repetition_penalty = options.get("repetition_penalty")
    assert penalised != digest == writing_digest(scorer.model)
    other = replace(asked(scorer, collator, say=say), identity={"weights": "a", "inputs": "b", "writing": penalised})
    with pytest.raises(ConfigError, match=r"model\.writing was"):
        ask(other, root, tmp_path / "out", "pope", "generate:max_new_tokens=6", limit=2)
    with pytest.raises(ConfigError, match="is partitioned"):
        ask(asked(scorer, collator), root, tmp_path / "parts", "pope", "generate")


def everything(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of all benchmarks in their official forms, with pictures that are ones."""
    pictures = [draw(folder / f"drawn{number}.png", scene).read_bytes() for number, scene in enumerate(SCENES)]

    def drawn(root: Path, *names: str) -> None:
        for number, name in enumerate(names):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(pictures[number % 3])

    monkeypatch.setattr(test_benchmarks, "pictures", drawn)
    for name in PUBLIC:
        test_benchmarks.write(name, folder / name)
    return folder


@pytest.mark.parametrize("family", ["", pytest.param("qwen2_5_vl", marks=pytest.mark.long)])
def test_every_benchmark_is_evaluated_from_its_official_form(family, scorer, collator, tmp_path, monkeypatch):
    if family:
        config = ModelConfig(str(write_small(family, tmp_path / family)), attn_implementation="sdpa")
        model = load_model(config, torch.float32).eval()
        scorer, collator = Scorer(model, family_of(model.config)), load_collator(config)
    root = everything(tmp_path / "benchmarks", monkeypatch)
    described = [name for name, benchmark in PUBLIC.items() if benchmark.mentions]
    model = asked(scorer, collator, say=partial(generation.write, scorer.model, collator, ALONE.device, do_sample=False))
    results = ask(model, root, tmp_path / "out", ",".join(n for n in PUBLIC if n not in described), settings=Settings(draws=3))
    results += ask(model, root, tmp_path / "out", ",".join(described), "write:max_new_tokens=4", settings=Settings(draws=3))
    assert {result.name for result in results} == {*PUBLIC} and not [r.place for r in results if r.record["not_finite"]]
    for found, result in zip(read_results(tmp_path / "out"), sorted(results, key=lambda each: each.place), strict=True):
        benchmark = PUBLIC[result.name]
        assert found.metrics.keys() == result.metrics.keys() and result.metrics["seen"].keys() >= {*benchmark.headlines}
        assert all(found.metrics[name] == pytest.approx(values, rel=0, nan_ok=True) for name, values in result.metrics.items())
        assert result.metrics["blank"] and summary(result) and (benchmark.mentions or benchmark.headline in result.metrics["random"])
        if benchmark.mentions:
            for outcome in found.outcomes:
                assert outcome.said and outcome.seen == (benchmark.mentions(outcome.said[0], outcome.item),)
            assert all(name in summary(result) for name in benchmark.headlines)
    shown = sum(len(benchmark.headlines) for benchmark in PUBLIC.values())
    assert len(overview(results).splitlines()) == 2 + shown + 2 > 4 + len(PUBLIC), "never one figure without the other"


# What is on disk ------------------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As a signal: nothing answers it."""


@pytest.mark.parametrize("probe", ["yes_no", "generate:max_new_tokens=3"])
def test_a_killed_evaluation_goes_on_to_the_same_bytes(probe, scorer, collator, root, tmp_path):
    calls, most = [0], [10**9]

    def counted() -> None:
        calls[0] += 1
        if calls[0] > most[0]:
            raise Killed

    def forward(**inputs: Any) -> torch.Tensor:
        counted()
        return scorer(**inputs)

    def say(*asked: Any) -> str:
        counted()
        return generation.write(scorer.model, collator, ALONE.device, *asked, do_sample=False)

    settings = Settings(batch_size=1, draws=5)
    model = asked(forward, collator, say=say)
    ask(model, root, tmp_path / "whole", "pope", probe, settings=settings)
    whole, most[0] = calls[0], calls[0] // 2
    calls[0] = 0
    with pytest.raises(Killed):
        ask(model, root, tmp_path / "killed", "pope", probe, settings=settings)
    partial = next((tmp_path / "killed").rglob(SCORES))
    scored = len(partial.read_text().splitlines()) - 1
    assert scored > 0 and not list((tmp_path / "killed").rglob(RESULTS))
    partial.write_text((kept := partial.read_text()).replace("cfpartial/2", "cfpartial/1"))
    with pytest.raises(ConfigError, match="results of another evaluation: schema was 'cfpartial/1'"):
        ask(model, root, tmp_path / "killed", "pope", probe, settings=settings)
    partial.write_text(kept)
    with partial.open("a") as file:
        file.write('{"group": 17, "logp": [[0.')  # what a kill leaves of a line
    calls[0], most[0] = 0, 10**9
    with pytest.raises(DataError, match="an evaluation that has not finished"):
        read_results(tmp_path / "killed")
    ask(model, root, tmp_path / "killed", "pope", probe, settings=settings)
    assert 0 < calls[0] < whole and contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not list(tmp_path.rglob(SCORES))
    calls[0] = 0
    (again,) = ask(model, root, tmp_path / "killed", "pope", probe, settings=settings)
    assert calls[0] == 0 and again.outcomes and contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_results_of_something_else_are_not_written_over(scorer, collator, root, tmp_path):
    few, out = Settings(draws=0), tmp_path / "out"
    ask(asked(scorer, collator), root, out, "pope", settings=few, limit=2)
    before = contents(out)
    other = asked(scorer, collator, "other")
    for name, model, settings, limit, what in (
        ("pope", other, few, 2, "model.weights"), ("sugarcrepe", other, few, 2, "model.weights"),
        ("pope", asked(scorer, collator), few, 4, "settings.limit was 2 and is now 4"),
        ("pope", asked(scorer, collator), replace(few, batch_size=3), 2, "settings.batch_size was 16 and is now 3"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=what):
            ask(model, root, out, name, settings=settings, limit=limit)
    assert contents(out) == before
    ask(asked(scorer, collator), root, out, "sugarcrepe", "match", settings=few, limit=2)
    said = (out / "results.md").read_text()
    assert "| pope (own files) | yes_no | " in said and "| sugarcrepe (own files) | match | " in said


def test_files_hold_no_time_no_machine_and_all_that_metrics_need(scorer, collator, root, tmp_path):
    (result,) = ask(asked(scorer, collator), root, tmp_path / "out", "sugarcrepe", "match")
    (read,) = read_results(tmp_path / "out")
    assert BENCHMARKS["sugarcrepe"].metrics([Judged(each.item, each.seen) for each in read.outcomes]) == result.metrics["seen"]
    record = read_json(tmp_path / "out/sugarcrepe/match" / RESULTS)
    text = json.dumps(record) + (tmp_path / "out/sugarcrepe/match" / ITEMS).read_text()
    assert str(tmp_path) not in text and str(root) not in text and os.uname().nodename not in text
    assert record["probe"]["template"] == Match().template and "<image>" in record["prompt"]
    assert record["versions"]["torch"] and record["data"]["pictures"] and record["model"]["weights"] == "a"
    assert record["items"] == {"in files": 21, "asked": 21, "left out": 0} and record["bootstrap"]["clusters"] == 3
    assert not record["intervals"] and not record["bootstrap"]["draws"], "three pictures are too few"


# What cannot be asked -------------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_asked_is_an_error_or_counted_and_named(scorer, collator, tmp_path):
    rows = [{"question_id": n, "image": f"{n}.png", "text": "Is it red?", "label": "yes"} for n in range(4)]
    rows[1]["text"] = "Is it red or " * 200
    for n in (0, 1, 2):
        draw(tmp_path / "pope" / "val2014" / f"{n}.png", SCENES[n])
    broken = tmp_path / "pope" / "val2014" / "2.png"
    broken.write_bytes(broken.read_bytes()[:-60])
    write_pope(tmp_path, rows[:3])
    model, settings = asked(scorer, collator), Settings(skip=True, draws=0)
    with pytest.raises(DataError, match=r"pope: item 'random/1': \d+ tokens .*5 more.*--on_error skip"):
        ask(model, tmp_path, tmp_path / "out", "pope")
    (result,) = ask(model, tmp_path, tmp_path / "out", "pope", settings=settings)
    assert len(result.outcomes) == 3 and len(result.record["left_out"]) == 6
    assert "6 items left out, first: item 'random/1'" in omissions(result)[0] and "2.png" in markdown([result])
    put(tmp_path / "pope/output/coco/coco_pope_random.json", "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"coco_pope_random.json:4: .*--on_error skip"):
        ask(model, tmp_path, tmp_path / "more", "pope")
    (result,) = ask(model, tmp_path, tmp_path / "more", "pope", settings=settings)
    assert len(result.outcomes) == 3 and len(result.record["left_out"]) == 7 and result.record["items"]["in files"] == 10


def test_names_and_options_of_probes():
    assert way_named("caption:mode=pmi") == ("caption.pmi", Caption(mode="pmi")) and way_named("match")[0] == "match"
    assert way_named("generate:max_new_tokens=8") == ("generate.8", Generate(8))
    assert way_named('caption:prompt="What, then?",mode=mean')[1] == Caption("mean", "What, then?")
    for spec, remedy in (
        ("captions", "'caption'"), ("caption:mood=pmi", "'mood'"), ("yes_no:mode=sum", "no options"), ("match:template=no", "{text}"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=remedy):
            way_named(spec)
    for names, probes, remedy in ((["popes"], [], "'pope'"), (["pope"], ["match"], "yes_no, generate"), ([], [], "no benchmark")):
        with pytest.raises(ConfigError, match=remedy):
            choose(names, Path(), probes)


def test_a_limit_takes_whole_clusters_from_all_parts():
    items = [Item(f"{n}/{k}", ((),), ("a", "b"), ((1, 0),), cluster=str(n)) for n in range(20) for k in range(3)]
    taken = spread(items, 12)
    assert len(taken) == 12 and {len([i for i in taken if i.cluster == c]) for c in {i.cluster for i in taken}} == {3}
    assert [int(item.cluster) for item in taken[::3]] == [0, 5, 10, 15]
    assert spread(items, None) == spread(items, 99) == items


# Official files in Parquet ----------------------------------------------------------------------------------------------------------------


def test_official_parquet_files_are_read_with_their_pictures(tmp_path):
    def picture(colour: str) -> dict[str, Any]:
        Image.new("RGB", (8, 8), colour).save(content := io.BytesIO(), "PNG")
        return {"bytes": content.getvalue(), "path": f"../{colour}.jpg"}

    row = test_benchmarks.natural_row(7, "yes_no", "Yes", "No") | {f"Image_{i}": picture(name) for i, name in enumerate(("red", "blue"))}
    root = tmp_path / "naturalbench"
    (root / "data").mkdir(parents=True)
    for part in range(2):
        parquet.write_table(pyarrow.Table.from_pylist([row | {"Index": part}]), root / "data" / f"train-0000{part}-of-00002.parquet")
    loaded = load(BENCHMARKS["naturalbench"], root)
    assert not loaded.problems and [item.id for item in loaded.items] == ["0/0", "0/1", "1/0", "1/1"]
    from cfvlm_ds.data.decoding import open_image

    assert [open_image(image[0]).getpixel((0, 0)) for image in loaded.items[0].images] == [(255, 0, 0), (0, 0, 255)]
    assert loaded.items[0].images == loaded.items[2].images, "a picture that comes again is kept once"
    broken = root / "data" / "train-00001-of-00002.parquet"
    broken.write_bytes(broken.read_bytes()[:100])
    (problem,) = load(BENCHMARKS["naturalbench"], root).problems
    assert broken.name in str(problem)


# Intervals --------------------------------------------------------------------------------------------------------------------------------


def outcome(number: int, right: bool, cluster: str = "", blank: Sequence[float] = (0.0, 0.0), **tags: str) -> Outcome:
    item = Item(str(number), ((),), ("a cat", "a dog"), ((1, 0),), tags=tags, cluster=cluster or str(number))
    return Outcome(item, ((1.0, 0.0) if right else (0.0, 1.0),), tuple(blank))


def seen(outcomes: Sequence[Outcome]) -> list[Judged]:
    return [Judged(each.item, each.seen) for each in outcomes]


def test_intervals_have_the_width_of_independent_clusters():
    """Of a share of 0.7 among 400 items the standard error is that of the binomial; four copies of each item in a cluster add nothing."""
    chance = random.Random(3)
    rights = [chance.random() < 0.7 for _ in range(400)]
    for copies in (1, 4):
        found = [outcome(copies * n + k, right, str(n)) for n, right in enumerate(rights) for k in range(copies)]
        members = clusters_of(each.item for each in found)
        values = [values_of(accuracy, seen(found), members, k)["accuracy"] for k in range(300)]
        share = sum(rights) / 400
        assert len(members) == 400 and statistics.mean(values) == pytest.approx(100 * share, abs=0.6)
        assert statistics.stdev(values) == pytest.approx(100 * math.sqrt(share * (1 - share) / 400), rel=0.15)
        low, high = interval(values)
        assert high - low == pytest.approx(2 * 1.96 * statistics.stdev(values), rel=0.15)


def test_a_pair_that_is_drawn_twice_is_two_pairs():
    found = [outcome(2 * n + k, not (n == 0 and k), str(n), pair=str(n)) for n in range(3) for k in range(2)]
    members = clusters_of(each.item for each in found)

    def pairs(table: Sequence[Judged]) -> dict[str, float]:
        return {"pair": together(table, tag("pair")) or 0.0}

    for k in range(20):
        clusters = [number // 2 for number, _ in draw_of(members, k)[::2]]
        value = values_of(pairs, seen(found), members, k)
        assert value["pair"] == pytest.approx(100 * sum(cluster != 0 for cluster in clusters) / 3)
    assert draw_of(members, 1) == draw_of(members, 1) != draw_of(members, 2)
    assert interval([1.0, 3.0]) == pytest.approx((1.05, 2.95)) and intervals([{"a": 1.0}, {"b": 2.0}]) == {}
    assert intervals([{"a": 1.0}]) == intervals([{"a": 1.0}] * 2) == intervals([]) == {} and intervals([{"a": 1.0}, {"a": 3.0}]) == {
        "a": interval([1.0, 3.0])
    }
    assert (draws_for(10), draws_for(20_000), draws_for(10**6)) == (1000, 500, 200)


def test_draws_are_of_clusters_and_of_none_where_they_are_few():
    """Of 29 clusters, whose intervals would be too narrow, nothing is drawn."""
    outcomes = rows([True, False, True] * 10)
    members, metrics = clusters_of(each.item for each in outcomes), BENCHMARKS["sugarcrepe"].metrics
    found = drawn_together(ALONE, outcomes, metrics, 8, "evaluating it", ProgressBarrier(ALONE))
    assert found == [values_of(metrics, seen(outcomes), members, k) for k in range(8)]
    assert drawn_together(ALONE, outcomes[1:], metrics, 8, "evaluating it", ProgressBarrier(ALONE)) == []


def test_intervals_of_the_fewest_clusters_hold_the_truth():
    """Of models that are right with 75 %, on pictures of three questions that are easier or harder together: of 30 pictures intervals hold
    75 % in nine of ten cases and more; of 6 they would in fewer."""
    rng = np.random.default_rng(0)

    def held(clusters: int) -> int:
        members = [[3 * n, 3 * n + 1, 3 * n + 2] for n in range(clusters)]
        times = np.array([np.bincount([number for number, _ in draw_of(members, k)], minlength=3 * clusters) for k in range(100)])
        right = rng.random((3 * clusters, 400)) < rng.beta(3, 1, (clusters, 400)).repeat(3, 0)
        spans = (interval(values) for values in (times @ right / (3 * clusters)).T.tolist())
        return sum(low <= 0.75 <= high for low, high in spans)

    assert held(FEWEST_DRAWN) >= 360 > held(6)


# Without looking ------------------------------------------------------------------------------------------------------------------------


def result(outcomes: Sequence[Outcome], name: str = "sugarcrepe", called: str = "", identity: str = "a", draws: int = 0) -> Result:
    header = {"benchmark": name, "probe": {"name": "match"}, "model": {}, "data": {"items": len(outcomes), "pictures": "p"}}
    metrics = BENCHMARKS[name].metrics
    members = clusters_of(each.item for each in outcomes)
    values = [values_of(metrics, seen(outcomes), members, k) for k in range(draws)]
    chosen = Chosen(name, BENCHMARKS[name], "match", Match(), Path())
    return result_of(called or name, chosen, identity, header, outcomes, values, "?")


def numbers(line: str) -> list[float]:
    return [float(each) for each in re.findall(r"\d+\.\d", line)]


def test_a_cheat_that_does_not_look_is_found_out_by_the_summary():
    """Always the shorter text: right in 8 of 10 rows, and as often without the picture. An oracle has nothing of the blank one."""
    cheat, oracle = [], []
    for n in range(10):
        texts = ("a cat", "a large cat") if n < 8 else ("a large cat", "a cat")
        item = Item(str(n), ((),), texts, ((1, 0),), tags={"subset": "add_att"}, cluster=str(n))
        scores = tuple(-float(len(text)) for text in texts)
        cheat.append(Outcome(item, (scores,), scores))
        oracle.append(Outcome(item, ((0.0, -1.0),), (-1.0, -1.0)))
    found, right = result(cheat), result(oracle)
    assert found.metrics["seen"] == found.metrics["blank"] and right.metrics["blank"]["macro"] == 50
    assert numbers(summary(found)) == [30, 30] and numbers(summary(right)) == [50, 0], "points above random scores, and with a blank image"
    blank = result([replace(each, blank=(1.0, 0.0)) for each in rows([True, True, True, False])])
    assert numbers(summary(blank)) == [25, 50], "points over random scores, and more without looking"
    item = Item("1", ((Path("a"),), (Path("b"),)), ("x y", "y x"), ((1, 0), (0, 1)), tags={"tag": "Object"}, cluster="1")
    quad = result([Outcome(item, ((1.0, 0.0), (0.0, 1.0)), (2.0, 1.0))], "winoground")
    assert numbers(summary(quad)) == [50, 0] and "(pair)" in summary(quad), "what compares images is summed up by single comparisons"


def test_f1_of_a_model_that_never_says_yes_is_undefined_and_the_share_of_yes_stands_beside_it(tmp_path):
    """Four of eight questions are answered rightly with no. After, one question is answered with yes, rightly: 1 of 1, 1 of 4, F1 0.4."""

    def answers(yes: int) -> list[Outcome]:
        return [
            Outcome(
                Item(str(n), ((),), ("Yes", "No"), ((int(n < 4), int(n >= 4)),), tags={"split": "random"}, cluster=str(n)),
                ((1.0, 0.0) if n < yes else (0.0, 1.0),),
                (0.0, 1.0),
            )
            for n in range(8)
        ]  # fmt: skip

    one = written(tmp_path / "one", answers(0), name="pope")
    other = written(tmp_path / "other", answers(1), name="pope", identity="b")
    (found,) = read_results(one)
    assert all(math.isnan(found.metrics["seen"][name]) for name in ("precision", "f1", "f1/random", "f1_macro"))
    assert found.metrics["seen"]["accuracy"] == 50 and found.metrics["seen"]["recall"] == 0
    assert "yes_ratio 0.0" in summary(found)
    assert not any("f1" in name or "precision" in name for name in logged("pope", {"seen": found.metrics["seen"]}))
    assert intervals([{"f1": math.nan}, {"f1": 1.0}, {"f1": 2.0}]) == {}
    assert read_results(other)[0].metrics["seen"]["f1"] == pytest.approx(40)
    table = comparison_table(compare_results(one, other), "one", "other")
    assert re_row(table, "f1_macro")[4] == "40.0" and "undefined" in re_row(table, "f1_macro")[3]
    assert re_row(table, "yes_ratio")[3:6] == ["0.0", "12.5", "+12.5"]


# Two results side by side -----------------------------------------------------------------------------------------------------------------


def written(folder: Path, outcomes: Sequence[Outcome], **options: Any) -> Path:
    found = result(outcomes, **options)
    (place := folder / found.called / found.label).mkdir(parents=True)
    write_result(place, found)
    return folder


def rows(rights: Sequence[bool]) -> list[Outcome]:
    return [outcome(n, right, str(n), subset="swap_obj") for n, right in enumerate(rights)]


def test_a_comparison_by_hand(tmp_path):
    """100 items: 60 right before; 20 of the wrong ones get right and 6 of the right ones wrong. Of 26 coins heads and tails differ by 12 or
    more in 2.9 % of throws and by 10 or more in 7.6 %: a difference above 10 points is resolved."""
    before = [n < 60 for n in range(100)]
    after = [(n < 60 or n >= 80) and not n < 6 for n in range(100)]
    one, other = written(tmp_path / "one", rows(before)), written(tmp_path / "other", rows(after), identity="b")
    (found,) = compare_results(one, other)
    difference = found.differences["macro"]
    assert (difference.before, difference.after, difference.resolved) == (60, 74, True)
    assert difference.interval == pytest.approx((4, 24))
    better, worse = found.changes()
    assert better == [str(n) for n in range(80, 100)] and worse == [str(n) for n in range(6)]
    table = comparison_table([found], "one", "other")
    assert re_row(table, "macro") == ["sugarcrepe", "match", "macro", "60.0", "74.0", "+14.0", "4.0 to 24.0", "yes", "+20 -6"]
    assert f": {', '.join(better)}\n" in table and ": 0, 1, 2, 3, 4, 5\n" in table
    (same,) = compare_results(one, one)
    assert not any(each.resolved for each in same.differences.values()) and same.changes() == ([], [])
    assert compare_results(one, other)[0].differences == found.differences, "seeded"
    assert re_row(comparison_table(compare_results(one, other, 0), "one", "other"), "macro")[6:8] == ["", "not tested"]


def test_each_metric_has_the_clusters_in_which_it_rose_itself(tmp_path):
    """Eight groups of NaturalBench: in seven, one more of four answers is right after, so no whole group; in the last, all four are."""
    right, wrong = ((1.0, 0.0), (0.0, 1.0)), ((0.0, 1.0), (1.0, 0.0))
    half = (right[0], wrong[1])

    def asked_of(last: Any, others: Any) -> list[Outcome]:
        return [
            Outcome(
                Item(f"{n}/{q}", ((), ()), ("Yes", "No"), ((1, 0), (0, 1)), tags={"group": str(n), "type": "yes_no"}, cluster=str(n)),
                last if n == 7 else others if q == 0 else wrong,
                (0.0, 0.0),
            )
            for n in range(8)
            for q in (0, 1)
        ]

    one = written(tmp_path / "one", asked_of(wrong, half), name="naturalbench")
    other = written(tmp_path / "other", asked_of(right, right), name="naturalbench", identity="b")
    (found,) = compare_results(one, other)
    assert {name: each.changed for name, each in found.differences.items()} == {
        "accuracy": (8, 0), "q_acc": (8, 0), "i_acc": (1, 0), "g_acc": (1, 0),
    }  # fmt: skip


def test_what_descriptions_invent_is_never_shown_without_what_they_cover(tmp_path):
    """Of 40 pictures of dogs, all descriptions mention a cat, too, before, and none after; on a blank picture they mention a cat alone."""
    item = Item("", ((),), ("dog: dog, puppy", "cat: cat"), ((1, 0),))
    outcomes = [Outcome(replace(item, id=str(n), cluster=str(n)), ((2.0, 1.0),), (0.0, 1.0)) for n in range(40)]
    one = written(tmp_path / "one", outcomes, name="chair")
    other = written(tmp_path / "other", [replace(each, seen=((1.0, 0.0),)) for each in outcomes], name="chair", identity="b")
    found = result(outcomes, "chair")
    assert numbers(summary(found)) == [50, 100, 100, 0] and "random" not in overview([found])
    assert [re_row(overview([found]), name)[5] for name in ("hallucinated", "covered")] == ["50.0", "100.0"]
    (compared,) = compare_results(one, other)
    table = comparison_table([compared], "one", "other")
    assert re_row(table, "hallucinated")[3:6] == ["50.0", "0.0", "-50.0"]
    assert re_row(table, "covered")[3:6] == ["100.0", "100.0", "+0.0"], "also where it does not differ"
    assert len(compared.changes()[0]) == 40 and [*compared.headlines] == ["hallucinated", "covered"]


def test_a_comparison_is_written_as_table_figure_and_page(tmp_path, capsys):
    one, other = (written(tmp_path / name, rows([n < right for n in range(40)])) for name, right in (("one", 20), ("<b>other</b>", 30)))
    out = tmp_path / "compared"
    for _ in range(2):  # its own output is replaced
        table = printed(capsys, "compare", one, other, "--out", out)
    assert {each.name for each in out.iterdir()} == {"results.md", "results.html", "differences.png"}
    assert re_row(table, "macro") == re_row((out / "results.md").read_text(), "macro") and Image.open(out / "differences.png").width > 800
    page = (out / "results.html").read_text()
    assert "<b>" not in page and "+25.0" in page and page.count('<img src="differences.png"') == 1 and "<script" not in page
    (out / "notes.txt").write_text("mine")
    assert "compared already exists" in refused(capsys, "compare", one, other, "--out", out)
    assert "one" in refused(capsys, "compare", one, other, "--out", one)


@pytest.mark.parametrize("clusters", [4, 6, 10])
def test_equal_models_are_told_apart_in_five_percent_of_cases(clusters):
    """1,000 pairs of models that answer the three questions of a picture equally often. In at most 5 %, and a standard error and a half,
    any of five metrics differs: all answers, those to each question, and twice those to the first. Six pictures suffice where one model is
    better on all."""
    rng = np.random.default_rng(clusters)
    made = list(exchanges([[k] for k in range(clusters)], 59))
    assert len(set(map(frozenset, made))) == 2 ** (clusters - 1) if clusters < 10 else len(made) == 60
    signs = np.array([[1 - 2 * (k in exchanged) for k in range(clusters)] for exchanged in made])
    names = ("headline", "first", "second", "third", "twice")
    told = 0
    for _ in range(1000):
        share = rng.random((clusters, 1))
        differences = (rng.random((clusters, 3)) < share) - 1.0 * (rng.random((clusters, 3)) < share)
        moved = signs @ np.column_stack([differences.mean(1), differences, 2 * differences[:, 0]])
        spans = exchange_intervals([dict(zip(names, row, strict=True)) for row in moved.tolist()], names)
        assert all(low <= value <= high for value, (low, high) in zip(moved[0], (spans[name] for name in names), strict=True))
        told += any(not low <= 0 <= high for low, high in spans.values())
    assert told <= 60
    spans = exchange_intervals([{"all": float(total)} for total in signs.sum(1)], ["all"])
    assert (spans["all"][0] > 0) == (clusters >= FEWEST_CHANGED)


def re_row(table: str, metric: str) -> list[str]:
    line = next(line for line in table.splitlines() if f"| {metric} |" in line)
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_what_is_not_compared_is_named(tmp_path):
    one = written(tmp_path / "one", rows([True, False, True, True, True]))
    changed = [*rows([True, True]), *rows([True] * 5)[3:]]
    for place, other_than in ((0, {"texts": ("a bat", "a dog")}), (2, {"tags": {"subset": "swap_att"}}), (3, {"cluster": "1"})):
        changed[place] = replace(changed[place], item=replace(changed[place].item, **other_than))
    other = written(written(tmp_path / "other", changed), rows([True]), called="more")
    said: list[str] = []
    (found,) = compare_results(one, other, 10, said.append)
    assert len(found.pairs) == 1 and "4 items" in found.notes[0] and found.notes[0].endswith(": 0, 2, 3, 4") and "more/match" in said[0]
    written(tmp_path / "none", rows([True]), called="none")
    for folder, what in (("none", "no benchmark in common"), ("texts", "no item in common"), ("nowhere", "nowhere")):
        if folder == "texts":
            written(tmp_path / "texts", changed[:1])
        with pytest.raises(InputError, match=what):
            compare_results(one, tmp_path / folder)


# Files that are damaged -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [*((RESULTS, content) for content in ("{", "[]", '{"schema": "cfresults/9"}', "")), *((ITEMS, c) for c in ("{}\n", "x" * 100, None))],
)
def test_a_damaged_file_is_one_sentence(name, content, tmp_path):
    folder = written(tmp_path / "one", rows([True, False])) / "sugarcrepe" / "match"
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises(DataError) as raised:
        read_results(tmp_path / "one")
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)


def test_scores_that_are_no_numbers_are_kept_counted_and_wrong(tmp_path):
    outcomes = rows([True, True])
    outcomes[0] = replace(outcomes[0], seen=((math.nan, 0.0),))
    folder = written(tmp_path / "one", outcomes)
    json.loads((folder / "sugarcrepe" / "match" / ITEMS).read_text().splitlines()[0], parse_constant=pytest.fail)
    (read,) = read_results(folder)
    assert math.isnan(read.outcomes[0].seen[0][0]) and read.metrics["seen"]["macro"] == 50
    assert "scores of 1 items are not finite and count as wrong: 0" in omissions(read)[0]


def test_nothing_is_written_through_a_link(scorer, collator, root, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "pope").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a link to"):
        ask(asked(scorer, collator), root, tmp_path / "out", "pope", settings=Settings(draws=0), limit=1)
    assert not os.listdir(tmp_path / "elsewhere")


def test_what_is_in_use_or_not_of_an_evaluation_is_not_written_over(tmp_path, capsys):
    """A training's folder has a results.md and metrics of its own; so may any folder."""
    for name, file, content in (("file", "", ""), ("run", "config.yaml", "model: {}\n"), ("mine", "results.md", "# My thesis\n")):
        put(tmp_path / name / file, content)
        with pytest.raises(ConfigError, match=name):
            asking.results_held(tmp_path / name, ALONE).__enter__()
    put(tmp_path / "mine" / "results.md", markdown([result(rows([True]))]))
    for out in ("mine", "new"):
        with asking.results_held(tmp_path / out, ALONE), pytest.raises(ConfigError, match="in use by"):
            asking.results_held(tmp_path / out, ALONE).__enter__()
    assert not (tmp_path / "new").exists(), "nothing came of it"
    with pytest.raises(SystemExit):
        main(["evaluate", "model", "--benchmarks", "pope", "--benchmark_root", str(tmp_path), "--out", f"{tmp_path}/mine/.."])
    assert "is the folder of the benchmarks" in capsys.readouterr().err
