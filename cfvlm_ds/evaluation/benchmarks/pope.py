"""POPE (Li et al. 2023, arXiv 2305.10355): "is there a ... in the picture?" Absent objects are random, popular or adversarial."""

from __future__ import annotations

from collections.abc import Sequence

from cfvlm_ds.evaluation.benchmarks.base import YES_NO, Benchmark, Item, Judged, Values
from cfvlm_ds.evaluation.benchmarks.metrics import means, sliced, tag, yes_no
from cfvlm_ds.evaluation.benchmarks.source import File, Row

COLUMNS = ("question_id", "image", "text", "label")
SPLITS = ("random", "popular", "adversarial")
ASK = "\nAnswer the question using a single word or phrase."


def item(row: Row) -> Item:
    return Item(
        f"{row.part}/{row['question_id']}",
        ((row.picture(row["image"], "val2014", "images/val2014", "../coco/val2014"),),),
        YES_NO,
        (row.truth("label", YES_NO),),
        row.text("text") + ASK,
        tags={"split": row.part},
        cluster=str(row["image"]),
    )


def metrics(table: Sequence[Judged]) -> Values:
    """Return the yes/no metrics of all questions and of each split, and the means over splits, which papers report."""
    values = sliced(table, tag("split"), yes_no)
    return values | means(values, {"f1_macro": "f1/", "accuracy_macro": "accuracy/"})


POPE = Benchmark(
    title="POPE (COCO)",
    files=tuple(File(f"output/coco/coco_pope_{split}.json", COLUMNS, 3000, part=split) for split in SPLITS),
    item=item,
    metrics=metrics,
    headline="f1_macro",
    probes=("yes_no", "generate"),
)
