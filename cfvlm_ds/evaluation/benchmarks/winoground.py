"""Winoground (Thrush et al. 2022, arXiv 2204.03162): two pictures and two captions with the same words, each true of one picture."""

from __future__ import annotations

from pathlib import Path

from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Row, quad
from cfvlm_ds.evaluation.benchmarks.metrics import QUAD_RANDOM, by, quads


def item(row: Row) -> Item:
    names = [row[column] for column in ("image_0", "image_1")]  # without a suffix
    files = [f"{name}.png" if isinstance(name, str) and not Path(name).suffix else name for name in names]
    pictures = [row.picture(file, "images", "data/images") for file in files]
    return quad(str(row["id"]), pictures, (row.text("caption_0"), row.text("caption_1")), tag=str(row["collapsed_tag"]))


WINOGROUND = Benchmark(
    title="Winoground",
    files=(File("data/examples.jsonl", rows=400),),
    item=item,
    metrics=by("tag", quads),
    headline="group",
    probes=("match", "caption", "letters"),
    random=QUAD_RANDOM,
)
