"""VSR (Liu et al. 2023, arXiv 2205.00363), zero-shot split: is this sentence about where things are true of the picture?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.evaluation.benchmarks.base import YES_NO, Benchmark, File, Item, Judged, Published, Values, one_hot
from cfvlm_ds.evaluation.benchmarks.metrics import macro, tag, yes_no
from cfvlm_ds.evaluation.benchmarks.source import Row, Source, choice, each, text

NAME = "data/splits/zeroshot/test.jsonl"
ASK = 'Is this sentence true of the picture: "{}" Please answer Yes or No.'


def items(source: Source) -> Iterator[Item | DataError]:
    def item(where: str, row: Row) -> Item:
        picture = source.picture(where, row["image"], "data/images", "images", "../coco/train2017", "../coco/val2017")
        gold = (one_hot(choice(where, row, "label", (1, 0)), 2),)
        asked = ASK.format(text(where, row, "caption"))
        marks = {"relation": text(where, row, "relation")}
        return Item(where.rpartition(":")[2], ((picture,),), YES_NO, gold, asked, tags=marks, cluster=str(row["image"]))

    yield from each(source.rows(NAME, ("image", "caption", "label", "relation")), item)


def metrics(table: Sequence[Judged]) -> Values:
    """Accuracy, and its mean over relations."""
    found = macro(table, tag("relation"))
    return yes_no(table) | ({"macro": found["macro"]} if found else {})


VSR = Benchmark(
    title="VSR (zero-shot)",
    files=(File(NAME, 1222),),
    licence="Apache-2.0; pictures: COCO",
    items=items,
    metrics=metrics,
    headline="accuracy",
    probes=("yes_no", "generate"),
    published=(Published("accuracy", "human", 95.4, "arXiv 2205.00363"),),
    traps=("VSR's training pictures are also SugarCrepe's (71), POPE's (33) and COCO-Order's (202)",),
    unofficial="the question: the authors train classifiers, and state none",
)
