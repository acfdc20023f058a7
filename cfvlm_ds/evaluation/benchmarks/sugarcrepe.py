"""SugarCrepe (Hsieh et al. 2023, arXiv 2306.14610): a picture, its caption, and a hard negative made by one of seven kinds of edit."""

from __future__ import annotations

from collections.abc import Sequence

from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Judged, Row, Values, single
from cfvlm_ds.evaluation.benchmarks.metrics import accuracy, macro, means, tag

ROWS = {
    "add_att": 692, "add_obj": 2062, "replace_att": 788, "replace_obj": 1652, "replace_rel": 1406, "swap_att": 666, "swap_obj": 245,
}  # fmt: skip
COCO = ("val2017", "images/val2017", "../coco/val2017")


def item(row: Row) -> Item:
    captions = row.text("caption"), row.text("negative_caption")
    picture = row.picture(row["filename"], *COCO)
    return single(f"{row.part}/{row.number}", picture, captions, str(row["filename"]), subset=row.part)


def metrics(table: Sequence[Judged]) -> Values:
    """Return the accuracy on each subset, the mean over subsets, the mean for each edit operation, and the accuracy over all items."""
    values = macro(table, tag("subset"))
    return values | means(values, {f"macro/{kind}": f"macro/{kind}_" for kind in ("add", "replace", "swap")}) | accuracy(table)


SUGARCREPE = Benchmark(
    title="SugarCrepe",
    files=tuple(File(f"data/{subset}.json", rows=rows, part=subset) for subset, rows in ROWS.items()),
    item=item,
    metrics=metrics,
    headline="macro",
    probes=("match", "caption", "letters", "generate"),
)
