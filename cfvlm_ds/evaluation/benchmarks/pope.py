"""POPE (Li et al. 2023, arXiv 2305.10355): yes/no questions about objects.

Absent objects are sampled at random, by popularity or adversarially, depending on the split.
"""

from __future__ import annotations

from collections.abc import Sequence

from cfvlm_ds.evaluation.benchmarks.base import YES_NO, Benchmark, File, Item, Judged, Row, Values, single
from cfvlm_ds.evaluation.benchmarks.metrics import by, means, yes_no

SPLITS = ("random", "popular", "adversarial")
ASK = "\nAnswer the question using a single word or phrase."


def item(row: Row) -> Item:
    picture = row.picture(row["image"], "val2014", "images/val2014", "../coco/val2014")
    truth, question = row.truth("label", YES_NO), row.text("text") + ASK
    return single(f"{row.part}/{row['question_id']}", picture, YES_NO, str(row["image"]), truth, question, split=row.part)


def metrics(table: Sequence[Judged]) -> Values:
    """Return the yes/no metrics over all questions and for each split, and the means over splits, which papers report."""
    values = by("split", yes_no)(table)
    return values | means(values, {"f1_macro": "f1/", "accuracy_macro": "accuracy/"})


POPE = Benchmark(
    title="POPE (COCO)",
    files=tuple(File(f"output/coco/coco_pope_{split}.json", rows=3000, part=split) for split in SPLITS),
    item=item,
    metrics=metrics,
    headline="f1_macro",
    beside="yes_ratio",
    probes=("yes_no", "generate"),
)
