"""VisMin (Awal et al. 2024, arXiv 2407.16772): two pictures and two captions that differ in one object, attribute, count or relation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Judged, Published, Values
from cfvlm_ds.evaluation.benchmarks.metrics import QUAD_CHANCE, quads, sliced, tag
from cfvlm_ds.evaluation.benchmarks.source import Row, Source, each, text
from cfvlm_ds.evaluation.benchmarks.winoground import quad

FILE = File("data/test-*.parquet", 2084, lines="test.jsonl")
SOURCE = "arXiv 2407.16772"


def items(source: Source) -> Iterator[Item | DataError]:
    def item(where: str, row: Row) -> Item:
        return quad(
            where.rpartition(":")[2],
            tuple(source.picture(where, row[key], "", "images") for key in ("image_0", "image_1")),
            (text(where, row, "text_0"), text(where, row, "text_1")),
            {"category": text(where, row, "category")},
            str(row["image_0"]),
        )

    yield from each(source.rows(FILE.name, ("image_0", "text_0", "image_1", "text_1", "category"), FILE.lines), item)


def metrics(table: Sequence[Judged]) -> Values:
    """The authors report categories; their mean is ``group_macro``, beside the mean over items."""
    found = sliced(table, tag("category"), quads)
    for name in ("text", "image", "group"):
        if parts := [value for key, value in found.items() if key.startswith(f"{name}/")]:
            found[f"{name}_macro"] = sum(parts) / len(parts)
    return found


VISMIN = Benchmark(
    title="VisMin",
    files=(FILE,),
    licence="see the card on the hub",
    items=items,
    metrics=metrics,
    headline="group_macro",
    probes=("match", "caption", "letters"),
    chance=QUAD_CHANCE | {f"{name}_macro": QUAD_CHANCE[name] for name in ("text", "image", "group")},
    published=(
        Published("group/object", "LLaVA-1.6-7B", 32.2, SOURCE),
        Published("group/attribute", "LLaVA-1.6-7B", 33.3, SOURCE),
        Published("group/relation", "LLaVA-1.6-7B", 7.4, SOURCE),
        Published("group/counting", "LLaVA-1.6-7B", 20.2, SOURCE),
    ),
    traps=("the authors ask large models four questions, two of them of both pictures at once; here all four cells are scored",),
    unofficial="one score per cell in place of the authors' questions of both pictures",
)
