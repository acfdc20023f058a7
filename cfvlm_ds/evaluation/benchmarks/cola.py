"""Cola (Ray et al. 2023, arXiv 2305.03689), multi-object matching: two pictures, and two captions with swapped attributes."""

from __future__ import annotations

from pathlib import PurePosixPath
from urllib.parse import urlsplit

from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Row, quad
from cfvlm_ds.evaluation.benchmarks.metrics import QUAD_RANDOM, quads

COLUMNS = ("url_0", "caption_0", "url_1", "caption_1")
FOLDERS = ("images", "VG_100K", "VG_100K_2", "../vg/VG_100K", "../vg/VG_100K_2")


def item(row: Row) -> Item:
    pictures = [row.picture(PurePosixPath(urlsplit(row.text(key)).path).name, *FOLDERS) for key in ("url_0", "url_1")]
    return quad(row.number, pictures, (row["caption_0"], row["caption_1"]))


COLA = Benchmark(
    title="Cola (multi-object)",
    files=(File("data/COLA_multiobjects_matching_benchmark.json", COLUMNS, 210),),
    item=item,
    metrics=quads,
    headline="image",
    probes=("match", "caption"),
    random=QUAD_RANDOM,
)
