"""VALSE (Parcalabescu et al. 2022, arXiv 2112.07566): a caption and its foil for six linguistic phenomena, in eleven files."""

from __future__ import annotations

from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Row, single
from cfvlm_ds.evaluation.benchmarks.metrics import macro_by

VALID = {
    "existence": 505, "plurals": 851, "counting-hard": 868, "counting-small-quant": 900, "counting-adversarial": 691, "relations": 535,
    "action-replacement": 648, "actant-swap": 949, "coreference-standard": 708, "coreference-hard": 104, "foil-it": 943,
}  # fmt: skip
"""File -> number of valid rows, in which at least two of three annotators preferred the caption to the foil."""
VOTES = 2


def item(row: Row) -> Item | None:
    votes = row["mturk"]["caption"]
    if isinstance(votes, bool) or not isinstance(votes, int):
        raise row.error(f"mturk.caption must be a number of votes, not {votes!r}")
    if votes < VOTES:
        return None
    name, data_set = row.text("image_file"), row.text("dataset")
    picture = row.picture(name, f"images/{data_set}", "images")
    captions = row.text("caption"), row.text("foil")
    return single(f"{row.part}/{row.number}", picture, captions, f"{data_set}/{name}", part=row.part)


VALSE = Benchmark(
    title="VALSE",
    files=tuple(File(f"data/{part}.json", rows=valid, part=part) for part, valid in VALID.items()),
    item=item,
    metrics=macro_by("part"),
    headline="macro",
    probes=("match", "caption", "letters"),
)
