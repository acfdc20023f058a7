"""Benchmarks on small files in their official formats, with metrics worked by hand."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPO
from PIL import Image

from cfvlm_ds.core.errors import ConfigError, DataError, InputError
from cfvlm_ds.evaluation.asking import plan
from cfvlm_ds.evaluation.asking import written as read_text
from cfvlm_ds.evaluation.benchmarks import (
    BENCHMARKS,
    Benchmark,
    File,
    Item,
    Judged,
    Outcome,
    Row,
    Source,
    aro_order,
    chance,
    load,
    metrics,
    results,
)
from cfvlm_ds.evaluation.benchmarks.aro import SYMMETRIC
from cfvlm_ds.evaluation.benchmarks.base import Values, judged
from cfvlm_ds.evaluation.benchmarks.metrics import auc, binary, calibrated, quads, text_right, threshold
from cfvlm_ds.evaluation.benchmarks.parsers import PARSERS, answer
from cfvlm_ds.evaluation.benchmarks.source import keep_picture, one_hot
from cfvlm_ds.evaluation.probes import PROBES, Generate
from cfvlm_ds.evaluation.scoring import GroupScores

# Official formats --------------------------------------------------------------------------------------------------------------------
# Every row is made up here; only its form is that of the published file.


def put(path: Path, content: Any = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def lines(path: Path, rows: Sequence[Any]) -> None:
    put(path, "".join(json.dumps(row) + "\n" for row in rows))


def pictures(root: Path, *names: str) -> None:
    for name in names:
        put(root / name, "picture")


def sugarcrepe(root: Path) -> None:
    for subset in ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"):
        rows = [{"filename": f"00000{k}.jpg", "caption": f"a cup {k}", "negative_caption": f"a {subset} cup {k}"} for k in range(2)]
        put(root / "data" / f"{subset}.json", {str(k): row for k, row in enumerate(rows)})
    pictures(root, "val2017/000000.jpg", "val2017/000001.jpg")


def winoground(root: Path) -> None:
    rows = []
    for k in range(2):
        row = {"id": k, "image_0": f"ex_{k}_img_0", "image_1": f"ex_{k}_img_1", "caption_0": "an owl eats a mouse"}
        rows.append(
            row | {"caption_1": "a mouse eats an owl", "tag": "x", "secondary_tag": "", "num_main_preds": 1, "collapsed_tag": "Object"}
        )
    lines(root / "data" / "examples.jsonl", rows)
    pictures(root, *(f"images/ex_{k}_img_{i}.png" for k in range(2) for i in range(2)))


def eqben(root: Path) -> None:
    row = {"image0": "eqbensd/0_a.png", "image1": "eqbensd/0_b.png", "caption0": "a red hat", "caption1": "a blue hat"}
    put(root / "all_select.json", [row, row | {"image0": "eqbenag/1_a.png", "image1": "eqbenag/1_b.png"}])
    pictures(root, *(f"images/{name}.png" for name in ("eqbensd/0_a", "eqbensd/0_b", "eqbenag/1_a", "eqbenag/1_b")))


def bivlc(root: Path) -> None:
    row = {
        "image": "p.jpg",
        "caption": "a cat",
        "negative_caption": "a dog",
        "negative_image": "n.jpg",
        "type": "Replace",
        "subtype": "Object",
    }
    lines(root / "test.jsonl", [row, row | {"image": "q.jpg", "type": "Swap"}])
    pictures(root, "p.jpg", "q.jpg", "n.jpg")


def vismin(root: Path) -> None:
    row = {"image_0": "a.png", "text_0": "two pears", "image_1": "b.png", "text_1": "three pears", "category": "counting"}
    lines(root / "test.jsonl", [row, row | {"image_0": "c.png", "category": "object"}])
    pictures(root, "a.png", "b.png", "c.png")


def cola(root: Path) -> None:
    address = "https://cs.example.edu/VG_100K_2/{}.jpg"
    put(
        root / "data/COLA_multiobjects_matching_benchmark.json",
        [[address.format(1), "red box, blue ball", address.format(2), "blue box, red ball"]],
    )
    pictures(root, "images/1.jpg", "images/2.jpg")


def aro_relation(root: Path) -> None:
    put(
        root / "visual_genome_relation.json",
        [aro_row(k) | {"relation_name": name} for k, name in enumerate(("eating", "eating", "near", "on"))],
    )
    aro_pictures(root)


def aro_attribution(root: Path) -> None:
    put(
        root / "visual_genome_attribution.json",
        [aro_row(k) | {"attributes": ["red", "old"]} for k in range(25)] + [aro_row(25) | {"attributes": ["wet", "old"]}],
    )
    aro_pictures(root)


def aro_row(k: int) -> dict[str, Any]:
    box = {"bbox_x": 1 + k, "bbox_y": 2, "bbox_w": 3, "bbox_h": 4}
    return {
        "image_id": k,
        "image_path": "1.jpg",
        **box,
        "true_caption": f"the ox {k} eats grass",
        "false_caption": f"the grass eats ox {k}",
    }


def aro_pictures(root: Path) -> None:
    (root / "images").mkdir(parents=True)
    image = Image.new("RGB", (40, 10))
    image.putpixel((1, 2), (255, 255, 255))
    image.save(root / "images" / "1.jpg", quality=100, subsampling=0)


def aro_coco_order(root: Path) -> None:
    put(root / "coco_karpathy_test.json", [{"image": "val2014/1.jpg", "caption": ["A red dog, on the old mat.", "A cat sat!", "Cat"]}])
    pictures(root, "val2014/1.jpg")


def aro_flickr_order(root: Path) -> None:
    put(root / "flickr30k_test.json", [{"image": "flickr30k-images/1.jpg", "caption": ["Two men in a boat"]}])
    pictures(root, "flickr30k-images/1.jpg")


def valse(root: Path) -> None:
    names = "existence plurals counting-hard counting-small-quant counting-adversarial relations action-replacement actant-swap"
    for part in (*names.split(), "coreference-standard", "coreference-hard", "foil-it"):
        row = {
            "dataset": "SWiG",
            "image_file": "a_1.jpg",
            "caption": "a man sings",
            "foil": f"a man {part}",
            "classes": "",
            "classes_foil": "",
        }
        votes = [{"caption": 3, "foil": 0, "other": 0}, {"caption": 1, "foil": 2, "other": 0}]
        put(root / "data" / f"{part}.json", {f"{part}_{k}": row | {"mturk": vote} for k, vote in enumerate(votes)})
    pictures(root, "images/SWiG/a_1.jpg")


def sugarcrepe_pp(root: Path) -> None:
    for subset in ("replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"):
        row = {"id": 7, "filename": "1.jpg", "caption": "a cup", "caption2": "there is a cup", "negative_caption": f"a {subset} cup"}
        put(root / "data" / f"{subset}.json", [row])
    pictures(root, "val2017/1.jpg")


def whatsup(root: Path) -> None:
    words = {"images": ("left_of", "right_of", "on", "under"), "clevr": ("left_of", "right_of", "in-front_of", "behind")}
    for part, relations in words.items():
        rows = []
        for relation in relations:
            options = [f"a cup {each_relation} a box" for each_relation in (relation, *(other for other in relations if other != relation))]
            rows.append({"image_path": f"data/controlled_{part}/cup_{relation}_box.jpeg", "caption_options": options})
        put(root / f"controlled_{part}_dataset.json", rows)
        pictures(root, *(row["image_path"].removeprefix("data/") for row in rows))
    for name in ("coco_qa_one_obj", "coco_qa_two_obj"):
        put(root / f"{name}.json", [[139, "a dog left of a cat", "a dog right of a cat"]])
    for name in ("vg_qa_one_obj", "vg_qa_two_obj"):
        put(root / f"{name}.json", [[77, "a dog left of a cat", "a dog right of a cat"]])
    pictures(root, "val2017/000000000139.jpg", "vg_images/77.jpg")


def conme(root: Path) -> None:
    columns = "image,question,answer,base_question,correct_option,incorrect_option"
    asked = '"What is left, say?\nA: a cup\nB: a box",B,"What is left, say?",a box,a cup'
    for part in ("att", "obj", "rel"):
        put(root / f"replace-{part}.csv", f"{columns}\nimages/1.jpg,{asked}\n139,{asked}\n")
    pictures(root, "images/1.jpg", "images/000000000139.jpg")


def vl_checklist(root: Path) -> None:
    for name in ("Attribute/vaw/action", "Attribute/vg/color", "Object/Size/hake_size/hake_obj_small", "Relation/swig_action"):
        put(root / "data" / f"{name}.json", [["sub/1.jpg", {"POS": ["a wet dog"], "NEG": ["a dry dog"]}]])
    pictures(root, "vg/sub/1.jpg", "hake/sub/1.jpg", "swig/sub/1.jpg")


def pope(root: Path) -> None:
    for split in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": k, "image": f"{k // 2}.jpg", "text": f"Is there a cup {k}?", "label": ("yes", "no")[k % 2]} for k in range(4)
        ]
        lines(root / f"output/coco/coco_pope_{split}.json", rows)
    pictures(root, "val2014/0.jpg", "val2014/1.jpg")


def naturalbench(root: Path) -> None:
    rows = []
    for k, (kind, first, second) in enumerate((("yes_no", "Yes", "No"), ("multiple_choice", "A", "B"))):
        row = {"Index": k, "Image_0": f"{k}_0.jpg", "Image_1": f"{k}_1.jpg", "Question_0": "Is it red?", "Question_1": "Is it blue?"}
        answers = {"Image_0_Question_0": first, "Image_1_Question_0": second, "Image_0_Question_1": second, "Image_1_Question_1": first}
        rows.append(row | answers | {"Question_Type": kind, "Source": "made"})
    lines(root / "train.jsonl", rows)
    pictures(root, *(f"{k}_{i}.jpg" for k in range(2) for i in range(2)))


def mmvp(root: Path) -> None:
    rows = [f"{k},Which way?,(a) Left (b) Right,({answer})" for k, answer in zip((1, 2, 3, 4), "abba", strict=True)]
    put(root / "Questions.csv", "\n".join(["lndex,Question,Options,Correct Answer", *rows]) + "\n")
    pictures(root, *(f"MMVP Images/{k}.jpg" for k in (1, 2, 3, 4)))


def hallusionbench(root: Path) -> None:
    """A set of two figures with two questions (VD), and one that is asked without and with its figure (VS)."""
    rows = []
    for figure in "01":
        for question in "01":
            rows.append(hallusion_row("VD", "1", "0", figure, question, int(figure == question)))
    rows += [hallusion_row("VS", "0", "3", "0", "0", "1"), hallusion_row("VS", "2", "3", "1", "0", "0")]
    put(root / "HallusionBench.json", rows)
    pictures(root, *(f"hallusion_bench/{name}.png" for name in ("VD/chart/0_0", "VD/chart/0_1", "VS/chart/3_1")))


def hallusion_row(category: str, visual: str, number: str, figure: str, question: str, gold: Any) -> dict[str, Any]:
    row = {"category": category, "subcategory": "chart", "visual_input": visual, "set_id": number, "figure_id": figure, "sample_note": ""}
    row |= {"question_id": question, "question": f"Is {question} larger?", "gt_answer_details": "", "gt_answer": gold}
    return row | {"filename": None if visual == "0" else f"./{category}/chart/{number}_{figure}.png"}


def mme(root: Path) -> None:
    for task in (
        "existence",
        "count",
        "position",
        "color",
        "OCR",
        "commonsense_reasoning",
        "numerical_calculation",
        "text_translation",
        "code_reasoning",
    ):
        put(root / task / "1.txt", "Is it so? Please answer yes or no.\tYes\nIs it not? Please answer yes or no.\tNo\n")
        pictures(root, f"{task}/1.jpg")
    for task in ("posters", "celebrity", "scene", "landmark", "artwork"):
        put(
            root / task / "questions_answers_YN" / "1.txt",
            "Is it so? Please answer yes or no.\tYes\n\nIs it not? Please answer yes or no.\tNo\n",
        )
        pictures(root, f"{task}/images/1.png")


def amber(root: Path) -> None:
    kinds = ("discriminative-hallucination", "discriminative-attribute-state", "relation", "discriminative-attribute-number")
    truth = [{"id": k, "type": kind, "truth": ("no", "yes")[k % 2]} for k, kind in enumerate(kinds, 1005)]
    put(root / "data/annotations.json", [{"id": 1, "type": "generative", "truth": ["sky"], "hallu": ["sea"]}, *truth])
    queries = [{"id": row["id"], "image": "AMBER_1.jpg", "query": f"Is it {row['id']}?"} for row in truth]
    put(root / "data/query/query_discriminative.json", queries)
    pictures(root, "image/AMBER_1.jpg")


def vsr(root: Path) -> None:
    row = {
        "image": "1.jpg",
        "image_link": "",
        "caption": "The cat is under the bed.",
        "label": 1,
        "relation": "under",
        "subj": "cat",
        "obj": "bed",
    }
    lines(
        root / "data/splits/zeroshot/test.jsonl",
        [row, row | {"label": 0, "relation": "on"}, row | {"caption": "The cat is on it.", "label": 0}],
    )
    pictures(root, "images/1.jpg")


def cvbench(root: Path) -> None:
    row = {
        "idx": 0,
        "type": "2D",
        "task": "Count",
        "question": "How many?",
        "choices": ["1", "2", "3", "4", "5"],
        "answer": "(B)",
        "prompt": "x",
    }
    lines(root / "test_2d.jsonl", [row | {"filename": f"img/2D/{k}.png", "source": name} for k, name in enumerate(("ADE20K", "COCO"))])
    row |= {"type": "3D", "task": "Depth", "choices": ["chair", "desk"], "answer": "(A)", "filename": "img/3D/0.png", "source": "Omni3D"}
    lines(root / "test_3d.jsonl", [row])
    pictures(root, "img/2D/0.png", "img/2D/1.png", "img/3D/0.png")


def mmstar(root: Path) -> None:
    row = {
        "index": 0,
        "question": "Which?\nOptions: A: one, B: two, C: three, D: four",
        "image": "0.jpg",
        "answer": "C",
        "category": "math",
    }
    lines(
        root / "mmstar.jsonl",
        [row, row | {"index": 1, "question": "Which? A: one, B: two", "answer": "b", "category": "coarse perception"}],
    )
    pictures(root, "0.jpg")


def blink(root: Path) -> None:
    for task in BENCHMARKS["blink"].files:
        folder = task.name.split("/")[0]
        row = {
            "idx": f"val_{folder}_1",
            "question": "Which?",
            "sub_task": folder,
            "prompt": "Which? (A) one (B) two",
            "choices": ["one", "two"],
        }
        row |= {"image_1": "1.png", "image_2": "2.png", "image_3": None, "image_4": None, "answer": "(B)", "explanation": ""}
        lines(root / folder / "val.jsonl", [row])
        pictures(root, f"{folder}/1.png", f"{folder}/2.png")


def visual_counterfact(root: Path) -> None:
    row = {
        "object": "plum",
        "correct_answer": "['purple', 'red']",
        "incorrect_answer": "green",
        "original_image": "o.png",
        "counterfact_image": "c.png",
    }
    lines(root / "color.jsonl", [row])
    lines(root / "size.jsonl", [row | {"correct_answer": "horse", "incorrect_answer": "cat"}])
    pictures(root, "o.png", "c.png")


WRITERS: dict[str, Callable[[Path], None]] = {name: globals()[name] for name in BENCHMARKS}
NAMES = sorted(WRITERS)


@pytest.fixture
def root(request, tmp_path):
    folder = tmp_path / request.getfixturevalue("name")
    WRITERS[folder.name](folder)
    return folder


def read(name: str, root: Path) -> tuple[Item, ...]:
    loaded = load(BENCHMARKS[name], root)
    assert not loaded.problems, loaded.problems[0]
    return loaded.items


# What holds for each ----------------------------------------------------------------------------------------------------------------------


def answered(items: Sequence[Item], rule: Callable[[Item, int, int], float]) -> list[Judged]:
    """A score for each image and text of each item."""
    return [Judged(item, tuple(tuple(rule(item, i, c) for c in range(len(item.texts))) for i in range(len(item.images)))) for item in items]


MOST = {"perception": 2000.0, "cognition": 800.0, "total": 2800.0}


def most(name: str) -> float:
    return MOST.get(name, 200.0 if name.startswith("score/") else 100.0)


@pytest.mark.parametrize("name", NAMES)
def test_an_oracle_has_everything_and_a_stubborn_model_only_what_language_gives(name, root):
    benchmark, items = BENCHMARKS[name], read(name, root)
    assert benchmark.headline in benchmark.metrics(answered(items, lambda item, i, c: item.match[i][c]))
    best = benchmark.metrics(answered(items, lambda item, i, c: item.match[i][c]))
    assert {k: v for k, v in best.items() if "yes_ratio" not in k} == {k: most(k) for k in best if "yes_ratio" not in k}

    draw = random.Random(0)
    prior = {item.id: tuple(draw.random() for _ in item.texts) for item in items}
    outcomes = [Outcome(item, (prior[item.id],) * len(item.images), prior[item.id]) for item in items]
    found = results(benchmark, outcomes)
    shared = set(found["seen"]) & set(found["blank"])
    assert benchmark.headline in shared or benchmark.headline in ("group", "image", "group_macro")
    assert {key: found["seen"][key] for key in shared} == {key: found["blank"][key] for key in shared}
    assert set(found["chance"]) >= {benchmark.headline}

    tied = benchmark.metrics(answered(items, lambda item, i, c: 0.0))
    assert tied[benchmark.headline] == 0, "a tie is wrong"
    broken = benchmark.metrics(answered(items, lambda item, i, c: math.nan))
    assert broken[benchmark.headline] == 0, "a score that is no number is wrong"


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_a_file_or_a_column_that_is_missing_is_one_sentence(name, root):
    benchmark = BENCHMARKS[name]
    whole = len(read(name, root))
    files = [path for path in root.rglob("*") if path.is_file()]
    annotations = [path for path in files if path.suffix in (".json", ".jsonl", ".csv", ".txt")]
    for picture in set(files) - set(annotations):
        picture.rename(picture.with_suffix(".gone"))
    if name.startswith("aro_") and (root / "cut").exists():
        for cut in (root / "cut").iterdir():
            cut.unlink()
    loaded = load(benchmark, root)
    problem = str(loaded.problems[0])
    assert len(loaded.problems) + len(loaded.items) <= whole and re.search(r"no picture .*\.(jpg|jpeg|png)", problem), problem
    assert any(str(path) in problem for path in annotations) and "\n" not in problem

    if name not in ("mme", "cola", "whatsup", "vl_checklist"):  # no columns
        for path in annotations:
            path.write_text(
                re.sub(r'"(\w+)":|\b(Question(?=,Options)|base_question)', r'"\1s":' if path.suffix != ".csv" else r"\2s", path.read_text())
            )
        problem = str(load(benchmark, root).problems[0])
        assert "did you mean" in problem and str(root) in problem, problem
    for path in annotations:
        path.write_text("{]")
    assert load(benchmark, root).problems and not load(benchmark, root).items
    for path in annotations:
        path.unlink()
    loaded = load(benchmark, root)
    assert not loaded.items and re.search(r"no such file|no \.(json|txt) file", str(loaded.problems[0]))


@pytest.mark.parametrize("name", NAMES)
def test_pictures_of_a_limit_are_all_that_is_needed(name, root):
    """One item, or its cluster, of each: without the other pictures it is the same, and without one of its own it is named."""
    whole, taken = len(read(name, root)), load(BENCHMARKS[name], root, limit=1)
    needed = {picture for item in taken.items for image in item.images for picture in image}
    pictured = [path for path in root.rglob("*") if path.suffix in (".jpg", ".jpeg", ".png") and path.is_file()]
    for path in {*pictured} - needed - {root / "images" / "1.jpg"}:  # of which ARO's are cut
        path.unlink()
    found = load(BENCHMARKS[name], root, limit=1)
    assert (found.items, found.problems, found.in_files) == (taken.items, (), whole)
    for path in needed or pictured:
        path.unlink(missing_ok=True)
    (root / "images" / "1.jpg").unlink(missing_ok=True)
    found = load(BENCHMARKS[name], root, limit=1)
    assert len(found.problems) + len(found.items) == len(taken.items) and "no picture" in str(found.problems[0])


@pytest.mark.parametrize("name", NAMES)
def test_another_revision_is_named(name, root):
    benchmark = BENCHMARKS[name]
    loaded = load(benchmark, root)
    stated = [file for file in benchmark.files if file.rows is not None]
    notes = "\n".join(loaded.notes)
    assert len(re.findall("another revision", notes)) >= bool(stated)
    assert all(str(file.rows) in notes for file in stated) and loaded.items
    assert all(Path(path).is_file() for path in re.findall(r"^(\S+) has ", notes, re.M)), notes


@pytest.mark.parametrize("name", NAMES)
def test_every_probe_that_fits_makes_groups(name, root):
    benchmark, items = BENCHMARKS[name], read(name, root)
    assert {probe for probe in benchmark.probes if probe != "generate"} <= set(PROBES) and benchmark.probes[0] in PROBES
    for probe in benchmark.probes:
        if probe == "generate":
            for item in items:
                said = ["no such answer (Z)"] * len(item.images)
                assert Generate().asked(item) and read_text(item, said, said[0], None, PARSERS.get(name, answer)).said == tuple(said)
        else:
            assert plan(items, PROBES[probe]).groups


@pytest.mark.parametrize("name", NAMES)
def test_each_has_a_page_that_names_its_files(name):
    pages = REPO / "docs" / "benchmarks"
    page = (pages / f"{'aro' if name.startswith('aro_') else name}.md").read_text()
    benchmark = BENCHMARKS[name]
    assert benchmark.title.split(",")[0].split(" (")[0] in page and name in page
    for file in benchmark.files:
        assert (
            Path(file.name).name in page or re.sub(r"(random|popular|adversarial)", "*", Path(file.name).name) in page or file.name in page
        ), file
    assert name in (pages / "index.md").read_text()


# Formats, one by one ----------------------------------------------------------------------------------------------------------------------


def written(name: str, tmp_path: Path) -> dict[str, Item]:
    folder = tmp_path / name
    WRITERS[name](folder)
    return {item.id: item for item in read(name, folder)}


def test_rows_become_items(tmp_path):
    item = written("sugarcrepe", tmp_path)["swap_obj/1"]
    assert (
        item.texts == ("a cup 1", "a swap_obj cup 1")
        and item.match == ((1, 0),)
        and item.images == ((tmp_path / "sugarcrepe/val2017/000001.jpg",),)
    )
    item = written("winoground", tmp_path)["1"]
    assert [p.name for image in item.images for p in image] == ["ex_1_img_0.png", "ex_1_img_1.png"] and item.match == ((1, 0), (0, 1))
    item = written("pope", tmp_path)["popular/3"]
    assert item.prompt == "Is there a cup 3?\nAnswer the question using a single word or phrase." and item.match == ((0, 1),)
    items = written("naturalbench", tmp_path)
    assert items["0/1"].match == ((0, 1), (1, 0)) and items["0/1"].prompt == "Is it blue? Please answer Yes or No."
    assert items["1/0"].texts == ("A", "B") and items["1/0"].listed and items["1/0"].match == ((1, 0), (0, 1))
    item = written("mmvp", tmp_path)["3"]
    assert item.texts == ("Left", "Right") and item.match == ((0, 1),) and item.tags["pair"] == "2"
    items = written("hallusionbench", tmp_path)
    assert (
        items["VS_chart_3_0_0"].images == ((),)
        and items["VS_chart_3_0_0"].match == ((1, 0),)
        and items["VS_chart_3_1_0"].match == ((0, 1),)
    )
    item = written("whatsup", tmp_path)["coco_one/1"]
    assert item.images[0][0].name == "000000000139.jpg"
    item = written("mmstar", tmp_path)["1"]
    assert item.texts == ("A", "B") and item.match == ((0, 1),)
    item = written("blink", tmp_path)["val_Jigsaw_1"]
    assert [p.name for p in item.images[0]] == ["1.png", "2.png"] and item.prompt == "Which? (A) one (B) two"
    items = written("visual_counterfact", tmp_path)
    assert items["color/1"].texts == ("purple", "red", "green") and items["color/1"].match == ((1, 1, 0), (0, 0, 1))
    assert items["color/1"].prompt == "Answer with one word. What color is this plum?"
    assert items["size/1"].prompt == "Answer with the correct option. Which is larger here, cat or horse?" and items["size/1"].texts == (
        "horse",
        "cat",
    )
    assert set(written("valse", tmp_path)) >= {"plurals/plurals_0"} and len(written("valse", tmp_path)) == 11, "rejected rows do not count"
    assert {item.tags["type"] for item in written("amber", tmp_path).values()} == {"existence", "attribute", "relation"}
    assert written("vl_checklist", tmp_path)["Attribute/vaw/action/1"].images[0][0] == tmp_path / "vl_checklist/vg/sub/1.jpg"
    item = written("cvbench", tmp_path)["3d/1"]
    assert item.texts == ("chair", "desk") and item.match == ((1, 0),)
    item = written("conme", tmp_path)["replace-rel/7"]
    assert item.images[0][0].name == "000000000139.jpg" and (item.prompt, item.texts) == ("What is left, say?", ("a box", "a cup"))
    item = written("cola", tmp_path)["1"]
    assert [p.name for image in item.images for p in image] == ["1.jpg", "2.jpg"]


def test_pictures_of_coco_may_lie_beside_the_benchmarks(tmp_path):
    sugarcrepe(tmp_path / "sugarcrepe")
    (tmp_path / "coco").mkdir()
    (tmp_path / "sugarcrepe/val2017").rename(tmp_path / "coco/val2017")
    assert read("sugarcrepe", tmp_path / "sugarcrepe")[0].images[0][0] == tmp_path / "coco/val2017/000000.jpg"


def test_aro_cuts_pictures_to_their_box_once(tmp_path):
    items = written("aro_relation", tmp_path)
    cut = items["1"].images[0][0]
    image = Image.open(cut)
    assert image.size == (3, 4) and image.getpixel((0, 0))[0] > 150 and max(image.getpixel((2, 3))) < 100
    before = cut.stat().st_mtime_ns
    assert read("aro_relation", tmp_path / "aro_relation")[0].images[0][0] == cut and cut.stat().st_mtime_ns == before
    rows = json.loads((tmp_path / "aro_relation/visual_genome_relation.json").read_text())
    put(
        tmp_path / "aro_relation/visual_genome_relation.json",
        [rows[0] | {"bbox_x": 39}, rows[1] | {"bbox_w": "3"}, rows[2] | {"bbox_h": 0}],
    )
    problems = [str(problem) for problem in load(BENCHMARKS["aro_relation"], tmp_path / "aro_relation").problems]
    assert "does not fit in it" in problems[0] and all("whole numbers" in problem for problem in problems[1:]) and len(problems) == 3


def test_frames_of_videos_are_arrays_of_blue_green_and_red(tmp_path):
    """As EqBen's own loader reads them; written once. A file that declares more than it holds costs no memory."""
    eqben(tmp_path)
    frame = np.zeros((2, 3, 3), np.uint8)
    frame[0, 1] = (255, 0, 9)
    (tmp_path / "images/eqbenyoucook2/v").mkdir(parents=True)
    for name in ("a", "b"):
        np.save(tmp_path / f"images/eqbenyoucook2/v/{name}.npy", frame)
    row = {"image0": "eqbenyoucook2/v/a.npy", "image1": "eqbenyoucook2/v/b.npy", "caption0": "a cup", "caption1": "a hat"}
    put(tmp_path / "all_select.json", [row])
    (item,) = read("eqben", tmp_path)
    assert item.images[0][0] == tmp_path / "png/eqbenyoucook2/v/a.png" and item.tags["subset"] == "youcook2"
    with Image.open(item.images[0][0]) as image:
        assert image.size == (3, 2) and image.getpixel((1, 0)) == (9, 0, 255)
    written = item.images[0][0].stat().st_mtime_ns
    assert read("eqben", tmp_path)[0].images[0][0].stat().st_mtime_ns == written
    header = {"descr": "|u1", "fortran_order": False, "shape": (40_000, 40_000, 3)}
    for content, sentence in (
        (b"\x93NUMPY", "no array"),
        (b"PK\x03\x04", "no array"),
        (None, "no array"),
        (frame[0], "is not a picture"),
        (frame * 1.0, "is not a picture"),
    ):
        item.images[0][0].unlink(missing_ok=True)
        with open(tmp_path / "images/eqbenyoucook2/v/a.npy", "wb") as file:
            if content is None:
                np.lib.format.write_array_header_1_0(file, header)
            elif isinstance(content, bytes):
                file.write(content)
            else:
                np.save(file, content)
        (problem,) = load(BENCHMARKS["eqben"], tmp_path).problems
        assert sentence in str(problem) and "all_select.json" in str(problem) and "a.npy" in str(problem) and "\n" not in str(problem)


