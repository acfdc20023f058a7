"""SugarCrepe++ (Dumpala et al. 2024, arXiv 2406.11171): two true captions in different words, and a false one that resembles the first."""

from __future__ import annotations

from cfvlm_ds.evaluation.benchmarks.base import Benchmark, Item
from cfvlm_ds.evaluation.benchmarks.metrics import macro_by
from cfvlm_ds.evaluation.benchmarks.source import File, Row
from cfvlm_ds.evaluation.benchmarks.sugarcrepe import COCO

SUBSETS = ("replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
CAPTIONS = ("caption", "caption2", "negative_caption")


def item(row: Row) -> Item:
    captions = tuple(row.text(column) for column in CAPTIONS)
    picture, tags = row.picture(row["filename"], *COCO), {"subset": row.part}
    return Item(f"{row.part}/{row['id']}", ((picture,),), captions, ((1, 1, 0),), tags=tags, cluster=str(row["filename"]))


SUGARCREPE_PP = Benchmark(
    title="SugarCrepe++",
    files=tuple(File(f"data/{subset}.json", ("id", "filename", *CAPTIONS), part=subset) for subset in SUBSETS),
    item=item,
    metrics=macro_by("subset"),
    headline="macro",
    probes=("match", "caption"),
    total=4757,
)
