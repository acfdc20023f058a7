"""Descriptions against the authors' algorithms, stated again without their libraries: CHAIR's words, and AMBER's sets of nouns."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import read_json
from test_benchmarks import pictures, put

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.evaluation.asking import written
from cfvlm_ds.evaluation.benchmarks import BENCHMARKS, Item, Judged, Outcome, load, results
from cfvlm_ds.evaluation.benchmarks.descriptions import named
from cfvlm_ds.evaluation.probes import Write
from cfvlm_ds.evaluation.suite.comparing import is_right

SYNONYMS = """\
person, girl, man, woman, people, children, baby, adult, policeman, passenger, person, woman, villager
bicycle, bike
motorcycle, scooter,  motor bike, motor cycle, motorbike
airplane, plane, jet
bus, minibus
train, locomotive
traffic light, street light, stoplight
bird, goose
cat, kitten
dog, puppy, husky
bear, panda
elephant
tie, bow, bow tie
skis, ski
sports ball, ball
baseball bat
tennis racket, racket
wine glass
knife, pocketknife, knive
bowl, plate
sandwich, burger
hot dog
chair, seat, stool
dining table, table
toilet, urinal
cell phone, phone
mouse
oven, stove, stove top oven
scissors
teddy bear, teddybear
"""
SINGULARS = {
    "dogs": "dog", "huskies": "husky", "puppies": "puppy", "women": "woman", "men": "man", "policemen": "policeman", "mice": "mouse",
    "geese": "goose", "buses": "bus", "knives": "knife", "glasses": "glass", "sandwiches": "sandwich", "benches": "bench", "ties": "tie",
    "phones": "phone", "bears": "bear", "elephants": "elephant", "animals": "animal", "seats": "seat", "tracks": "track", "balls": "ball",
    "tables": "table", "persons": "person", "trees": "tree", "bushes": "bush", "signs": "sign", "leaves": "leaf", "lights": "light",
    "roses": "rose", "shoes": "shoe", "boys": "boy", "glove": "glove", "gloves": "glove", "cans": "can", "toilets": "toilet",
}  # fmt: skip
"""The plurals that are planted, each with what the authors' libraries return for it."""
PLANTED = (
    "a dog", "two dogs", "the dog's ball", "a puppy", "three huskies", "a hot dog", "hot dogs", "a hot, small dog", "a toilet seat",
    "the seat of the toilet", "seats", "a chair", "a baby elephant", "adult elephants", "a baby", "baby animals", "a passenger train",
    "a passenger jet", "a passenger on a bus", "train tracks", "home plate", "a plate", "wine glasses", "a wine glass", "glasses", "knives",
    "policemen", "a woman", "women", "people", "children", "buses", "scissors", "skis", "a teddy bear", "teddy bears", "bears", "bow ties",
    "a bow, tie", "a motor cycle", "street lights", "a cell phone", "phones", "a tennis racket", "the dining table", "mice", "geese",
    "a sandwich", "sandwiches", "a villager", "a stove top oven", "nothing", "a rose bush", "A Dog", "cat-like", "hot-dog", "a cat. Dog",
)  # fmt: skip


def told(draw: random.Random, planted: Sequence[str], most: int = 7) -> str:
    return " and ".join(["I see", *(draw.choice(planted) for _ in range(draw.randrange(most)))]) + "."


def tokens(text: str) -> list[str]:
    """As NLTK's tokenizer on these texts: punctuation and the possessive stand alone, a hyphen joins."""
    return [SINGULARS.get(token, token) for token in re.sub(r"('s|[.,])", r" \1 ", text).split()]


def chair_words(caption: str, lines: Sequence[Sequence[str]]) -> list[str]:
    """The object of each word of a caption, as utils/chair.py of the authors has it."""
    animals = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
    double = {name: name for line in lines for name in line if len(name.split()) == 2} | {"home plate": "home plate"}
    double |= {f"{age} {animal}": animal for age in ("baby", "adult") for animal in animals}
    double |= {"passenger jet": "jet", "passenger train": "train", "bow tie": "tie", "toilet seat": "toilet", "train track": "train track"}
    node = {name: line[0] for line in lines for name in line}
    words, whole, i = tokens(caption.lower()), [], 0
    while i < len(words):
        pair = " ".join(words[i : i + 2])
        whole.append(double.get(pair, words[i]))
        i += 2 if pair in double else 1
    if "toilet" in whole and "seat" in whole:
        whole = [word for word in whole if word != "seat"]
    return [node[word] for word in whole if word in node]


