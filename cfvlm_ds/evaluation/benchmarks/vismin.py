"""VisMin (Awal et al. 2024, arXiv 2407.16772): two pictures and two captions that differ in one object, attribute, count or relation."""

from __future__ import annotations

from collections.abc import Sequence

from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Judged, Row, Values, quad
from cfvlm_ds.evaluation.benchmarks.metrics import QUAD_RANDOM, by, means, quads


def item(row: Row) -> Item:
    pictures = [row.picture(row[key], "", "images") for key in ("image_0", "image_1")]
    return quad(row.number, pictures, (row.text("text_0"), row.text("text_1")), str(row["image_0"]), category=row.text("category"))


def metrics(table: Sequence[Judged]) -> Values:
    """Return the scores over all items and for each category. ``text_macro``, ``image_macro`` and ``group_macro`` are means over
    categories, which the authors report.
    """
    values = by("category", quads)(table)
    return values | means(values, {f"{name}_macro": f"{name}/" for name in ("text", "image", "group")})


VISMIN = Benchmark(
    title="VisMin",
    files=(File("data/test-*.parquet", rows=2084, lines="test.jsonl"),),
    item=item,
    metrics=metrics,
    headline="group_macro",
    probes=("match", "caption", "letters"),
    random=QUAD_RANDOM | {f"{name}_macro": QUAD_RANDOM[name] for name in ("text", "image", "group")},
    unofficial="one score per cell instead of the authors' questions about both pictures",
)
