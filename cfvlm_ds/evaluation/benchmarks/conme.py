"""ConMe (Huang et al. 2024, arXiv 2406.08164): questions about details of a picture, each with a correct option and a hard negative."""

from __future__ import annotations

from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Row, single
from cfvlm_ds.evaluation.benchmarks.metrics import macro_by

PARTS = ("replace-att", "replace-obj", "replace-rel")


def item(row: Row) -> Item:
    name = row["image"]  # a COCO id or a path
    file = f"{int(name):012d}.jpg" if name.isascii() and name.isdecimal() and len(name) <= 12 else name
    picture = row.picture(file, "", "images", "../coco/val2017")
    options = row.text("correct_option"), row.text("incorrect_option")
    question = row.text("base_question")
    return single(f"{row.part}/{row.number}", picture, options, picture.name, (1, 0), question, part=row.part)


CONME = Benchmark(
    title="ConMe",
    files=tuple(File(f"{part}.csv", part=part) for part in PARTS),
    item=item,
    metrics=macro_by("part"),
    headline="macro",
    probes=("letters", "caption", "generate"),
    unofficial="columns unverified: taken from third-party programs that read the files, not from the files themselves",
)