def test_orders_are_frozen_and_differ():
    caption = aro_order.cleaned("A red dog, on the old mat.")
    assert caption == "a red dog, on the old mat"
    made = aro_order.shuffles(caption)
    assert made == FROZEN
    assert all(sorted(text.split()) == sorted(caption.split()) and text != caption for text in made) and len(set(made)) == len(made)
    assert aro_order.shuffles("cat") == [] and aro_order.shuffles("cat cat") == []
    assert aro_order.shuffles("cat sat") == ["sat cat"], "there is one other order"
    assert len(aro_order.cleaned("word " * 50).split()) == 30
    content = [word for word in made[0].split() if word in ("a", "on", "the")]
    assert content == ["a", "on", "the"] and made[0].split()[0] == "a", "words of the language's frame stay in place"


FROZEN = ["a dog, red on the old mat", "the red dog, a on old mat", "red dog, a the on old mat", "mat on the old a red dog,"]


# Metrics by hand --------------------------------------------------------------------------------------------------------------------------


def with_scores(items: Sequence[Item], scores: Sequence[Any], blind: bool = False) -> list[Judged]:
    tables = [each_score if isinstance(each_score[0], (list, tuple)) else [each_score] for each_score in scores]
    return [Judged(item, tuple(tuple(map(float, line)) for line in table), blind) for item, table in zip(items, tables, strict=True)]


