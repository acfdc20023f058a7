"""CHAIR (Rohrbach et al. 2018, arXiv 1809.02156): hallucinated objects in descriptions of COCO pictures.

An object is in a picture if it is annotated as an instance or mentioned in a caption. Words are parsed as in the authors' utils/chair.py,
except that the authors singularise words with a library, whereas here a word matches a name either exactly or without its plural ending.
"""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from glob import glob
from pathlib import PurePosixPath
from typing import Any

from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Row, Source, single
from cfvlm_ds.evaluation.benchmarks.descriptions import described, named, names_of, tally

INSTANCES = File("annotations/instances_*.json")
CAPTIONS = File("annotations/captions_*.json")
SYNONYMS = File("synonyms.txt", ("", "names"))
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
_PHRASES = {
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS},
    "passenger jet": "jet", "passenger train": "train", "toilet seat": "toilet", "home plate": "", "train track": "",
}  # fmt: skip
"""Phrase in the authors' code -> name that replaces it. A name that is not among the synonyms is ignored."""


def items(row: Row) -> list[Item]:
    """Return an item for each picture in a COCO instance file."""
    texts, names = _objects(row.source)
    objects = {}
    for category in row.rows("categories"):
        if (number := names.get(category.text("name").lower())) is None:
            raise category.error(f"category {category['name']!r} is in no line of {SYNONYMS.name}", "add a line that begins with it")
        objects[category["id"]] = number
    shown: defaultdict[Any, set[int]] = defaultdict(set)
    for instance in row.rows("annotations"):
        if (category_id := instance["category_id"]) not in objects:
            raise instance.error(f"category_id {category_id!r} is in no entry of 'categories'")
        shown[instance["image_id"]].add(objects[category_id])
    captions, part = _captions(row.source), PurePosixPath(row.file).stem.removeprefix("instances_")
    if not (row.source.root / (file := f"annotations/captions_{part}.json")).exists():
        message = "so the objects are those of the instances alone; the authors add those of captions"
        row.source.say(f"{row.source.root}: no {file}, {message}")
    images = list(row.rows("images"))
    ids = {image["id"] for image in images}
    unknown = len(shown.keys() - ids), sum(of == part and number not in ids for of, number in captions)
    if any(unknown):
        row.source.say(f"{row.file}: instances of {unknown[0]} pictures and captions of {unknown[1]} are left out, as 'images' lacks them")
    found = []
    for image in images:
        name, present = str(image["file_name"]), shown[image["id"]].union(captions.get((part, image["id"]), ()))
        picture = image.picture(name, part, f"images/{part}", f"../coco/{part}")
        found.append(single(f"{part}/{image['id']}", picture, texts, name, tuple(int(k in present) for k in range(len(texts)))))
    return found


def mentions(text: str, item: Item) -> tuple[float, ...]:
    """Count the mentions of each object in a description. If a toilet is mentioned, the word "seat" does not count as a chair."""
    names = _with_phrases(item.texts)
    found = named(text, names)
    if {"toilet", "toilet seat"} & {*found}:
        found = [name for name in found if name != "seat"]
    return tally(found, names, len(item.texts))


@lru_cache(16)
def _with_phrases(texts: tuple[str, ...]) -> dict[str, int]:
    names = names_of(texts)
    return names | {phrase: names.get(name, -1) for phrase, name in _PHRASES.items()}


@lru_cache(1)
def _objects(source: Source) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return one text per object (line of the synonyms file), and name -> object index."""
    lines = [[name for part in row.text("names").split(",") if (name := part.strip())] for row in source.sound_rows(SYNONYMS)]
    texts = tuple(f"{line[0]}: {', '.join(dict.fromkeys(line))}" for line in lines if line)
    return texts, names_of(texts)


@lru_cache(1)
def _captions(source: Source) -> dict[tuple[str, Any], set[int]]:
    """Return (part, picture id) -> indices of the objects that the picture's captions mention. Picture ids are unique only within a part,
    so captions_PART.json applies only to instances_PART.json.
    """
    texts, _ = _objects(source)
    reader, found = Item("captions", ((),), texts, ((0,) * len(texts),)), defaultdict[tuple[str, Any], set[int]](set)
    if not glob(CAPTIONS.name, root_dir=source.root):
        return found
    for row in source.sound_rows(CAPTIONS):
        part = PurePosixPath(row.file).stem.removeprefix("captions_")
        for caption in row.rows("annotations"):
            counts = mentions(str(caption["caption"]), reader)
            found[part, caption["image_id"]].update(number for number, count in enumerate(counts) if count)
    return found


CHAIR = Benchmark(
    title="CHAIR (COCO)",
    files=(INSTANCES,),
    item=items,
    metrics=described,
    headline="hallucinated",
    beside="covered",
    probes=("write",),
    mentions=mentions,
    unofficial="hallucinated and covered are not the authors' metrics; singulars are found by endings",
)
