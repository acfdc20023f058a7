"""The What'sUp benchmark (Kamath et al. 2023, arXiv 2310.19785): the same two objects in different spatial relations, such as on and
under.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import PurePosixPath

from cfvlm_ds.evaluation.benchmarks.base import Benchmark, Item, Judged, Values, single
from cfvlm_ds.evaluation.benchmarks.metrics import accuracy, grouped, means, sets, tag, text_right
from cfvlm_ds.evaluation.benchmarks.source import File, Row, one_hot

CONTROLLED = ("images", "clevr")
QUESTIONS = {
    "coco_one": ("val2017", "../coco/val2017"),
    "coco_two": ("val2017", "../coco/val2017"),
    "vg_one": ("vg_images",),
    "vg_two": ("vg_images",),
}
"""Part -> folders that may contain its pictures."""
PAIRS = {
    "left": "left-right",
    "right": "left-right",
    "on": "on-under",
    "under": "on-under",
    "in-front": "front-behind",
    "behind": "front-behind",
}


def item(row: Row) -> Item:
    if row.part in CONTROLLED:
        return _controlled(row)
    stem = str(row["image_id"]).zfill(12 if row.part.startswith("coco") else 0)
    picture = row.picture(f"{stem}.jpg", *QUESTIONS[row.part])
    return single(f"{row.part}/{row.number}", picture, (row["true"], row["false"]), stem, part=row.part)


def _controlled(row: Row) -> Item:
    options = row["caption_options"]
    if not isinstance(options, list) or len(options) != 4 or not all(isinstance(option, str) for option in options):
        raise row.error("'caption_options' must be four texts")
    path = PurePosixPath(str(row["image_path"]).removeprefix("data/"))
    scene, pair = scene_of(row, path)
    picture, group = row.picture(str(path), ""), f"{row.part}/{scene}"
    tags = {"part": row.part, "set": group, "pair": f"{group}/{pair}"}
    return single(f"{row.part}/{path.stem}", picture, options, group, one_hot(0, 4), **tags)


def scene_of(row: Row, path: PurePosixPath) -> tuple[str, str]:
    """Parse a file name such as ``beer-bottle_left_of_armchair.jpeg`` by the authors' rule. Return the scene (the two objects), and the
    pair of opposite relations, such as left-right, to which the relation in the name belongs. Raises DataError for a name without a
    relation.
    """
    words = path.stem.split("_")
    if len(words) < 3 or words[1] not in PAIRS:
        raise row.error(f"the file name {path.name!r} contains no relation ({', '.join(PAIRS)})")
    return f"{words[0]}+{words[-1]}", PAIRS[words[1]]


def metrics(table: Sequence[Judged]) -> Values:
    """Return the accuracy on each part. For the controlled parts, also return the shares of pairs and of scenes in which the model is right
    on every picture.

    As in the authors' code, the number of pairs is taken to be half the number of pictures, and the number of scenes a quarter of it. An
    incomplete pair or scene counts as wrong.
    """
    values: Values = {}
    for part, members in grouped(table, tag("part")).items():
        values[f"individual/{part}"] = accuracy(members)["accuracy"]
        for name, key, size in (("pair", "pair", 2), ("set", "set", 4)) if part in CONTROLLED else ():
            right = sum((len(scene) == size) * prod(map(text_right, scene)) for scene in sets(members, tag(key)))
            values[f"{name}/{part}"] = 100 * right / (len(members) / size)
    return means(values, {"individual": "individual/"}) | values


WHATSUP = Benchmark(
    title="What'sUp",
    files=(
        *(File(f"controlled_{part}_dataset.json", part=part) for part in CONTROLLED),
        *(File(part.replace("_", "_qa_") + "_obj.json", ("image_id", "true", "false"), part=part) for part in QUESTIONS),
    ),
    item=item,
    metrics=metrics,
    headline="individual",
    probes=("match", "caption", "letters"),
)
