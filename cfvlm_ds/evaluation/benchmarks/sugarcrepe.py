"""SugarCrepe (Hsieh et al. 2023, arXiv 2306.14610): one picture, a true caption and a hard negative one; seven ways of making it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Judged, Published, Values, one_hot
from cfvlm_ds.evaluation.benchmarks.metrics import accuracy, macro, tag
from cfvlm_ds.evaluation.benchmarks.source import Row, Source, each, text

ROWS = {
    "add_att": 692, "add_obj": 2062, "replace_att": 788, "replace_obj": 1652, "replace_rel": 1406, "swap_att": 666, "swap_obj": 245,
}  # fmt: skip
COCO = ("val2017", "images/val2017", "../coco/val2017")


def items(source: Source) -> Iterator[Item | DataError]:
    for subset in ROWS:

        def item(where: str, row: Row, subset: str = subset) -> Item:
            captions = text(where, row, "caption"), text(where, row, "negative_caption")
            picture = source.picture(where, row["filename"], *COCO)
            place = where.rpartition(": ")[2].removeprefix("key ").removeprefix("item ").strip("'")
            return Item(
                f"{subset}/{place}", ((picture,),), captions, (one_hot(0, 2),), tags={"subset": subset}, cluster=str(row["filename"])
            )

        yield from each(source.rows(f"data/{subset}.json", ("filename", "caption", "negative_caption")), item)


def metrics(table: Sequence[Judged]) -> Values:
    """The mean of the subsets, each subset, and the means of the three kinds."""
    found = macro(table, tag("subset"))
    for kind in ("add", "replace", "swap"):
        parts = [value for name, value in found.items() if name.startswith(f"macro/{kind}_")]
        if parts:
            found[f"macro/{kind}"] = sum(parts) / len(parts)
    return found | accuracy(table)


SUGARCREPE = Benchmark(
    title="SugarCrepe",
    files=tuple(File(f"data/{subset}.json", rows) for subset, rows in ROWS.items()),
    licence="MIT (annotations); pictures: COCO, terms of Flickr",
    items=items,
    metrics=metrics,
    headline="macro",
    probes=("match", "caption", "letters", "generate"),
    published=(
        Published("macro/swap_att", "GPT-4V, mean of both orders", 90.1, "RAIVNLab/sugar-crepe, gpt-4v-results"),
        Published("macro/swap_obj", "GPT-4V, mean of both orders", 83.1, "RAIVNLab/sugar-crepe, gpt-4v-results"),
        Published("macro/add_att", "GPT-4V, mean of both orders", 91.8, "RAIVNLab/sugar-crepe, gpt-4v-results"),
        Published("macro/add_obj", "GPT-4V, mean of both orders", 91.6, "RAIVNLab/sugar-crepe, gpt-4v-results"),
        Published("accuracy", "VQAScore, CLIP-FlanT5-XXL", 93.7, "BiVLC, arXiv 2406.09952"),
        Published("accuracy", "human", 98.9, "BiVLC, arXiv 2406.09952"),
    ),
    traps=(
        "language alone finds 94 % of add_obj by summed likelihood and 23 % by its mean per token: read the blind row",
        "the order of options moves GPT-4V by 5 points on swap_obj: letters are asked in both orders",
        "the paper counts 246 rows of swap_obj, the released file has 245",
    ),
)
