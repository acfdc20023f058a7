"""Cola (Ray et al. 2023, arXiv 2305.03689), matching of several objects: two pictures, two captions with the attributes exchanged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Judged, Values
from cfvlm_ds.evaluation.benchmarks.metrics import QUAD_CHANCE, quads
from cfvlm_ds.evaluation.benchmarks.source import Row, Source, each
from cfvlm_ds.evaluation.benchmarks.winoground import quad

NAME = "data/COLA_multiobjects_matching_benchmark.json"


def items(source: Source) -> Iterator[Item | DataError]:
    def item(where: str, row: Row) -> Item:
        pictures = [source.picture(where, PurePosixPath(urlsplit(row[key]).path).name, *FOLDERS) for key in ("url_0", "url_1")]
        return quad(where.rpartition("item ")[2], pictures, (row["caption_0"], row["caption_1"]), {})

    yield from each(_rows(source), item)


FOLDERS = ("images", "VG_100K", "VG_100K_2", "../vg/VG_100K", "../vg/VG_100K_2")


def _rows(source: Source) -> Iterator[tuple[str, Row | DataError]]:
    for where, row in source.values(NAME):
        if isinstance(row, DataError):
            yield where, row
        elif isinstance(row, list) and len(row) == 4 and all(isinstance(value, str) for value in row):
            yield where, dict(zip(("url_0", "caption_0", "url_1", "caption_1"), row, strict=True))
        else:
            yield where, DataError(f"{where}: the row must be [url, caption, url, caption], not {row!r}; get the official file again")


def metrics(table: Sequence[Judged]) -> Values:
    return quads(table)


COLA = Benchmark(
    title="Cola (multi-object)",
    files=(File(NAME, 210),),
    licence="MIT; pictures: Visual Genome, CC-BY-4.0",
    items=items,
    metrics=metrics,
    headline="image",
    probes=("match", "caption"),
    chance=QUAD_CHANCE,
    traps=(
        "the authors' accuracy is the image score alone: a text looks for its picture",
        "the rows name pictures by their address; the files have the last part of it as name",
    ),
)