def on(name: str, tmp_path: Path, right: Callable[[Item], Any], *, blind: bool = False) -> Values:
    """Metrics where ``right`` says of an item (True, False, None for a tie), or of each of its images, whether it is answered rightly."""
    items = list(written(name, tmp_path).values())
    tables = []
    for item in items:
        said = right(item)
        said = said if isinstance(said, list) else [said] * len(item.images)
        tables.append(
            [
                [0.0 if ok is None else (1.0 if bool(truth) is ok else 0.0) for truth in line]
                for ok, line in zip(said, item.match, strict=True)
            ]
        )
    return BENCHMARKS[name].metrics(with_scores(items, tables, blind))


QUAD = Item("q", ((Path("a"),), (Path("b"),)), ("x", "y"), ((1, 0), (0, 1)))


@pytest.mark.parametrize(
    ("scores", "text", "image", "group", "pair"),
    [
        ([[2, 1], [1, 2]], 100, 100, 100, 100),
        ([[2, 1], [3, 4]], 100, 0, 0, 100),
        ([[2, 3], [1, 4]], 0, 100, 0, 50),
        ([[1, 1], [1, 2]], 0, 0, 0, 50),
        ([[0, 0], [0, 0]], 0, 0, 0, 0),
    ],
)
def test_quads_are_winogrounds(scores, text, image, group, pair):
    assert quads(with_scores([QUAD], [scores])) == {"text": text, "image": image, "group": group, "pair": pair}


