"""SugarCrepe++ (Dumpala et al. 2024, arXiv 2406.11171): two differently worded true captions, and a false one that resembles the first."""

from __future__ import annotations

from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Row, single
from cfvlm_ds.evaluation.benchmarks.metrics import macro_by
from cfvlm_ds.evaluation.benchmarks.sugarcrepe import COCO

SUBSETS = ("replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
CAPTIONS = ("caption", "caption2", "negative_caption")


def item(row: Row) -> Item:
    captions, picture = [row.text(column) for column in CAPTIONS], row.picture(row["filename"], *COCO)
    return single(f"{row.part}/{row['id']}", picture, captions, str(row["filename"]), (1, 1, 0), subset=row.part)


SUGARCREPE_PP = Benchmark(
    title="SugarCrepe++",
    files=tuple(File(f"data/{subset}.json", part=subset) for subset in SUBSETS),
    item=item,
    metrics=macro_by("subset"),
    headline="macro",
    probes=("match", "caption"),
    total=4757,
)
