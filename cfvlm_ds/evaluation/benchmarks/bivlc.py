"""BiVLC (Miranda et al. 2024, arXiv 2406.09952): SugarCrepe with an added picture for each negative caption."""

from __future__ import annotations

from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Row, quad
from cfvlm_ds.evaluation.benchmarks.metrics import QUAD_RANDOM, by, quads


def item(row: Row) -> Item:
    pictures = [row.picture(row[key], "", "images") for key in ("image", "negative_image")]
    captions = row.text("caption"), row.text("negative_caption")
    return quad(row.number, pictures, captions, str(row["image"]), type=f"{row['type']}_{row['subtype']}".lower())


BIVLC = Benchmark(
    title="BiVLC",
    files=(File("data/test-*.parquet", rows=2933, lines="test.jsonl"),),
    item=item,
    metrics=by("type", quads),
    headline="group",
    probes=("match", "caption", "letters"),
    random=QUAD_RANDOM,
)