def test_ties_are_guesses_in_a_blind_table():
    blind = with_scores([QUAD], [[[0, 0], [0, 0]]], blind=True)
    assert quads(blind) == {"text": 25, "pair": 50}, "and a blind table says nothing of images"
    three = Item("t", ((Path("a"),),), ("x", "y", "z"), ((1, 1, 0),))
    for scores, seen, guess in (([2, 2, 1], 1, 1), ([1, 2, 1], 0, 1 / 2), ([1, 1, 1], 0, 1 / 3), ([1, 2, 2], 0, 0), ([1, 3, 2], 0, 0)):
        assert [text_right(with_scores([three], [scores], blind)[0]) for blind in (False, True)] == [seen, pytest.approx(guess)]
    four = Item("f", ((Path("a"),),), ("w", "x", "y", "z"), ((1, 0, 0, 0),))
    assert text_right(with_scores([four], [[1, 1, 1, 0]], True)[0]) == pytest.approx(1 / 3)


def test_chance_is_known_by_hand(tmp_path):
    expected = {
        "sugarcrepe": {"macro": 50}, "mmvp": {"pair": 25},
        "winoground": {"text": 25, "image": 25, "group": 100 / 6, "group/Object": 100 / 6},
        "naturalbench": {"accuracy": 50, "q_acc": 25, "i_acc": 25, "g_acc": 6.25}, "mme": {"perception": 750, "cognition": 300},
        "sugarcrepe_pp": {"macro": 100 / 3}, "aro_relation": {"macro": 50}, "cvbench": {"cv_bench": (20 + 50) / 2}, "blink": {"macro": 50},
        "pope": {"accuracy": 50, "f1_macro": 50, "auc": 50}, "vismin": {"group_macro": 100 / 6}, "visual_counterfact": {"text": 25},
        "whatsup": {"pair/images": 6.25, "set/images": 100 / 256, "individual/images": 25},
        "hallusionbench": {"aAcc": 50, "qAcc": 25, "fAcc": (25 + 25 + 50) / 3},
    }  # fmt: skip
    for name, values in expected.items():
        found = chance(BENCHMARKS[name], list(written(name, tmp_path).values()))
        assert {key: found[key] for key in values} == pytest.approx(values), name


