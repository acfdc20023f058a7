"""VALSE (Parcalabescu et al. 2022, arXiv 2112.07566): a caption and a foil of it, for six linguistic phenomena in eleven files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Judged, Values, one_hot
from cfvlm_ds.evaluation.benchmarks.metrics import accuracy, macro, tag
from cfvlm_ds.evaluation.benchmarks.source import Row, Source, each, text

VALID = {
    "existence": 505, "plurals": 851, "counting-hard": 868, "counting-small-quant": 900, "counting-adversarial": 691, "relations": 535,
    "action-replacement": 648, "actant-swap": 949, "coreference-standard": 708, "coreference-hard": 104, "foil-it": 943,
}  # fmt: skip
"""File -> valid rows: those in which two of three annotators chose the caption and not the foil."""
VOTES = 2


def items(source: Source) -> Iterator[Item | DataError]:
    for part, valid in VALID.items():

        def item(where: str, row: Row, part: str = part) -> Item | None:
            votes = row["mturk"]["caption"]
            if isinstance(votes, bool) or not isinstance(votes, int):
                raise DataError(f"{where}: mturk.caption must be a number of votes, not {votes!r}; get the official file again")
            if votes < VOTES:
                return None
            captions = text(where, row, "caption"), text(where, row, "foil")
            name, data_set = text(where, row, "image_file"), text(where, row, "dataset")
            picture = source.picture(where, name, f"images/{data_set}", "images")
            number = where.rpartition("key ")[2].strip("'")
            return Item(f"{part}/{number}", ((picture,),), captions, (one_hot(0, 2),), tags={"part": part}, cluster=f"{data_set}/{name}")

        kept = 0
        for found in each(source.rows(f"data/{part}.json", ("dataset", "image_file", "caption", "foil", "mturk")), item):
            if found is not None:
                kept += not isinstance(found, DataError)
                yield found
        if kept and kept != valid:
            source.notes.append(f"data/{part}.json has {kept} valid rows, and the official file {valid}: another revision")


def metrics(table: Sequence[Judged]) -> Values:
    """Pairwise accuracy (the authors' acc_r) of each file, and the mean of the files."""
    return macro(table, tag("part")) | accuracy(table)


VALSE = Benchmark(
    title="VALSE",
    files=tuple(File(f"data/{part}.json") for part in VALID),
    licence="MIT; pictures: COCO, Visual7W, SWiG, VisDial",
    items=items,
    metrics=metrics,
    headline="macro",
    probes=("match", "caption", "letters"),
    traps=("the files also hold rows that the annotators rejected: only those with two of three votes count",),
)
