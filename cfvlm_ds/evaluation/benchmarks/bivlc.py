"""BiVLC (Miranda et al. 2024, arXiv 2406.09952): SugarCrepe's captions with a picture for each negative, both directions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Judged, Published, Values
from cfvlm_ds.evaluation.benchmarks.metrics import QUAD_CHANCE, quads, sliced, tag
from cfvlm_ds.evaluation.benchmarks.source import Row, Source, each, text
from cfvlm_ds.evaluation.benchmarks.winoground import quad

COLUMNS = ("image", "caption", "negative_caption", "negative_image", "type", "subtype")
FILE = File("data/test-*.parquet", 2933, lines="test.jsonl")
SOURCE = "arXiv 2406.09952, table of main results"


def items(source: Source) -> Iterator[Item | DataError]:
    def item(where: str, row: Row) -> Item:
        return quad(
            where.rpartition(":")[2],
            tuple(source.picture(where, row[key], "", "images") for key in ("image", "negative_image")),
            (text(where, row, "caption"), text(where, row, "negative_caption")),
            {"type": f"{row['type']}_{row['subtype']}".lower()},
            str(row["image"]),
        )

    yield from each(source.rows(FILE.name, COLUMNS, FILE.lines), item)


def metrics(table: Sequence[Judged]) -> Values:
    return sliced(table, tag("type"), quads)


BIVLC = Benchmark(
    title="BiVLC",
    files=(FILE,),
    licence="MIT; pictures: COCO, and SDXL's",
    items=items,
    metrics=metrics,
    headline="group",
    probes=("match", "caption", "letters"),
    chance=QUAD_CHANCE,
    published=(
        Published("group", "Open CapPa, caption likelihood", 42.0, SOURCE),
        Published("group", "VQAScore, CLIP-FlanT5-XXL", 76.5, SOURCE),
        Published("group", "human", 86.8, SOURCE),
    ),
    traps=("the paper's I2T is text, its T2I image", "caption likelihood loses 33 points once both texts must win: the prior of the texts"),
)