def test_sugarcrepe_means_subsets_and_kinds(tmp_path):
    """Of two items each: add_att one right, swap_obj a tie in both, the others all right."""
    found = on(
        "sugarcrepe",
        tmp_path,
        lambda item: item.id == "add_att/0" if item.tags["subset"] == "add_att" else None if "swap_obj" in item.id else True,
    )
    assert (found["macro/add_att"], found["macro/swap_obj"], found["macro/add"], found["macro/swap"]) == (50, 0, 75, 50)
    assert found["macro"] == pytest.approx((50 + 0 + 5 * 100) / 7) and found["accuracy"] == pytest.approx(100 * 11 / 14)


def test_pope_by_hand(tmp_path):
    """Per split: two yes, two no. The model says yes, yes, no answer, yes: one hit of two, two false alarms."""
    items = [item for item in written("pope", tmp_path).values() if item.tags["split"] == "random"]
    assert [item.match[0] for item in items] == [(1, 0), (0, 1), (1, 0), (0, 1)]
    found = BENCHMARKS["pope"].metrics(with_scores(items, [[2, 1], [2, 1], [1, 1], [5, 1]]))
    assert found["accuracy"] == 25 and found["yes_ratio"] == 75
    assert found["precision"] == pytest.approx(100 / 3) and found["recall"] == 50 and found["f1"] == found["f1_macro"] == pytest.approx(40)
    assert found["auc"] == 100 * (0.5 + 0 + 0 + 0) / 4, "margins of yes 1 and 0, of no 1 and 4: one tie"


def test_auc_and_threshold_against_counting():
    draw = random.Random(1)
    for _ in range(50):
        pairs = [(float(draw.randrange(6)), draw.random() < 0.5) for _ in range(draw.randrange(2, 12))]
        yes, no = [m for m, true in pairs if true], [m for m, true in pairs if not true]
        naive = [1.0 if a > b else 0.5 if a == b else 0.0 for a in yes for b in no]
        assert auc(pairs) == (pytest.approx(100 * sum(naive) / len(naive)) if naive else None)
        cuts = [-1.0, *(k / 4 for k in range(-2, 24)), 6.5]
        best = max(sum((m > cut) is true for m, true in pairs) for cut in cuts)
        assert sum((m > threshold(pairs)) is true for m, true in pairs) == best
    assert threshold([(3.0, True), (5.0, True)]) == 0 and threshold([(3.0, True), (1.0, False)]) == 2
    assert auc([(math.nan, True), (0.0, False)]) is None


