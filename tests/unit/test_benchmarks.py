"""Benchmarks on small files in their official formats, with metrics worked by hand."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPO, read_json
from PIL import Image

from cfvlm_ds.core.errors import ConfigError, DataError, InputError
from cfvlm_ds.evaluation.asking import plan
from cfvlm_ds.evaluation.asking import written as read_text
from cfvlm_ds.evaluation.benchmarks import (
    BENCHMARKS,
    Item,
    Judged,
    Outcome,
    Source,
    aro_order,
    load,
    random_scores,
    results,
)
from cfvlm_ds.evaluation.benchmarks.base import Values, judged
from cfvlm_ds.evaluation.benchmarks.metrics import auc, quads, text_right
from cfvlm_ds.evaluation.benchmarks.parsers import PARSERS, answer
from cfvlm_ds.evaluation.benchmarks.source import keep_picture
from cfvlm_ds.evaluation.probes import PROBES, Generate, Write
from cfvlm_ds.evaluation.scoring import GroupScores
from cfvlm_ds.tracking.mlflow_delivery import mlflow_names

# Official formats --------------------------------------------------------------------------------------------------------------------
# Every row is made up here; only its form is that of the published file.


def put(path: Path, content: Any = "") -> None:
    """Write a text, JSON, or JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def pictures(root: Path, *names: str) -> None:
    for name in names:
        put(root / name, "picture")


def like(row: dict[str, Any], *changes: dict[str, Any]) -> list[dict[str, Any]]:
    """A row, and others that differ in some columns."""
    return [row | change for change in ({}, *changes)]


def aro_row(k: int) -> dict[str, Any]:
    box = dict(zip(("bbox_x", "bbox_y", "bbox_w", "bbox_h"), (1 + k, 2, 3, 4), strict=True))
    captions = {"true_caption": f"the ox {k} eats grass", "false_caption": f"the grass eats ox {k}"}
    return {"image_id": k, "image_path": "1.jpg", **box, **captions}


def quad(k: int, *names: str) -> dict[str, Any]:
    """A row with one question or caption for each of two pictures, under the four given names."""
    return dict(zip(names, (f"{k}_a.png", f"{k}_b.png", f"{k} red hats", f"{k} blue hats"), strict=True))


def hallusion_row(category: str, visual: str, number: str, figure: str, question: str, gold: Any) -> dict[str, Any]:
    row = {"category": category, "subcategory": "chart", "visual_input": visual, "set_id": number, "figure_id": figure, "sample_note": ""}
    row |= {"question_id": question, "question": f"Is {question} larger?", "gt_answer_details": "", "gt_answer": gold}
    return row | {"filename": None if visual == "0" else f"./{category}/chart/{number}_{figure}.png"}


def natural_row(k: int, kind: str, first: str, second: str) -> dict[str, Any]:
    answers = {f"Image_{i}_Question_{q}": first if i == q else second for q in (0, 1) for i in (0, 1)}
    shown = {f"Image_{i}": f"{k}_{i}.jpg" for i in (0, 1)}
    return {
        "Index": k,
        **shown,
        "Question_0": "Is it red?",
        "Question_1": "Is it blue?",
        **answers,
        "Question_Type": kind,
        "Source": "made",
    }


def whatsup_rows(part: str, relations: str) -> list[dict[str, Any]]:
    found = []
    for own in relations.split():
        options = [f"a cup {each} a box" for each in (own, *(other for other in relations.split() if other != own))]
        found.append({"image_path": f"data/controlled_{part}/cup_{own}_box.jpeg", "caption_options": options})
    return found


SCALE = "existence count position color OCR commonsense_reasoning numerical_calculation text_translation code_reasoning"
NESTED = "posters celebrity scene landmark artwork"
ASKED = "Is it so? Please answer yes or no.\tYes\nIs it not? Please answer yes or no.\tNo\n"
VALSE = (
    "existence plurals counting-hard counting-small-quant counting-adversarial relations action-replacement actant-swap "
    "coreference-standard coreference-hard foil-it"
)
PLACES = {"images": "left_of right_of on under", "clevr": "left_of right_of in-front_of behind"}
PEOPLE = {"id": 1, "name": "person"}, {"id": 18, "name": "dog"}
AMBER = {k: kind for k, kind in enumerate(
    ("discriminative-hallucination", "discriminative-attribute-state", "relation", "discriminative-attribute-number"), 1005
)}  # fmt: skip
CONME = "image,question,answer,base_question,correct_option,incorrect_option\nimages/1.jpg,{0}\n139,{0}\n".format(
    '"What is left, say?\nA: a cup\nB: a box",B,"What is left, say?",a box,a cup'
)
PLUM = {
    "object": "plum", "correct_answer": "['purple', 'red']", "incorrect_answer": "green", "original_image": "o.png",
    "counterfact_image": "c.png",
}  # fmt: skip
CHOICE = {"idx": 0, "question": "How many?", "choices": ["1", "2", "3", "4", "5"], "answer": "(B)", "prompt": "x"}