def coco(root: Path, number: int) -> tuple[dict[str, set[str]], list[list[str]]]:
    """Files of instances and captions in COCO's form; the objects of each picture, and the lines of synonyms."""
    draw, lines = random.Random(number), [[name.strip() for name in line.split(",")] for line in SYNONYMS.splitlines()]
    categories = [{"id": 3 * k + 1, "name": line[0], "supercategory": "thing"} for k, line in enumerate(lines)]
    images = [{"id": 100 + k, "file_name": f"COCO_{k}.jpg", "width": 9} for k in range(40)]
    instances = [{"image_id": 100 + draw.randrange(38), "category_id": draw.choice(categories)["id"], "area": 1} for _ in range(120)]
    captions = [{"image_id": image["id"], "id": k, "caption": told(draw, PLANTED, 3)} for k, image in enumerate(images * 2)]
    put(root / "synonyms.txt", SYNONYMS)
    put(root / "annotations/instances_val2014.json", {"info": {}, "images": images, "annotations": instances, "categories": categories})
    put(root / "annotations/captions_val2014.json", {"info": {}, "images": images, "annotations": captions})
    pictures(root, *(f"val2014/{image['file_name']}" for image in images))
    node = {name: line[0] for line in lines for name in line}
    names, shown = {each["id"]: node[each["name"]] for each in categories}, defaultdict[str, set[str]](set)
    for each in instances:
        shown[f"val2014/{each['image_id']}"].add(names[each["category_id"]])
    for each in captions:
        shown[f"val2014/{each['image_id']}"].update(chair_words(each["caption"], lines))
    return shown, lines


def read(name: str, root: Path, texts: Iterable[str]) -> list[Outcome]:
    loaded = load(BENCHMARKS[name], root)
    assert not loaded.problems, loaded.problems[0]
    read_by = BENCHMARKS[name].mentions
    assert read_by is not None
    return [written(item, [text], "A dog.", read_by) for item, text in zip(loaded.items, texts, strict=True)]


@pytest.mark.parametrize("number", range(3))
def test_chair_is_the_authors(number, tmp_path):
    shown, lines = coco(tmp_path, number)
    draw = random.Random(f"said {number}")
    texts = [told(draw, PLANTED) for _ in range(39)] + ["I see nothing."]
    outcomes, labels = read("chair", tmp_path, texts), [line[0] for line in lines]
    mentions = wrong = inventing = objects = absent = covered = 0
    for text, outcome in zip(texts, outcomes, strict=True):
        there, words = shown[outcome.item.id], chair_words(text, lines)
        assert [label for label, true in zip(labels, outcome.item.match[0], strict=False) if true] == [x for x in labels if x in there]
        count = Counter(words)
        assert {label: score for label, score in zip(labels, outcome.seen[0], strict=False) if score} == count, text
        mentions += len(words)
        wrong += sum(word not in there for word in words)
        inventing += any(word not in there for word in words)
        objects += len({*words})
        absent += len({*words} - there)
        covered += len({*words} & there)
        assert is_right(BENCHMARKS["chair"], outcome) == (not {*words} - there)
    expected = {
        "hallucinated": 100 * absent / objects, "covered": 100 * covered / sum(map(len, shown.values())),
        "chair_i": 100 * wrong / mentions, "chair_s": 100 * inventing / len(texts),
    }  # fmt: skip
    found = results(BENCHMARKS["chair"], outcomes)
    assert found["seen"] == pytest.approx(expected) and 0 < absent < objects and "random" not in found
    assert BENCHMARKS["chair"].headlines == ("hallucinated", "covered") and found["blank"]["chair_s"] > 0


def test_objects_of_captions_count_where_there_are_captions(tmp_path):
    shown, _ = coco(tmp_path, 0)
    both = load(BENCHMARKS["chair"], tmp_path).items
    (tmp_path / "annotations/captions_val2014.json").unlink()
    said: list[str] = []
    alone = load(BENCHMARKS["chair"], tmp_path, said.append).items
    assert any("the instances alone" in line for line in said)
    assert (
        sum(map(sum, (item.match[0] for item in alone))) < sum(map(sum, (item.match[0] for item in both))) == sum(map(len, shown.values()))
    )
    path = tmp_path / "annotations/instances_val2014.json"
    content = read_json(path)
    content["categories"][4]["name"] = "omnibus"
    put(path, content)
    (problem,) = load(BENCHMARKS["chair"], tmp_path).problems
    assert "instances_val2014.json" in str(problem) and "'omnibus'" in str(problem) and "synonyms.txt" in str(problem)