def test_a_biased_model_that_knows_has_a_high_calibrated_accuracy():
    items = [Item(str(k), ((Path(str(k)),),), ("Yes", "No"), (one_hot(k % 2, 2),), "q", cluster=str(k)) for k in range(40)]
    always_yes = with_scores(items, [[10 - item.match[0][1], 0] for item in items])
    assert binary(always_yes)["accuracy"] == 50 and binary(always_yes)["yes_ratio"] == 100 and calibrated(always_yes) == 100
    assert calibrated(always_yes[:1]) is None, "one half is empty"


def test_naturalbench_by_hand(tmp_path):
    """Group 0: question 0 right on both pictures, question 1 on picture 1 alone. Group 1: a tie everywhere."""
    found = on("naturalbench", tmp_path, lambda item: {"0/0": [True, True], "0/1": [False, True]}.get(item.id, [None, None]))
    assert found == {"accuracy": 100 * 3 / 8, "q_acc": 25, "i_acc": 25, "g_acc": 0}


def test_mmvp_and_mme_by_hand(tmp_path):
    assert on("mmvp", tmp_path, lambda item: item.id != "4") == {"pair": 50, "accuracy": 75}
    found = on("mme", tmp_path, lambda item: not item.id.endswith("2") or item.tags["task"] == "OCR")
    assert found["score/OCR"] == 200 and found["score/count"] == 50 and found["perception"] == 9 * 50 + 200 and found["cognition"] == 200
    assert found["total"] == 850
    items = [item for item in written("mme", tmp_path).values() if item.tags["task"] != "count"]
    found = BENCHMARKS["mme"].metrics(answered(items, lambda item, i, c: item.match[i][c]))
    assert found["cognition"] == 800 and not found.keys() & {"total", "perception"}, "a sum of fewer tasks is another number"


def test_hallusionbench_by_hand(tmp_path):
    """VD: right but for question 1 on figure 0. VS: wrong without the figure, right with it."""
    found = on("hallusionbench", tmp_path, lambda item: item.id not in ("VD_chart_0_0_1", "VS_chart_3_0_0"))
    assert found["aAcc"] == pytest.approx(100 * 4 / 6) and found["aAcc_pictures"] == 80
    assert found["qAcc"] == pytest.approx(100 / 3), "question 0 of VD; question 1 fails on figure 0, that of VS without its figure"
    assert found["fAcc"] == pytest.approx(200 / 3), "figure 1 of VD and of VS; figure 0 of VS is none"
    assert found["qAcc_pictures"] == pytest.approx(200 / 3) and found["fAcc_pictures"] == pytest.approx(200 / 3)
    assert found["mean_pictures"] == pytest.approx((80 + 200 / 3 + 200 / 3) / 3)


def test_hallusionbench_has_the_authors_numbers_and_the_leaderboards(tmp_path):
    """Random answers to two categories whose subcategory and numbers are the same, counted naively by the keys of the authors' utils.py,
    which are VLMEvalKit's too: its l2-category is CATEGORY_SUBCATEGORY."""
    rows = [hallusion_row(category, str(int(not (category == "VS" and figure == "0"))), number, figure, question, "1")
            for category in ("VD", "VS") for number in "012" for figure in "012" for question in "012"]  # fmt: skip
    put(tmp_path / "HallusionBench.json", rows)
    pictures(tmp_path, *(f"hallusion_bench/{row['filename'][2:]}" for row in rows if row["filename"]))
    draw, loaded = random.Random(4), read("hallusionbench", tmp_path)
    right = {item.id: draw.random() < 0.8 for item in loaded}

    def all_right(counted: Sequence[dict[str, Any]], *names: str) -> float:
        sets: dict[str, list[bool]] = {}
        for row in counted:
            prefix = f"{row['category']}_{row['subcategory']}_{row['set_id']}"
            said = right[f"{prefix}_{row['figure_id']}_{row['question_id']}"]
            sets.setdefault("_".join([prefix, *(row[name] for name in names)]), []).append(said)
        return 100 * sum(map(all, sets.values())) / len(sets)

    figures = [row for row in rows if (row["category"], row["figure_id"]) != ("VS", "0")]
    pictured = [row for row in rows if row["visual_input"] != "0"]
    expected = {
        "aAcc": all_right(rows, "figure_id", "question_id"),
        "qAcc": all_right(rows, "question_id"),
        "fAcc": all_right(figures, "figure_id"),
        "aAcc_pictures": all_right(pictured, "figure_id", "question_id"),
        "qAcc_pictures": all_right(pictured, "question_id"),
        "fAcc_pictures": all_right(pictured, "figure_id"),
    }
    expected["mean_pictures"] = sum(value for name, value in expected.items() if name.endswith("_pictures")) / 3
    tables = with_scores(loaded, [[[float(right[item.id]), float(not right[item.id])]] for item in loaded])
    assert BENCHMARKS["hallusionbench"].metrics(tables) == pytest.approx(expected) and len(set(expected.values())) == 6


def test_amber_counts_the_answer_no(tmp_path):
    """Truth yes, no, yes, no; the model says no to all but the third, where it says nothing."""
    items = list(written("amber", tmp_path).values())
    found = BENCHMARKS["amber"].metrics(with_scores(items, [[0, 1], [0, 1], [1, 1], [0, 1]]))
    assert found["accuracy"] == 50 and found["precision"] == pytest.approx(200 / 3) and found["recall"] == 100 and found["yes_ratio"] == 0
    assert found["f1"] == pytest.approx(80) and found["f1/attribute"] == 100 and found["accuracy/existence"] == 0
    assert "f1/existence" not in found, "nothing is absent there"


def test_whatsup_by_hand(tmp_path):
    """Pictures: left, right and on are right: one pair of two, no scene. CLEVR: all."""
    found = on("whatsup", tmp_path, lambda item: "under" not in item.id)
    assert (found["individual/images"], found["pair/images"], found["set/images"]) == (75, 50, 0)
    assert (found["individual/clevr"], found["pair/clevr"], found["set/clevr"], found["individual/vg_two"]) == (100, 100, 100, 100)
    assert found["individual"] == pytest.approx((75 + 5 * 100) / 6)
    path = tmp_path / "whatsup/controlled_images_dataset.json"
    put(path, json.loads(path.read_text())[:3])
    found = BENCHMARKS["whatsup"].metrics(answered(read("whatsup", tmp_path / "whatsup"), lambda item, i, c: item.match[i][c]))
    assert (found["pair/images"], found["set/images"]) == (pytest.approx(100 / 1.5), 0), "a pair and a scene without their fourth picture"


def test_aro_means(tmp_path):
    """Relations: eating one of two, on a tie; near is symmetric and out. Attributes: 25 cases count, one does not."""
    assert "near" in SYMMETRIC and "eating" not in SYMMETRIC and "on" not in SYMMETRIC
    found = on("aro_relation", tmp_path, lambda item: {"1": True, "2": False, "3": True, "4": None}[item.id])
    assert found == {"macro": 25, "macro/eating": 50, "macro/on": 0, "accuracy": 50}
    found = on("aro_attribution", tmp_path, lambda item: int(item.id) <= 5)
    assert found == {"macro": 20, "macro/red_old": 20, "accuracy": pytest.approx(500 / 26)}


