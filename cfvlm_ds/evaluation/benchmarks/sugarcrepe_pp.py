"""SugarCrepe++ (Dumpala et al. 2024, arXiv 2406.11171): two true captions of different words and one false one, close to the first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Judged, Values
from cfvlm_ds.evaluation.benchmarks.metrics import accuracy, macro, tag
from cfvlm_ds.evaluation.benchmarks.source import Row, Source, each, text
from cfvlm_ds.evaluation.benchmarks.sugarcrepe import COCO

SUBSETS = ("replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
TOTAL = 4757


def items(source: Source) -> Iterator[Item | DataError]:
    for subset in SUBSETS:

        def item(where: str, row: Row, subset: str = subset) -> Item:
            captions = tuple(text(where, row, key) for key in ("caption", "caption2", "negative_caption"))
            picture = source.picture(where, row["filename"], *COCO)
            return Item(
                f"{subset}/{row['id']}", ((picture,),), captions, ((1, 1, 0),), tags={"subset": subset}, cluster=str(row["filename"])
            )

        yield from each(source.rows(f"data/{subset}.json", ("id", "filename", "caption", "caption2", "negative_caption")), item)
    if (found := sum(source.counts.values())) != TOTAL:
        source.notes.append(f"the files have {found} rows together, and the official ones {TOTAL}: another revision")


def metrics(table: Sequence[Judged]) -> Values:
    """The image-to-text task: both true captions beat the false one."""
    return macro(table, tag("subset")) | accuracy(table)


SUGARCREPE_PP = Benchmark(
    title="SugarCrepe++",
    files=tuple(File(f"data/{subset}.json") for subset in SUBSETS),
    licence="CC-BY-4.0 by its read-me, MIT by its licence file; pictures: COCO",
    items=items,
    metrics=metrics,
    headline="macro",
    probes=("match", "caption"),
    traps=(
        "chance is one in three: both of two true captions must win",
        "in four rows the two true captions are equal: they count as they are",
        "the authors' second task is of texts alone, and is not here",
    ),
)
