"""MMStar (Chen et al. 2024, arXiv 2403.20330): 1,500 questions in six skills, chosen so that the picture is needed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Judged, Published, Values, one_hot
from cfvlm_ds.evaluation.benchmarks.metrics import accuracy, macro, tag
from cfvlm_ds.evaluation.benchmarks.source import Row, Source, choice, each, text

FILE = File("mmstar.parquet", 1500, lines="mmstar.jsonl")
ASK = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCD"


def items(source: Source) -> Iterator[Item | DataError]:
    def item(where: str, row: Row) -> Item:
        question = text(where, row, "question")
        options = tuple(letter for letter in LETTERS if re.search(rf"\b{letter}\s*[:.)]", question))
        if options != tuple(LETTERS[: len(options)]) or len(options) < 2:
            options = tuple(LETTERS)
        gold = (one_hot(choice(where, row, "answer", options), len(options)),)
        picture = source.picture(where, row["image"], "", "images")
        marks = {"category": text(where, row, "category")}
        return Item(str(row["index"]), ((picture,),), options, gold, question + ASK, listed=True, tags=marks, cluster=str(row["image"]))

    yield from each(source.rows(FILE.name, ("index", "question", "image", "answer", "category"), FILE.lines), item)


def metrics(table: Sequence[Judged]) -> Values:
    return macro(table, tag("category")) | accuracy(table)


MMSTAR = Benchmark(
    title="MMStar",
    files=(FILE,),
    licence="none stated on the card",
    items=items,
    metrics=metrics,
    headline="macro",
    probes=("yes_no", "generate"),
    published=(Published("macro", "Qwen2.5-VL-7B", 62.5, "in circulation, its source was not established"),),
    traps=(
        "the authors ask for runs without the picture beside every score: that is the blind row",
        "the question contains its options, so that their order is as released",
        "reruns of published values differ by 14 points in an issue of a public evaluator (901 of lmms-eval)",
    ),
)