def test_cvbench_vl_checklist_vismin_and_the_counterfacts_by_hand(tmp_path):
    found = on("cvbench", tmp_path, lambda item: item.id != "2d/1")
    assert (found["cv_bench"], found["accuracy"]) == (((0 + 100) / 2 + 100) / 2, pytest.approx(200 / 3))
    found = on("vl_checklist", tmp_path, lambda item: item.id != "Attribute/vaw/action/1")
    assert (found["macro/Attribute"], found["macro/Object"], found["macro"]) == (50, 100, pytest.approx(250 / 3))
    found = on("vismin", tmp_path, lambda item: item.tags["category"] == "object")
    assert (found["group/object"], found["group/counting"], found["group_macro"]) == (100, 0, 50)
    items = list(written("visual_counterfact", tmp_path).values())
    memory = [[[2, 1.5, 1], [2, 1.5, 1]], [[2, 1], [2, 1]]]
    found = BENCHMARKS["visual_counterfact"].metrics(with_scores(items, memory))
    assert (found["text"], found["pair"], found["image"]) == (0, 50, 0), "who answers from memory is right on the usual picture alone"


# Hostile and odd files --------------------------------------------------------------------------------------------------------------------


def test_captions_and_choices_by_hand(tmp_path):
    """Some items right, some wrong, some tied, in each of the others."""
    found = on("valse", tmp_path, lambda item: None if "existence" in item.id else item.tags["part"] != "plurals")
    assert found["macro"] == found["accuracy"] == pytest.approx(100 * 9 / 11) and found["macro/plurals"] == found["macro/existence"] == 0
    items = list(written("sugarcrepe_pp", tmp_path).values())
    found = BENCHMARKS["sugarcrepe_pp"].metrics(with_scores(items, [[2, 1, 0], [2, 0, 1], [1, 0, 0], [1, 1, 0], [0, 0, -1]]))
    assert found["macro"] == 60 and found["macro/replace_obj"] == found["macro/replace_rel"] == 0, (
        "both true captions must win; a tie loses"
    )
    found = on("conme", tmp_path, lambda item: {"att": item.id.endswith("/4"), "obj": True, "rel": None}[item.tags["part"][-3:]])
    assert (found["macro/replace-att"], found["macro/replace-obj"], found["macro/replace-rel"], found["macro"]) == (50, 100, 0, 50)
    found = on("mmstar", tmp_path, lambda item: item.tags["category"] == "math" or None)
    assert (found["macro/math"], found["macro/coarse perception"], found["macro"], found["accuracy"]) == (100, 0, 50, 50)
    found = on("blink", tmp_path, lambda item: item.tags["task"] in ("Counting", "Jigsaw"))
    assert found["macro"] == found["accuracy"] == pytest.approx(100 * 2 / 14) and found["macro/Jigsaw"] == 100
    found = on("aro_coco_order", tmp_path, lambda item: item.id == "1/0")
    assert found["accuracy"] == 50, "of two captions; one of a single word has no other order"
    assert on("aro_flickr_order", tmp_path, lambda item: None)["accuracy"] == 0


def test_vl_checklist_goes_through_linked_folders_and_refuses_texts_that_are_no_lists(tmp_path):
    vl_checklist(tmp_path / "vl")
    whole = read("vl_checklist", tmp_path / "vl")
    (tmp_path / "vl/data/Attribute/vaw").rename(tmp_path / "vaw")
    (tmp_path / "vl/data/Attribute/vaw").symlink_to(tmp_path / "vaw")
    assert read("vl_checklist", tmp_path / "vl") == whole
    put(tmp_path / "vl/data/Object/x.json", [["sub/1.jpg", {"POS": "a cup", "NEG": "a hat"}]])
    loaded = load(BENCHMARKS["vl_checklist"], tmp_path / "vl")
    assert list(loaded.items) == list(whole) and "x.json: item 1: " in str(loaded.problems[0])


def test_equal_texts_are_read_counted_and_lose_where_they_tie(tmp_path):
    """As in four rows of SugarCrepe++, whose two true captions are equal, and 124 of VL-CheckList, whose true caption is the false one."""
    sugarcrepe_pp(tmp_path / "pp")
    row = {"id": 8, "filename": "1.jpg", "caption": "A cup", "caption2": "A cup ", "negative_caption": "a hat"}
    lines(tmp_path / "pp/data/swap_obj.json", [row])
    vl_checklist(tmp_path / "vl")
    put(tmp_path / "vl/data/Object/x.json", [["sub/1.jpg", {"POS": [pos], "NEG": ["a dry dog"]}] for pos in ("a dry dog", "a wet dog")])
    found = {}
    for name, folder in (("sugarcrepe_pp", tmp_path / "pp"), ("vl_checklist", tmp_path / "vl")):
        loaded = load(BENCHMARKS[name], folder)
        assert not loaded.problems and sum("1 items contain the same text twice, first" in note for note in loaded.notes) == 1
        asked = plan(loaded.items, PROBES["caption"])
        likely = {"A cup": -1.0, "A cup ": -1.0, "a hat": -2.0, "a wet dog": -3.0, "a dry dog": -4.0}
        scores = []
        for group in asked.groups:
            row_of = torch.tensor([likely.get(each.text, -9.0) for each in group.candidates])
            scores.append(GroupScores(row_of.expand(len(group.images), -1), row_of))
        found[name] = BENCHMARKS[name].metrics(judged(asked.outcomes(scores))["seen"])
    assert found["sugarcrepe_pp"]["macro/swap_obj"] == 100 and found["vl_checklist"]["macro/Object/x"] == 50


def test_vsr_by_hand(tmp_path):
    """Truth yes, no, no; the model says yes, nothing, yes."""
    found = BENCHMARKS["vsr"].metrics(with_scores(list(written("vsr", tmp_path).values()), [[2, 1], [1, 1], [3, 1]]))
    assert found["accuracy"] == pytest.approx(100 / 3) and found["yes_ratio"] == pytest.approx(200 / 3)
    assert (found["precision"], found["recall"]) == (50, 100) and found["f1"] == pytest.approx(200 / 3)
    assert found["auc"] == 50, "margin 1 of yes, 0 and 2 of no"
    assert found["macro"] == 25, "half of two about under, none of one about on"


@pytest.mark.parametrize(
    ("name", "parts"), [("eqben", ("sd", "ag")), ("bivlc", ("replace_object", "swap_object")), ("winoground", ("Object",))]
)
def test_quads_by_hand(name, parts, tmp_path):
    """The first item is right throughout; of the second one the second picture is wrong, and its texts tell no picture apart."""
    items = list(written(name, tmp_path).values())
    first = items[0].id
    found = on(name, tmp_path / "again", lambda item: True if item.id == first else [True, False])
    assert (found["text"], found["image"], found["group"], found["pair"]) == (50, 50, 50, 75)
    assert found[f"text/{parts[0]}"] == (100 if len(parts) > 1 else 50) and found.get(f"pair/{parts[-1]}") == (50 if len(parts) > 1 else 75)


