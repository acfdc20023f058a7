"""MMStar (Chen et al. 2024, arXiv 2403.20330): 1,500 questions covering six skills, selected so that they cannot be
answered without the picture.
"""

from __future__ import annotations

import re

from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Row, single
from cfvlm_ds.evaluation.benchmarks.metrics import macro_by

ASK = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCD"


def item(row: Row) -> Item:
    question = row.text("question")
    options = tuple(letter for letter in LETTERS if re.search(rf"\b{letter}\s*[:.)]", question))
    if options != tuple(LETTERS[: len(options)]) or len(options) < 2:
        options = tuple(LETTERS)
    picture, truth = row.picture(row["image"], "", "images"), row.truth("answer", options)
    category = row.text("category")
    return single(str(row["index"]), picture, options, str(row["image"]), truth, question + ASK, True, category=category)


MMSTAR = Benchmark(
    title="MMStar",
    files=(File("mmstar.parquet", rows=1500, lines="mmstar.jsonl"),),
    item=item,
    metrics=macro_by("category"),
    headline="macro",
    probes=("yes_no", "generate"),
)
