"""What'sUp (Kamath et al. 2023, arXiv 2310.19785): the same two objects on, under, left of, right of, in front of, behind each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Judged, Values, one_hot
from cfvlm_ds.evaluation.benchmarks.metrics import accuracy, grouped, sets, tag, text_right
from cfvlm_ds.evaluation.benchmarks.source import Row, Source, each

CONTROLLED = {"images": "controlled_images_dataset.json", "clevr": "controlled_clevr_dataset.json"}
QUESTIONS = {
    "coco_one": ("coco_qa_one_obj.json", ("val2017", "../coco/val2017")),
    "coco_two": ("coco_qa_two_obj.json", ("val2017", "../coco/val2017")),
    "vg_one": ("vg_qa_one_obj.json", ("vg_images",)),
    "vg_two": ("vg_qa_two_obj.json", ("vg_images",)),
}
PAIRS = {
    "left": "left-right",
    "right": "left-right",
    "on": "on-under",
    "under": "on-under",
    "in-front": "front-behind",
    "behind": "front-behind",
}


def items(source: Source) -> Iterator[Item | DataError]:
    for part, name in CONTROLLED.items():

        def controlled(where: str, row: Row, part: str = part) -> Item:
            options = row["caption_options"]
            if not isinstance(options, list) or len(options) != 4 or not all(isinstance(option, str) for option in options):
                raise DataError(f"{where}: 'caption_options' must be four texts; get the official file again")
            path = PurePosixPath(str(row["image_path"]).removeprefix("data/"))
            scene, pair = scene_of(where, path.name)
            tags = {"part": part, "set": f"{part}/{scene}", "pair": f"{part}/{scene}/{pair}"}
            picture = source.picture(where, str(path), "")
            return Item(f"{part}/{path.stem}", ((picture,),), tuple(options), (one_hot(0, 4),), tags=tags, cluster=tags["set"])

        yield from each(source.rows(name, ("image_path", "caption_options")), controlled)
    for part, (name, folders) in QUESTIONS.items():

        def question(where: str, row: Row, part: str = part, folders: Sequence[str] = folders) -> Item:
            stem = str(row["image_id"]).zfill(12) if part.startswith("coco") else str(row["image_id"])
            picture = source.picture(where, f"{stem}.jpg", *folders)
            texts = row["true"], row["false"]
            return Item(f"{part}/{where.rpartition('item ')[2]}", ((picture,),), texts, (one_hot(0, 2),), tags={"part": part}, cluster=stem)

        yield from each(_triples(source, name), question)


def scene_of(where: str, name: str) -> tuple[str, str]:
    """The two objects and the pair of relations of a file such as ``beer-bottle_left_of_armchair.jpeg``, as the authors' code reads it."""
    words = PurePosixPath(name).stem.split("_")
    if len(words) < 3 or words[1] not in PAIRS:
        raise DataError(f"{where}: the file name {name!r} says no relation ({', '.join(PAIRS)}); get the official file again")
    return f"{words[0]}+{words[-1]}", PAIRS[words[1]]


def _triples(source: Source, name: str) -> Iterator[tuple[str, Row | DataError]]:
    for where, row in source.values(name):
        if isinstance(row, DataError):
            yield where, row
        elif isinstance(row, list) and len(row) == 3 and all(isinstance(value, str) for value in row[1:]):
            yield where, dict(zip(("image_id", "true", "false"), row, strict=True))
        else:
            yield where, DataError(f"{where}: the row must be [image id, true caption, false caption]; get the official file again")


def metrics(table: Sequence[Judged]) -> Values:
    """Accuracy of each part; for the controlled pictures also of both relations of a pair, and of all four of a scene.

    As in the authors' code a pair or scene that is not complete counts as wrong: they divide by a half and a quarter of the pictures.
    """
    found: Values = {}
    for part, members in grouped(table, tag("part")).items():
        found[f"individual/{part}"] = accuracy(members)["accuracy"]
        for name, key, size in (("pair", "pair", 2), ("set", "set", 4)) if part in CONTROLLED else ():
            right = 0.0
            for scene in sets(members, tag(key)):
                value = float(len(scene) == size)
                for member in scene:
                    value *= text_right(member)
                right += value
            found[f"{name}/{part}"] = 100 * right / (len(members) / size)
    parts = [value for name, value in found.items() if name.startswith("individual/")]
    return {"individual": sum(parts) / len(parts), **found} if parts else {}


WHATSUP = Benchmark(
    title="What'sUp",
    files=(*(File(name) for name in CONTROLLED.values()), *(File(name) for name, _ in QUESTIONS.values())),
    licence="MIT; pictures: the authors', COCO, Visual Genome",
    items=items,
    metrics=metrics,
    headline="individual",
    probes=("match", "caption", "letters"),
    traps=(
        "the true caption always stands first: a program that takes the first of a tie is right",
        "pairs and scenes are known from the names of the files alone",
    ),
)