def test_a_name_leads_to_no_file_outside(tmp_path):
    put(tmp_path / "secret.jpg", "secret")
    (tmp_path / "inner/images").mkdir(parents=True)
    with pytest.raises(DataError, match="leads outside"):
        Source(tmp_path / "inner").picture("here", "../../secret.jpg", "images")
    (tmp_path / "inner/images/0.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(DataError, match=r"here: image path '0\.jpg' leads outside .*put the picture itself there"):
        Source(tmp_path / "inner").picture("here", "0.jpg", "images")
    put(tmp_path / "shared/0.jpg", "shared")
    (tmp_path / "inner/linked").symlink_to(tmp_path / "shared")  # the user's own collection
    assert Source(tmp_path / "inner").picture("here", "0.jpg", "none", "linked") == tmp_path / "inner/linked/0.jpg"
    for name in (
        "../secret.jpg",
        str(tmp_path / "secret.jpg"),
        "a/../../secret.jpg",
        "",
        "a\0b",
        7,
        None,
        "x" * 5000,
        "x/" * 5000,
    ):
        with pytest.raises(DataError, match=r"^here: "):
            Source(tmp_path / "inner").picture("here", name, "images", "../coco")
    source = Source(tmp_path / "inner")
    path = source.picture("here", "..\\secret.jpg", "images", "../coco")
    assert path == tmp_path / "inner/images/..\\secret.jpg" and str(source.absent[path]).startswith("here: no picture")
    put(tmp_path / "coco/shard.tar", "x" * 90)
    (tmp_path / "inner/cut").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="outside its folder"):
        keep_picture(tmp_path / "inner", tmp_path / "inner/cut/a.png", Image.new("RGB", (2, 2)))
    assert not (tmp_path / "a.png").exists(), "nothing is written through a link"
    part = Source(tmp_path / "inner").picture("here", "shard.tar#10+20", "images", "../coco")
    assert part == tmp_path / "coco/shard.tar#10+20", "a part of a container is a picture too"


def test_files_that_are_no_files_of_rows(tmp_path):
    winoground(tmp_path)
    path = tmp_path / "data/examples.jsonl"
    good = path.read_text().splitlines()
    path.write_text(
        "\n".join([good[0], "{broken", "[1]", good[0], json.dumps({"id": 5}), good[1].replace("an owl eats", "  ").replace(" a mouse", "")])
    )
    problems = [str(problem) for problem in load(BENCHMARKS["winoground"], tmp_path).problems]
    assert len(problems) == 5 and all(str(tmp_path) in problem for problem in problems)
    assert (
        "examples.jsonl:2" in problems[0]
        and "list, not an object" in problems[1]
        and "occurs twice" in problems[2]
        and "'image_0' is missing" in problems[3]
    )
    path.write_text("\n".join([good[0], '{"id": ' + "9" * 200_000 + "}"]))
    assert "examples.jsonl:2: broken JSON" in str(load(BENCHMARKS["winoground"], tmp_path).problems[0])
    path.write_bytes(b"\xff\xfe")
    assert "broken JSON" in str(load(BENCHMARKS["winoground"], tmp_path).problems[0])
    assert "no such folder" in str(load(BENCHMARKS["winoground"], tmp_path / "none").problems[0])
    path.unlink()
    assert "examples.jsonl: no such file" in str(load(BENCHMARKS["winoground"], tmp_path).problems[0])
    mmvp(tmp_path)
    (tmp_path / "Questions.csv").write_text(
        "Index,Question,Options,Correct Answer\n1,Which?,(a) x (b) y,(c)\n2,Which?\n0,Which?,(a) x (b) y,(a)\n"
    )
    problems = [str(problem) for problem in load(BENCHMARKS["mmvp"], tmp_path).problems]
    (tmp_path / "Questions.csv").write_bytes("Index,Question,Options,Correct Answer\n1,Où?,(a) x (b) y,(a)\n".encode("latin-1"))
    assert "Questions.csv:1: byte 0xf9" in str(load(BENCHMARKS["mmvp"], tmp_path).problems[0])
    assert "one of them" in problems[0] and "2 fields, but the first line names 4 columns" in problems[1] and "number from 1" in problems[2]


def test_a_label_of_another_kind_is_refused(tmp_path):
    pope(tmp_path)
    path = tmp_path / "output/coco/coco_pope_random.json"
    path.write_text(path.read_text().replace('"yes"', '"maybe"', 1).replace('"no"', "true", 1))
    problems = [str(problem) for problem in load(BENCHMARKS["pope"], tmp_path).problems]
    assert "'label' must be Yes or No, not 'maybe'" in problems[0] and "not True" in problems[1] and len(problems) == 2


def test_amber_needs_both_files_of_one_revision(tmp_path):
    amber(tmp_path)
    put(tmp_path / "data/annotations.json", [{"id": 1, "type": "generative", "truth": []}])
    assert "both files from the same revision" in str(load(BENCHMARKS["amber"], tmp_path).problems[0])
    amber(tmp_path)
    truth = json.loads((tmp_path / "data/annotations.json").read_text())
    put(tmp_path / "data/annotations.json", [None, *truth[:-1], {"id": 1008}])
    loaded = load(BENCHMARKS["amber"], tmp_path)
    assert [item.id for item in loaded.items] == ["1005", "1006", "1007"] and len(loaded.problems) == 1, "the others have their truth"
    assert "annotations.json: item 1: the row is a NoneType" in str(loaded.problems[0])


# One's own --------------------------------------------------------------------------------------------------------------------------------


def own_item(row: Row) -> Item:
    return Item(str(row["n"]), ((row.picture(row["photo"], "photos"),),), (row["good"], row["bad"]), ((1, 0),), cluster=row["photo"])


def test_a_benchmark_of_ones_own_is_one_entry(tmp_path, monkeypatch):
    mine = Benchmark(
        "Mine", (File("mine.tsv", ("n", "photo", "good", "bad"), 3),), own_item, metrics.accuracy, "accuracy", ("match", "caption")
    )
    monkeypatch.setitem(BENCHMARKS, "mine", mine)
    put(tmp_path / "mine.tsv", "n\tphoto\tgood\tbad\n1\ta.jpg\ta cat\ta dog\n2\ta.jpg\ta hat\ta bat\n")
    pictures(tmp_path, "photos/a.jpg")
    loaded = load(BENCHMARKS["mine"], tmp_path)
    assert [item.texts for item in loaded.items] == [
        ("a cat", "a dog"),
        ("a hat", "a bat"),
    ] and "has 2 rows, but the official file has 3" in loaded.notes[0]
    outcomes = [Outcome(item, ((2.0, 1.0),), (0.0, 0.0), consistency=0.5) for item in loaded.items]
    found = results(mine, [*outcomes[:1], replace(outcomes[1], seen=((1.0, 2.0),), shuffled=(1.0, 1.0))])
    assert found == {
        "seen": {"accuracy": 50, "consistency": 50}, "blank": {"accuracy": 50}, "shuffled": {"accuracy": 50}, "chance": {"accuracy": 50},
    }  # fmt: skip
    assert len(judged(outcomes)["blank"]) == 2 and "shuffled" not in judged(outcomes)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"texts": ()}, "at least one"),
        ({"texts": ("a", " ")}, "empty"),
        ({"match": ((1,),)}, "images x 2 texts"),
    ],
)
def test_items_that_cannot_be(change, sentence):
    whole = {"id": "i", "images": ((Path("a"),),), "texts": ("a", "b"), "match": ((1, 0),)}
    with pytest.raises(InputError, match=sentence):
        Item(**(whole | change))
