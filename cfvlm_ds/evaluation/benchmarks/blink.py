"""BLINK (Fu et al. 2024, arXiv 2404.12390), validation: fourteen tasks of perception, one to four pictures, multiple choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Judged, Published, Values, one_hot
from cfvlm_ds.evaluation.benchmarks.metrics import accuracy, macro, tag
from cfvlm_ds.evaluation.benchmarks.source import Row, Source, choice, each, text

TASKS = (
    "Art_Style", "Counting", "Forensic_Detection", "Functional_Correspondence", "IQ_Test", "Jigsaw", "Multi-view_Reasoning",
    "Object_Localization", "Relative_Depth", "Relative_Reflectance", "Semantic_Correspondence", "Spatial_Relation",
    "Visual_Correspondence", "Visual_Similarity",
)  # fmt: skip
PICTURES = tuple(f"image_{number}" for number in range(1, 5))
TOTAL = 1901


def items(source: Source) -> Iterator[Item | DataError]:
    for task in TASKS:

        def item(where: str, row: Row, task: str = task) -> Item:
            named = [row[name] for name in PICTURES if row.get(name) is not None]
            shown = tuple(source.picture(where, name, task, f"{task}/images", "images", "") for name in named)
            letters = tuple(chr(65 + place) for place in range(len(row["choices"])))
            gold = (one_hot(choice(where, row, "answer", [f"({letter})" for letter in letters]), len(letters)),)
            number = str(row["idx"])
            return Item(number, (shown,), letters, gold, text(where, row, "prompt"), listed=True, tags={"task": task}, cluster=number)

        yield from each(source.rows(f"{task}/val-*.parquet", ("idx", "prompt", "choices", "answer", "image_1"), f"{task}/val.jsonl"), item)
    if (found := sum(source.counts.values())) != TOTAL:
        source.notes.append(f"the files have {found} rows together, and the official ones {TOTAL}: another revision")


def metrics(table: Sequence[Judged]) -> Values:
    return macro(table, tag("task")) | accuracy(table)


BLINK = Benchmark(
    title="BLINK (validation)",
    files=tuple(File(f"{task}/val-*.parquet", lines=f"{task}/val.jsonl") for task in TASKS),
    licence="Apache-2.0",
    items=items,
    metrics=metrics,
    headline="macro",
    probes=("yes_no", "generate"),
    published=(Published("macro", "LLaVA-1.5-7B", 37.1, "arXiv 2404.12390"), Published("macro", "random choice", 38.1, "arXiv 2404.12390")),
    traps=(
        "the answers of the test split are not public",
        "a model that takes one picture cannot be asked most tasks",
        "some evaluators read the T of 'The answer is B' as a letter: generated answers are parsed strictly",
    ),
)