def test_parts_that_number_their_pictures_alike_do_not_mix(tmp_path):
    """Picture 1 of each part: a person and "a dog" in one, a bicycle and "a bus" in the other; a third part has no captions."""
    put(tmp_path / "synonyms.txt", SYNONYMS)
    categories = [{"id": k, "name": name} for k, name in enumerate(("person", "bicycle"))]
    for part, number, caption in (("one", 0, "a dog"), ("two", 1, "a bus"), ("three", 1, "")):
        images, instances = [{"id": 1, "file_name": "a.jpg"}], [{"image_id": 1, "category_id": number}]
        if part == "two":
            instances += [{"image_id": "1", "category_id": 0}, {"image_id": 7, "category_id": 0}]
        put(tmp_path / f"annotations/instances_{part}.json", {"images": images, "annotations": instances, "categories": categories})
        if caption:
            put(tmp_path / f"annotations/captions_{part}.json", {"annotations": [{"image_id": 1, "caption": caption}]})
        pictures(tmp_path, f"{part}/a.jpg")
    said: list[str] = []
    items = load(BENCHMARKS["chair"], tmp_path, said.append).items
    shown = {item.id: {text.partition(":")[0] for text, true in zip(item.texts, item.match[0], strict=True) if true} for item in items}
    assert shown == {"one/1": {"person", "dog"}, "two/1": {"bicycle", "bus"}, "three/1": {"bicycle"}}
    assert [("captions_three.json" in line, "captions_one" in line) for line in said if "the instances alone" in line] == [(True, False)]
    assert [line for line in said if "left out" in line] == [
        "annotations/instances_two.json: instances of 2 pictures and captions of 0 are left out, as 'images' lacks them"
    ]


def test_a_plural_is_not_another_word():
    names = dict.fromkeys(("tap", "tape", "pan", "pane", "car", "bus", "dish", "tomato", "box", "horse"), 0)
    words = {"tapes": "tape", "panes": "pane", "buses": "bus", "dishes": "dish", "tomatoes": "tomato", "boxes": "box", "horses": "horse"}
    assert {word: named(word, names) for word in words} == {word: [name] for word, name in words.items()}
    assert [named(word, {"pan": 0, "car": 0, "tub": 0}) for word in ("panes", "cares", "tubes")] == [[], [], []]


@pytest.mark.parametrize(
    ("file", "part", "number", "change", "problem"),
    [
        ("captions", "annotations", 7, {"caption": "a"}, "column 'image_id' is missing"),
        ("instances", "annotations", 5, {"image_id": 100, "category_id": 5000}, "category_id 5000"),
    ],
)
def test_an_error_in_coco_names_the_file_and_the_entry(file, part, number, change, problem, tmp_path):
    coco(tmp_path, 0)
    path = tmp_path / f"annotations/{file}_val2014.json"
    content = read_json(path)
    content[part][number - 1] = change
    put(path, content)
    (error,) = load(BENCHMARKS["chair"], tmp_path).problems
    assert f"{path}: item 1: {part} {number}: " in str(error) and problem in str(error)


RELATION = {
    "person": ["people", "individual", "man", "woman", "boy"], "man": ["person", "people", "individual", "boy"],
    "tree": ["forest", "leave", "bush"],
    "grass": ["ground"], "ground": ["floor"], "shoe": [], "sign": ["signal"], "glove": [], "bench": ["chair"], "chair": ["bench"],
    "bin": ["can", "bucket"], "television": ["TV", "screen"], "hot": [], "plate": [], "car": ["plate", "light"], "rose": [], "dog": [],
}  # fmt: skip
SAFE = ["shoe", "sign", "individual", "light", "camera"]
SEEN = (
    "a man", "a person", "people", "boys", "a tree", "trees", "bushes", "leaves", "grass", "the ground", "a floor", "shoes", "signs",
    "gloves", "benches", "a chair", "a trash can", "cans", "you can walk", "a hot day", "a plate", "a car",
    "the car's light", "roses", "a dog", "two dogs", "an unlisted thing", "a TV screen",
)  # fmt: skip