OFFICIAL: dict[str, tuple[dict[str, Any], str]] = {
    "sugarcrepe": (
        {
            f"data/{subset}.json": {
                str(k): {"filename": f"00000{k}.jpg", "caption": f"a cup {k}", "negative_caption": f"a {subset} cup {k}"} for k in range(2)
            }
            for subset in ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
        },
        "val2017/000000.jpg val2017/000001.jpg",
    ),
    "winoground": (
        {
            "data/examples.jsonl": [
                {"id": k, "image_0": f"ex_{k}_img_0", "image_1": f"ex_{k}_img_1", "caption_0": "an owl eats a mouse", "tag": "x"}
                | {"caption_1": "a mouse eats an owl", "secondary_tag": "", "num_main_preds": 1, "collapsed_tag": "Object"}
                for k in range(2)
            ]
        },
        "images/ex_0_img_0.png images/ex_0_img_1.png images/ex_1_img_0.png images/ex_1_img_1.png",
    ),
    "eqben": (
        {"all_select.json": [quad(k, "image0", "image1", "caption0", "caption1") | {f"image{i}": f"{name}/{k}_{i}.png" for i in (0, 1)}
                             for k, name in enumerate(("eqbensd", "eqbenag"))]},
        "images/eqbensd/0_0.png images/eqbensd/0_1.png images/eqbenag/1_0.png images/eqbenag/1_1.png",
    ),
    "bivlc": (
        {"test.jsonl": [quad(k, "image", "negative_image", "caption", "negative_caption") | {"type": kind, "subtype": "Object"}
                        for k, kind in enumerate(("Replace", "Swap"))]},
        "0_a.png 0_b.png 1_a.png 1_b.png",
    ),
    "vismin": (
        {"test.jsonl": [quad(k, "image_0", "image_1", "text_0", "text_1") | {"category": kind}
                        for k, kind in enumerate(("counting", "object"))]},
        "0_a.png 0_b.png 1_a.png 1_b.png",
    ),
    "cola": (
        {"data/COLA_multiobjects_matching_benchmark.json": [
            ["https://cs.example.edu/VG_100K_2/1.jpg", "red box, blue ball", "https://cs.example.edu/VG_100K_2/2.jpg", "blue box, red ball"]
        ]},
        "images/1.jpg images/2.jpg",
    ),
    "aro_relation": (
        {"visual_genome_relation.json": [aro_row(k) | {"relation_name": n} for k, n in enumerate(("eating", "eating", "near", "on"))]}, ""
    ),
    "aro_attribution": (
        {"visual_genome_attribution.json": [aro_row(k) | {"attributes": ["wet" if k == 25 else "red", "old"]} for k in range(26)]}, ""
    ),
    "aro_coco_order": (
        {"coco_karpathy_test.json": [{"image": "val2014/1.jpg", "caption": ["A red dog, on the old mat.", "A cat sat!", "Cat"]}]},
        "val2014/1.jpg",
    ),
    "aro_flickr_order": (
        {"flickr30k_test.json": [{"image": "flickr30k-images/1.jpg", "caption": ["Two men in a boat"]}]}, "flickr30k-images/1.jpg"
    ),
    "valse": (
        {
            f"data/{part}.json": {
                f"{part}_{k}": {"dataset": "SWiG", "image_file": "a_1.jpg", "caption": "a man sings", "foil": f"a man {part}"}
                | {"classes": "", "classes_foil": "", "mturk": {"caption": 3 - 2 * k, "foil": 2 * k, "other": 0}}
                for k in range(2)
            }
            for part in VALSE.split()
        },
        "images/SWiG/a_1.jpg",
    ),
    "sugarcrepe_pp": (
        {
            f"data/{subset}.json": [
                {"id": 7, "filename": "1.jpg", "caption": "a cup", "caption2": "there is a cup", "negative_caption": f"a {subset} cup"}
            ]
            for subset in ("replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
        },
        "val2017/1.jpg",
    ),
    "whatsup": (
        {f"controlled_{part}_dataset.json": whatsup_rows(part, words) for part, words in PLACES.items()}
        | {
            f"{name}_{number}_obj.json": [[picture, "a dog left of a cat", "a dog right of a cat"]]
            for name, picture in (("coco_qa", 139), ("vg_qa", 77))
            for number in ("one", "two")
        },
        "val2017/000000000139.jpg vg_images/77.jpg "
        + " ".join(row["image_path"].removeprefix("data/") for part, words in PLACES.items() for row in whatsup_rows(part, words)),
    ),
    "conme": (
        {f"replace-{part}.csv": CONME for part in ("att", "obj", "rel")},
        "images/1.jpg images/000000000139.jpg",
    ),
    "vl_checklist": (
        {
            f"data/{name}.json": [["sub/1.jpg", {"POS": ["a wet dog"], "NEG": ["a dry dog"]}]]
            for name in ("Attribute/vaw/action", "Attribute/vg/color", "Object/Size/hake_size/hake_obj_small", "Relation/swig_action")
        },
        "vg/sub/1.jpg hake/sub/1.jpg swig/sub/1.jpg",
    ),
    "pope": (
        {
            f"output/coco/coco_pope_{split}.json": "".join(
                json.dumps({"question_id": k, "image": f"{k // 2}.jpg", "text": f"Is there a cup {k}?", "label": label}) + "\n"
                for k, label in enumerate(("yes", "no") * 2)
            )
            for split in ("random", "popular", "adversarial")
        },
        "val2014/0.jpg val2014/1.jpg",
    ),
    "naturalbench": (
        {"train.jsonl": [natural_row(0, "yes_no", "Yes", "No"), natural_row(1, "multiple_choice", "A", "B")]},
        "0_0.jpg 0_1.jpg 1_0.jpg 1_1.jpg",
    ),
    "mmvp": (
        {"Questions.csv": "lndex,Question,Options,Correct Answer\n"
         + "".join(f"{k},Which way?,(a) Left (b) Right,({gold})\n" for k, gold in enumerate("abba", 1))},
        "",
    ),
    "hallusionbench": (  # a set of two figures with two questions (VD), and one that is asked without and with its figure (VS)
        {"HallusionBench.json": [hallusion_row("VD", "1", "0", i, q, int(i == q)) for i in "01" for q in "01"]
         + [hallusion_row("VS", "0", "3", "0", "0", "1"), hallusion_row("VS", "2", "3", "1", "0", "0")]},
        "hallusion_bench/VD/chart/0_0.png hallusion_bench/VD/chart/0_1.png hallusion_bench/VS/chart/3_1.png",
    ),
    "mme": (
        {f"{task}/1.txt": ASKED for task in SCALE.split()}
        | {f"{task}/questions_answers_YN/1.txt": ASKED.replace("\n", "\n\n", 1) for task in NESTED.split()},
        " ".join([*(f"{task}/1.jpg" for task in SCALE.split()), *(f"{task}/images/1.png" for task in NESTED.split())]),
    ),
    "amber": (
        {
            "data/annotations.json": [{"id": 1, "type": "generative", "truth": ["sky"], "hallu": ["sea"]}]
            + [{"id": k, "type": kind, "truth": ("no", "yes")[k % 2]} for k, kind in AMBER.items()],
            "data/query/query_discriminative.json": [{"id": k, "image": "AMBER_1.jpg", "query": f"Is it {k}?"} for k in AMBER],
        },
        "image/AMBER_1.jpg",
    ),
    "amber_generative": (
        {
            "data/annotations.json": [
                {"id": k, "type": "generative", "truth": ["sky", "man"], "hallu": ["sea"] * (k == 1)} for k in (1, 2)
            ] + [{"id": 3, "type": "relation", "truth": "yes"}],
            "data/query/query_generative.json": [{"id": k, "image": f"AMBER_{k}.jpg", "query": "Describe this image."} for k in (1, 2)],
            "data/relation.json": {"sky": [], "man": ["person", "individual"], "sea": ["water"], "hat": []},
            "data/safe_words.txt": "line\nindividual",
        },
        "image/AMBER_1.jpg image/AMBER_2.jpg",
    ),
    "chair": (
        {
            "annotations/instances_val2014.json": {
                "info": {}, "images": [{"id": k, "file_name": f"{k}.jpg"} for k in (1, 2)], "categories": [*PEOPLE],
                "annotations": [{"image_id": 1, "category_id": 18, "bbox": [0, 0, 1, 1]}, {"image_id": 2, "category_id": 1}],
            },
            "annotations/captions_val2014.json": {
                "images": [], "annotations": [{"image_id": 1, "id": 1, "caption": "A woman's chair."}, {"image_id": 2, "caption": "Hats."}],
            },
            "synonyms.txt": "person, man, woman\ndog, puppy\nchair, seat\n",
        },
        "val2014/1.jpg val2014/2.jpg",
    ),
    "vsr": (
        {
            "data/splits/zeroshot/test.jsonl": like(
                {"image": "1.jpg", "image_link": "", "caption": "The cat is under the bed.", "label": 1, "relation": "under"},
                {"label": 0, "relation": "on"}, {"caption": "The cat is on it.", "label": 0},
            )
        },
        "images/1.jpg",
    ),
    "cvbench": (
        {
            "test_2d.jsonl": [
                CHOICE | {"type": "2D", "task": "Count", "filename": f"img/2D/{k}.png", "source": name}
                for k, name in enumerate(("ADE20K", "COCO"))
            ],
            "test_3d.jsonl": [
                CHOICE | {"type": "3D", "task": "Depth", "filename": "img/3D/0.png", "source": "Omni3D"}
                | {"choices": ["chair", "desk"], "answer": "(A)"}
            ],
        },
        "img/2D/0.png img/2D/1.png img/3D/0.png",
    ),
    "mmstar": (
        {
            "mmstar.jsonl": like(
                {"index": 0, "question": "Which?\nOptions: A: one, B: two, C: three, D: four", "image": "0.jpg", "answer": "C"}
                | {"category": "math"},
                {"index": 1, "question": "Which? A: one, B: two", "answer": "b", "category": "coarse perception"},
            )
        },
        "0.jpg",
    ),
    "visual_counterfact": (
        {"color.jsonl": [PLUM], "size.jsonl": [PLUM | {"correct_answer": "horse", "incorrect_answer": "cat"}]},
        "o.png c.png",
    ),
    "blink": (
        {
            f"{(task := file.name.split('/')[0])}/val.jsonl": [
                CHOICE
                | {"idx": f"val_{task}_1", "sub_task": task, "prompt": "Which? (A) one (B) two", "choices": ["one", "two"]}
                | {"image_1": "1.png", "image_2": "2.png", "image_3": None, "image_4": None, "explanation": ""}
            ]
            for file in BENCHMARKS["blink"].files
        },
        " ".join(f"{file.name.split('/')[0]}/{k}.png" for file in BENCHMARKS["blink"].files for k in (1, 2)),
    ),
}  # fmt: skip
NAMES = sorted(BENCHMARKS)


def write(name: str, root: Path) -> Path:
    """The official files of a benchmark, and its pictures."""
    files, names = OFFICIAL[name]
    for file, content in files.items():
        put(root / file, content)
    pictures(root, *names.split(), *(f"MMVP Images/{k}.jpg" for k in (1, 2, 3, 4) if name == "mmvp"))
    if name in ("aro_relation", "aro_attribution"):
        (root / "images").mkdir()
        image = Image.new("RGB", (40, 10))
        image.putpixel((1, 2), (255, 255, 255))
        image.save(root / "images" / "1.jpg", quality=100, subsampling=0)
    return root


@pytest.fixture
def root(request, tmp_path):
    name = request.getfixturevalue("name")
    return write(name, tmp_path / name)


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
    if name in ("hallucinated", "chair_i", "chair_s", "chair", "hal", "cog"):
        return 0.0
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
    assert {key: found["seen"][key] for key in shared} == pytest.approx({key: found["blank"][key] for key in shared}, rel=0, nan_ok=True)
    assert "random" not in found if benchmark.mentions else benchmark.headline in found["random"]

    tied = benchmark.metrics(answered(items, lambda item, i, c: 0.0))
    assert not tied[benchmark.headline] > 0, "a tie is wrong"
    broken = benchmark.metrics(answered(items, lambda item, i, c: math.nan))
    assert not broken[benchmark.headline] > 0, "a score that is no number is wrong"


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
def test_own_files_are_not_taken_for_the_published_ones(name, root):
    benchmark = BENCHMARKS[name]
    loaded = load(benchmark, root)
    stated = [file for file in benchmark.files if file.rows is not None]
    notes = "\n".join(loaded.notes)
    assert loaded.own_files == bool(stated or benchmark.total) == (f"own files in the form of {benchmark.title}: " in notes)
    assert all(str(file.rows) in notes for file in stated) and loaded.items
    assert all(Path(path).exists() for path in re.findall(r"(\S+) has ", notes)), notes
    assert name in (REPO / "docs" / "benchmarks" / "index.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_every_probe_that_fits_makes_groups(name, root):
    benchmark, items = BENCHMARKS[name], read(name, root)
    assert {*benchmark.probes} <= {*PROBES} and benchmark.probes[0] != "generate"
    for probe in benchmark.probes:
        if probe == "write":
            assert all(Write().asked(item) and read_text(item, ["A man."], "", benchmark.mentions).said == ("A man.",) for item in items)
        elif probe == "generate":
            for item in items:
                said = ["no such answer (Z)"] * len(item.images)
                assert Generate().asked(item) and read_text(item, said, said[0], PARSERS.get(name, answer)).said == tuple(said)
        else:
            assert plan(items, PROBES[probe]).groups


# Formats, one by one ----------------------------------------------------------------------------------------------------------------------


def written(name: str, tmp_path: Path) -> dict[str, Item]:
    return {item.id: item for item in read(name, write(name, tmp_path / name))}


OWL = ("ex_1_img_0.png", "ex_1_img_1.png")
ITEMS: dict[tuple[str, str], dict[str, Any]] = {
    ("sugarcrepe", "swap_obj/1"): {"texts": ("a cup 1", "a swap_obj cup 1"), "match": ((1, 0),), "pictures": ("000001.jpg",)},
    ("winoground", "1"): {"pictures": OWL, "match": ((1, 0), (0, 1))},
    ("pope", "popular/3"): {"prompt": "Is there a cup 3?\nAnswer the question using a single word or phrase.", "match": ((0, 1),)},
    ("naturalbench", "0/1"): {"match": ((0, 1), (1, 0)), "prompt": "Is it blue? Please answer Yes or No."},
    ("naturalbench", "1/0"): {"texts": ("A", "B"), "listed": True, "match": ((1, 0), (0, 1))},
    ("mmvp", "3"): {"texts": ("Left", "Right"), "match": ((0, 1),), "tags": {"pair": "2"}},
    ("hallusionbench", "VS_chart_3_0_0"): {"images": ((),), "match": ((1, 0),)},
    ("hallusionbench", "VS_chart_3_1_0"): {"match": ((0, 1),)},
    ("whatsup", "coco_one/1"): {"pictures": ("000000000139.jpg",)},
    ("mmstar", "1"): {"texts": ("A", "B"), "match": ((0, 1),)},
    ("blink", "val_Jigsaw_1"): {"pictures": ("1.png", "2.png"), "prompt": "Which? (A) one (B) two"},
    ("visual_counterfact", "color/1"): {
        "texts": ("purple", "red", "green"), "match": ((1, 1, 0), (0, 0, 1)), "prompt": "Answer with one word. What color is this plum?",
    },
    ("visual_counterfact", "size/1"): {
        "texts": ("horse", "cat"), "prompt": "Answer with the correct option. Which is larger here, cat or horse?",
    },
    ("cvbench", "3d/1"): {"texts": ("chair", "desk"), "match": ((1, 0),)},
    ("conme", "replace-rel/7"): {"pictures": ("000000000139.jpg",), "prompt": "What is left, say?", "texts": ("a box", "a cup")},
    ("cola", "1"): {"pictures": ("1.jpg", "2.jpg")},
    ("chair", "val2014/1"): {"texts": ("person: person, man, woman", "dog: dog, puppy", "chair: chair, seat"), "match": ((1, 1, 1),)},
    ("amber_generative", "1"): {
        "texts": ("sky: sky", "man: man, person", "sea: sea, water", "safe words: individual", "other words: hat"),
        "match": ((1, 1, 0, 1, 0),), "prompt": "Describe this image.",
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "item"), ITEMS)
def test_rows_become_items(name, item, tmp_path):
    found = written(name, tmp_path)[item]
    shown = tuple(path.name for image in found.images for path in image)
    for field, expected in ITEMS[name, item].items():
        value = shown if field == "pictures" else getattr(found, field)
        assert value == expected or (field == "tags" and expected.items() <= value.items()), field


def test_rejected_rows_do_not_count_and_parts_have_their_folders(tmp_path):
    assert len(written("valse", tmp_path)) == 11
    assert {item.tags["type"] for item in written("amber", tmp_path).values()} == {"existence", "attribute", "relation"}
    items = written("vl_checklist", tmp_path)
    assert items["Attribute/vaw/action/1"].images[0][0] == tmp_path / "vl_checklist/vg/sub/1.jpg"
    (tmp_path / "vl_checklist/data/Attribute/vaw").rename(tmp_path / "vaw")
    (tmp_path / "vl_checklist/data/Attribute/vaw").symlink_to(tmp_path / "vaw")
    assert read("vl_checklist", tmp_path / "vl_checklist") == tuple(items.values()), "through a linked folder"


def test_pictures_of_coco_may_lie_beside_the_benchmarks(tmp_path):
    write("sugarcrepe", tmp_path / "sugarcrepe")
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


def test_frames_of_videos_are_arrays_of_blue_green_and_red(tmp_path):
    """As EqBen's own loader reads them; written once. A file that declares more than it holds costs no memory."""
    write("eqben", tmp_path)
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
    for content in (b"\x93NUMPY", b"PK\x03\x04", None, frame[0], frame * 1.0):
        item.images[0][0].unlink(missing_ok=True)
        with open(tmp_path / "images/eqbenyoucook2/v/a.npy", "wb") as file:
            if content is None:
                np.lib.format.write_array_header_1_0(file, header)
            elif isinstance(content, bytes):
                file.write(content)
            else:
                np.save(file, content)
        (problem,) = load(BENCHMARKS["eqben"], tmp_path).problems
        assert "all_select.json" in str(problem) and "a.npy" in str(problem) and "\n" not in str(problem)


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


def test_ties_are_guesses_in_a_blind_table():
    blind = with_scores([QUAD], [[[0, 0], [0, 0]]], blind=True)
    assert quads(blind) == {"text": 25, "pair": 50}, "and a blind table says nothing of images"
    three = Item("t", ((Path("a"),),), ("x", "y", "z"), ((1, 1, 0),))
    for scores, seen, guess in (([2, 2, 1], 1, 1), ([1, 2, 1], 0, 1 / 2), ([1, 1, 1], 0, 1 / 3), ([1, 2, 2], 0, 0), ([1, 3, 2], 0, 0)):
        assert [text_right(with_scores([three], [scores], blind)[0]) for blind in (False, True)] == [seen, pytest.approx(guess)]
    four = Item("f", ((Path("a"),),), ("w", "x", "y", "z"), ((1, 0, 0, 0),))
    assert text_right(with_scores([four], [[1, 1, 1, 0]], True)[0]) == pytest.approx(1 / 3)


def test_random_scores_are_known_by_hand(tmp_path):
    expected = {
        "mmvp": {"pair": 25},
        "winoground": {"text": 25, "image": 25, "group": 100 / 6, "group/Object": 100 / 6},
        "naturalbench": {"accuracy": 50, "q_acc": 25, "i_acc": 25, "g_acc": 6.25}, "mme": {"perception": 750, "cognition": 300},
        "sugarcrepe_pp": {"macro": 100 / 3}, "cvbench": {"cv_bench": (20 + 50) / 2}, "pope": {"accuracy": 50, "f1_macro": 50, "auc": 50},
        "whatsup": {"pair/images": 6.25, "set/images": 100 / 256, "individual/images": 25},
        "hallusionbench": {"aAcc": 50, "qAcc": 25, "fAcc": (25 + 25 + 50) / 3},
    }  # fmt: skip
    for name, values in expected.items():
        found = random_scores(BENCHMARKS[name], list(written(name, tmp_path).values()))
        assert {key: found[key] for key in values} == pytest.approx(values), name


@pytest.mark.parametrize("name", BENCHMARKS)
def test_mlflow_shows_the_headlines_of_a_benchmark_first(name, tmp_path):
    headlines = {f"eval/{name}/{metric}" for metric in BENCHMARKS[name].headlines}
    metrics = {f"eval/{name}/{metric}" for metric in random_scores(BENCHMARKS[name], list(written(name, tmp_path).values()))} | headlines
    main = {metric for metric, shown in mlflow_names(metrics).items() if shown.startswith("Main/")}
    assert headlines <= main <= headlines | {f"eval/{name}/yes_ratio"}


def test_auc_against_counting():
    draw = random.Random(1)
    for _ in range(50):
        pairs = [(float(draw.randrange(6)), draw.random() < 0.5) for _ in range(draw.randrange(2, 12))]
        yes, no = [m for m, true in pairs if true], [m for m, true in pairs if not true]
        naive = [1.0 if a > b else 0.5 if a == b else 0.0 for a in yes for b in no]
        columns = np.array(pairs, float).T
        assert auc(*columns) == (pytest.approx(100 * sum(naive) / len(naive)) if naive else None)
    assert auc(np.array([math.nan, 0.0]), np.array([1, 0])) is None


def part(name: str, **wanted: bool | None) -> Callable[[Item], bool | None]:
    """Whether an item is answered rightly, by the value of a tag; others are."""
    return lambda item: wanted.get(item.tags[name].replace("-", "_").replace(" ", "_"), True)


BY_HAND: list[tuple[str, Callable[[Item], Any], dict[str, float]]] = [
    # of two items each: add_att one right, swap_obj a tie in both, the others all right
    ("sugarcrepe", lambda item: None if "swap_obj" in item.id else item.id != "add_att/1",
     {"macro/add_att": 50, "macro/swap_obj": 0, "macro/add": 75, "macro/swap": 50, "macro": 550 / 7, "accuracy": 1100 / 14}),
    # group 0: question 0 right on both pictures, question 1 on picture 1 alone; group 1: a tie everywhere
    ("naturalbench", lambda item: {"0/0": True, "0/1": [False, True]}.get(item.id),
     {"accuracy": 37.5, "q_acc": 25, "i_acc": 25, "g_acc": 0}),
    ("mmvp", lambda item: item.id != "4", {"pair": 50, "accuracy": 75}),
    ("mme", lambda item: not item.id.endswith("2") or item.tags["task"] == "OCR",
     {"score/OCR": 200, "score/count": 50, "perception": 9 * 50 + 200, "cognition": 200, "total": 850}),
    # eating one of two, on a tie; near is symmetric and out; of attributes 25 cases count, one does not
    ("aro_relation", lambda item: {"2": False, "4": None}.get(item.id, True),
     {"macro": 25, "macro/eating": 50, "macro/on": 0, "accuracy": 50}),
    ("aro_attribution", lambda item: int(item.id) <= 5, {"macro": 20, "macro/red_old": 20, "accuracy": 500 / 26}),
    ("aro_coco_order", lambda item: item.id == "1/0", {"accuracy": 50}),  # one of a single word has no other order
    ("cvbench", lambda item: item.id != "2d/1", {"cv_bench": ((0 + 100) / 2 + 100) / 2, "accuracy": 200 / 3}),
    ("vismin", part("category", counting=False), {"group/object": 100, "group/counting": 0, "group_macro": 50}),
    ("conme", lambda item: item.id.endswith("/4") if item.tags["part"] == "replace-att" else item.tags["part"] == "replace-obj" or None,
     {"macro/replace-att": 50, "macro/replace-obj": 100, "macro/replace-rel": 0, "macro": 50}),
    ("vl_checklist", lambda item: item.id != "Attribute/vaw/action/1", {"macro/Attribute": 50, "macro/Object": 100, "macro": 250 / 3}),
    ("valse", part("part", existence=None, plurals=False), {"macro": 900 / 11, "macro/plurals": 0}),
    ("mmstar", part("category", coarse_perception=None), {"macro/math": 100, "macro/coarse perception": 0, "macro": 50}),
    ("blink", lambda item: item.tags["task"] in ("Counting", "Jigsaw"), {"macro": 200 / 14, "macro/Jigsaw": 100}),
    # of the second item the second picture is wrong, and its texts tell no picture apart
    *((name, lambda item, first=first: item.id == first or [True, False], {"text": 50, "image": 50, "group": 50, "pair": 75, **parts})
      for name, first, parts in (
          ("bivlc", "1", {"text/replace_object": 100, "pair/swap_object": 50}), ("winoground", "0", {"text/Object": 50, "pair/Object": 75}),
      )),
    # left, right and on are right: one pair of two, no scene
    ("whatsup", lambda item: "under" not in item.id,
     {"individual/images": 75, "pair/images": 50, "set/images": 0, "individual/clevr": 100, "pair/clevr": 100, "set/clevr": 100,
      "individual/vg_two": 100, "individual": 575 / 6}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "right", "expected"), BY_HAND)
def test_metrics_by_hand(name, right, expected, tmp_path):
    found = on(name, tmp_path, right)
    assert {key: found[key] for key in expected} == pytest.approx(expected)


SCORES: list[tuple[str, list[Any], dict[str, float]]] = [
    # of each split yes, no, yes, no; the model says yes, yes, nothing, yes; margins of yes 1 and 0, of no 1 and 4: one tie
    ("pope", [[2, 1], [2, 1], [1, 1], [5, 1]] * 3,
     {"accuracy": 25, "yes_ratio": 75, "precision": 100 / 3, "recall": 50, "f1": 40, "f1_macro": 40, "auc": 12.5}),
    # yes, no, yes, no; the model says no to all but the third, where it says nothing; F1 is that of no, and nothing is absent of existence
    ("amber", [[0, 1], [0, 1], [1, 1], [0, 1]],
     {"accuracy": 50, "precision": 200 / 3, "recall": 100, "yes_ratio": 0, "f1": 80, "f1/attribute": 100, "accuracy/existence": 0}),
    # yes, no, no; the model says yes, nothing, yes; half of two about under, none of one about on
    ("vsr", [[2, 1], [1, 1], [3, 1]],
     {"accuracy": 100 / 3, "yes_ratio": 200 / 3, "precision": 50, "recall": 100, "f1": 200 / 3, "auc": 50, "macro": 25}),
    # both true captions must win; a tie loses
    ("sugarcrepe_pp", [[2, 1, 0], [2, 0, 1], [1, 0, 0], [1, 1, 0], [0, 0, -1]],
     {"macro": 60, "macro/replace_obj": 0, "macro/replace_rel": 0}),
    # who answers from memory is right on the usual picture alone
    ("visual_counterfact", [[[2, 1.5, 1], [2, 1.5, 1]], [[2, 1], [2, 1]]], {"text": 0, "pair": 50, "image": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "scores", "expected"), SCORES)
def test_metrics_of_scores_by_hand(name, scores, expected, tmp_path):
    found = BENCHMARKS[name].metrics(with_scores(list(written(name, tmp_path).values()), scores))
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert "f1/existence" not in found


def test_a_sum_of_fewer_tasks_is_another_number(tmp_path):
    items = [item for item in written("mme", tmp_path).values() if item.tags["task"] != "count"]
    found = BENCHMARKS["mme"].metrics(answered(items, lambda item, i, c: item.match[i][c]))
    assert found["cognition"] == 800 and not found.keys() & {"total", "perception"}


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


def test_a_pair_and_a_scene_without_their_fourth_picture(tmp_path):
    path = write("whatsup", tmp_path) / "controlled_images_dataset.json"
    put(path, read_json(path)[:3])
    found = BENCHMARKS["whatsup"].metrics(answered(read("whatsup", tmp_path), lambda item, i, c: item.match[i][c]))
    assert (found["pair/images"], found["set/images"]) == (pytest.approx(100 / 1.5), 0)


# Hostile and odd files --------------------------------------------------------------------------------------------------------------------


def test_equal_texts_are_read_counted_and_lose_where_they_tie(tmp_path):
    """As in four rows of SugarCrepe++, whose two true captions are equal, and 124 of VL-CheckList, whose true caption is the false one."""
    write("sugarcrepe_pp", tmp_path / "pp")
    row = {"id": 8, "filename": "1.jpg", "caption": "A cup", "caption2": "A cup ", "negative_caption": "a hat"}
    put(tmp_path / "pp/data/swap_obj.json", [row])
    write("vl_checklist", tmp_path / "vl")
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
    for name in ("../secret.jpg", str(tmp_path / "secret.jpg"), "a/../../secret.jpg", "", "a\0b", 7, "x" * 5000):
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


WINO, TRUTH = OFFICIAL["winoground"][0]["data/examples.jsonl"], OFFICIAL["amber"][0]["data/annotations.json"]
OWN = "Index,Question,Options,Correct Answer\n"
DAMAGED: list[tuple[str, str, Any, list[str], int]] = [
    ("winoground", "data/examples.jsonl", [WINO[0], [1], WINO[0], {"id": 5}, WINO[1] | {"caption_0": " "}],
     ["examples.jsonl:2: ", "item '0'", "'image_0'", "caption_0"], 1),
    ("winoground", "data/examples.jsonl", b'{"id": ' + b"9" * 200_000 + b"}", ["examples.jsonl:1: "], 0),
    ("mmvp", "Questions.csv", OWN + "1,Which?,(a) x (b) y,(c)\n2,Which?\n0,Which?,(a) x (b) y,(a)\n", ["csv:2: ", "csv:3: ", "csv:4: "], 0),
    ("mmvp", "Questions.csv", (OWN + "1,Où?,(a) x (b) y,(a)\n").encode("latin-1"), ["csv:1: byte 0xf9"], 0),
    ("pope", "output/coco/coco_pope_random.json",
     [{"question_id": k, "image": "0.jpg", "text": "Is it?", "label": label} for k, label in enumerate((True, "maybe", "no"))],
     ["'label'", "'label'"], 9),
    ("amber", "data/annotations.json", [{"id": 1, "type": "generative", "truth": []}], ["1005", "1006", "1007", "1008"], 0),
    ("aro_relation", "visual_genome_relation.json",
     [aro_row(0) | {"relation_name": "on", **change} for change in ({"bbox_x": 39}, {"bbox_w": "3"}, {"bbox_h": 0})],
     ["item 1: ", "item 2: ", "item 3: "], 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "content", "places", "kept"), DAMAGED)
def test_damaged_rows_are_named_and_the_others_are_read(name, file, content, places, kept, tmp_path):
    root = write(name, tmp_path / name)
    if isinstance(content, bytes):
        (root / file).write_bytes(content)
    else:
        put(root / file, content)
    loaded = load(BENCHMARKS[name], root)
    assert len(loaded.items) == kept
    for place, problem in zip(places, map(str, loaded.problems), strict=True):
        assert place in problem and str(root) in problem and "\n" not in problem


@pytest.mark.parametrize(("change"), [{"texts": ()}, {"texts": ("a", " ")}, {"match": ((1,),)}])
def test_items_that_cannot_be(change):
    whole: dict[str, Any] = {"id": "i", "images": ((Path("a"),),), "texts": ("a", "b"), "match": ((1, 0),)}
    with pytest.raises(InputError, match="'i'"):
        Item(**(whole | change))
