"""VSR (Liu et al. 2023, arXiv 2205.00363), zero-shot split: sentences about a spatial relation that are true or false of a picture."""

from __future__ import annotations

from collections.abc import Sequence

from cfvlm_ds.evaluation.benchmarks.base import YES_NO, Benchmark, File, Item, Judged, Row, Values, single
from cfvlm_ds.evaluation.benchmarks.metrics import macro, tag, yes_no

ASK = 'Is this sentence true of the picture: "{}" Please answer Yes or No.'


def item(row: Row) -> Item:
    picture = row.picture(row["image"], "data/images", "images", "../coco/train2017", "../coco/val2017")
    question, truth = ASK.format(row.text("caption")), row.truth("label", (1, 0))
    return single(row.number, picture, YES_NO, str(row["image"]), truth, question, relation=row.text("relation"))


def metrics(table: Sequence[Judged]) -> Values:
    """Return the yes/no metrics, and the mean accuracy over relations."""
    by_relation = macro(table, tag("relation"))
    return yes_no(table) | ({"macro": by_relation["macro"]} if by_relation else {})


VSR = Benchmark(
    title="VSR (zero-shot)",
    files=(File("data/splits/zeroshot/test.jsonl", rows=1222),),
    item=item,
    metrics=metrics,
    headline="accuracy",
    probes=("yes_no", "generate"),
    unofficial="the question, because the authors train classifiers and publish none",
)