def amber_nouns(text: str) -> list[str]:
    """The nouns that a tagger finds in these texts, as lemmas."""
    words = tokens(text.replace("you can", "").replace("hot day", "day"))
    return [word for word in words if word in {*RELATION, *(word for listed in RELATION.values() for word in listed)}]


def amber_naive(annotated: Sequence[dict[str, Any]], texts: Sequence[str]) -> dict[str, float]:
    """The loop of the authors' inference.py without its similar words."""
    chair, cover, imagined, inventing = list[int](), list[bool](), list[bool](), list[bool]()
    for row, text in zip(annotated, texts, strict=True):
        found, flags = {"truth": set[int](), "hallu": set[int]()}, list[int]()
        safe, bad = (
            [(word, k) for k, name in enumerate(row[kind]) for word in RELATION[name]] + [(name, k) for k, name in enumerate(row[kind])]
            for kind in ("truth", "hallu")
        )
        for noun in amber_nouns(text):
            flags.append(0)
            if noun in SAFE:
                continue
            if hits := [k for word, k in safe if word == noun]:
                found["truth"].add(hits[0])
                continue
            if hits := [k for word, k in bad if word == noun]:
                found["hallu"].add(hits[0])
            flags[-1] = 1
        chair += flags
        cover += [k in found["truth"] for k in range(len(row["truth"]))]
        imagined += [k in found["hallu"] for k in range(len(row["hallu"]))]
        inventing.append(any(flags))
    parts: dict[str, Sequence[int]] = {"chair": chair, "cover": cover, "cog": imagined, "hal": inventing}
    return {name: 100 * sum(values) / len(values) for name, values in parts.items()}


@pytest.mark.parametrize("number", range(3))
def test_amber_is_the_authors_without_similar_words(number, tmp_path):
    draw = random.Random(number)
    rows = []
    for k in range(1, 41):
        chosen = draw.sample(sorted(RELATION), 7)
        rows.append({"id": k, "type": "generative", "truth": chosen[:4], "hallu": chosen[4 : 4 + k % 4]})
    put(tmp_path / "data/annotations.json", [*rows, {"id": 41, "type": "relation", "truth": "yes"}])
    put(
        tmp_path / "data/query/query_generative.json",
        [{"id": k, "image": f"AMBER_{k}.jpg", "query": "Describe this image."} for k in range(1, 41)],
    )
    put(tmp_path / "data/relation.json", RELATION)
    put(tmp_path / "data/safe_words.txt", "\n".join(SAFE))
    pictures(tmp_path, *(f"image/AMBER_{k}.jpg" for k in range(1, 41)))
    texts = [told(draw, SEEN) for _ in rows]
    outcomes = read("amber_generative", tmp_path, texts)
    for row, text, outcome in zip(rows, texts, outcomes, strict=True):
        alone = BENCHMARKS["amber_generative"].metrics([Judged(outcome.item, outcome.seen)])
        if row["hallu"] and amber_nouns(text):
            assert alone == pytest.approx(amber_naive([row], [text])), text
    found = results(BENCHMARKS["amber_generative"], outcomes)["seen"]
    assert found == pytest.approx(amber_naive(rows, texts)) and all(0 < value < 100 for value in found.values())
    put(tmp_path / "data/relation.json", {name: words for name, words in RELATION.items() if name != "dog"})
    problems = load(BENCHMARKS["amber_generative"], tmp_path).problems
    assert problems and all("'dog'" in str(problem) and "relation.json" in str(problem) for problem in problems)
    for wrong in ({}, [RELATION, {"cat": []}], {**RELATION, "dog": "puppy"}):
        put(tmp_path / "data/relation.json", wrong)
        assert all("relation.json: " in str(problem) for problem in load(BENCHMARKS["amber_generative"], tmp_path).problems)
        assert not load(BENCHMARKS["amber_generative"], tmp_path).items


def test_the_prompt_is_the_benchmarks_or_the_probes():
    item = Item("i", ((Path("a"),),), ("dog: dog",), ((1,),))
    assert Write().asked(item) == "Please describe this image in detail." and Write(prompt="What is it?").asked(item) == "What is it?"
    assert Write().asked(Item("i", ((Path("a"),),), ("dog: dog",), ((1,),), "Describe this image.")) == "Describe this image."
    with pytest.raises(ConfigError, match="write"):
        Write(0)
