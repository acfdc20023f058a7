"""Winoground (Thrush et al. 2022, arXiv 2204.03162): two pictures, two captions of the same words, each true of one picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Judged, Published, Values
from cfvlm_ds.evaluation.benchmarks.metrics import QUAD_CHANCE, quads, sliced, tag
from cfvlm_ds.evaluation.benchmarks.source import Row, Source, each, text

COLUMNS = ("id", "image_0", "image_1", "caption_0", "caption_1", "collapsed_tag")


def items(source: Source) -> Iterator[Item | DataError]:
    def item(where: str, row: Row) -> Item:
        number = str(row["id"])
        return quad(
            number,
            tuple(named(source, where, row[key]) for key in ("image_0", "image_1")),
            (text(where, row, "caption_0"), text(where, row, "caption_1")),
            {"tag": str(row["collapsed_tag"])},
        )

    yield from each(source.rows("data/examples.jsonl", COLUMNS), item)


def named(source: Source, where: str, name: object) -> Path:
    """A picture, which the rows name without its ending."""
    whole = f"{name}.png" if isinstance(name, str) and not Path(name).suffix else name
    return source.picture(where, whole, "images", "data/images")


def quad(number: str, pictures: Sequence[Path], captions: Sequence[str], tags: dict[str, str], cluster: str = "") -> Item:
    """Two pictures and two texts, each text true of its own picture."""
    images = tuple((picture,) for picture in pictures)
    return Item(number, images, tuple(captions), ((1, 0), (0, 1)), tags=tags, cluster=cluster or number)


def metrics(table: Sequence[Judged]) -> Values:
    return sliced(table, tag("tag"), quads)


WINOGROUND = Benchmark(
    title="Winoground",
    files=(File("data/examples.jsonl", 400),),
    licence="gated, research only: not to be redistributed",
    items=items,
    metrics=metrics,
    headline="group",
    probes=("match", "caption", "letters"),
    chance=QUAD_CHANCE,
    published=(Published("group", "VQAScore, CLIP-FlanT5-XXL", 46.0, "arXiv 2404.01291"),),
    traps=("the files are gated: agree to the terms on the hub first", "chance of group is one in six, not one in sixteen"),
)
