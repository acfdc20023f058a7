"""EqBen (Wang et al. 2023, arXiv 2303.14465), its subset for large models: two pictures that differ a little, two captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Judged, Published, Values
from cfvlm_ds.evaluation.benchmarks.metrics import QUAD_CHANCE, quads, sliced, tag
from cfvlm_ds.evaluation.benchmarks.source import Row, Source, each, text
from cfvlm_ds.evaluation.benchmarks.winoground import quad

SUBSETS = {
    "eqbensd": "sd", "eqbenkubric_cnt": "kubric", "eqbenkubric_loc": "kubric", "eqbenkubric_attr": "kubric", "eqbengebc": "gebc",
    "eqbenag": "ag", "eqbenyoucook2": "youcook2",
}  # fmt: skip


def items(source: Source) -> Iterator[Item | DataError]:
    def item(where: str, row: Row) -> Item:
        folder = text(where, row, "image0").split("/")[0]
        if folder not in SUBSETS:
            raise DataError(f"{where}: picture folder {folder!r} is none of {', '.join(SUBSETS)}; get the official file again")
        return quad(
            where.rpartition("item ")[2],
            tuple(source.picture(where, row[key], "images") for key in ("image0", "image1")),
            (text(where, row, "caption0"), text(where, row, "caption1")),
            {"subset": SUBSETS[folder]},
        )

    yield from each(source.rows("all_select.json", ("image0", "image1", "caption0", "caption1")), item)


def metrics(table: Sequence[Judged]) -> Values:
    return sliced(table, tag("subset"), quads)


EQBEN = Benchmark(
    title="EqBen (mini)",
    files=(File("all_select.json"),),
    licence="Apache-2.0 (code); pictures: their sources",
    items=items,
    metrics=metrics,
    headline="group",
    probes=("match", "caption", "letters"),
    chance=QUAD_CHANCE,
    published=(Published("group", "VQAScore, CLIP-FlanT5-XXL", 47.9, "arXiv 2404.01291"),),
    traps=("LLaVA's group accuracy is 95.0 with options in one order and 0.0 in the other (EqBen README): letters are asked in both",),
)
