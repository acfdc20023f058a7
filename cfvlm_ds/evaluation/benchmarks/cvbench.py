"""CV-Bench (Tong et al. 2024, arXiv 2406.16860): counting and relations in 2D, depth and distance in 3D, as multiple choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Judged, Published, Values, one_hot
from cfvlm_ds.evaluation.benchmarks.metrics import accuracy, grouped, tag
from cfvlm_ds.evaluation.benchmarks.source import Row, Source, choice, each, text

FILES = ("test_2d.jsonl", "test_3d.jsonl")
COLUMNS = ("task", "question", "choices", "answer", "filename", "source")
TOTAL = 2638


def items(source: Source) -> Iterator[Item | DataError]:
    for name in FILES:

        def item(where: str, row: Row, name: str = name) -> Item:
            picture = source.picture(where, row["filename"], "", "img")
            options = tuple(str(option) for option in row["choices"])
            gold = (one_hot(choice(where, row, "answer", [f"({chr(65 + place)})" for place in range(len(options))]), len(options)),)
            marks = {"source": text(where, row, "source"), "task": text(where, row, "task")}
            number = f"{name.removesuffix('.jsonl').removeprefix('test_')}/{where.rpartition(':')[2]}"
            return Item(number, ((picture,),), options, gold, text(where, row, "question"), tags=marks, cluster=str(row["filename"]))

        yield from each(source.rows(name, COLUMNS), item)
    if (found := sum(source.counts.values())) != TOTAL:
        source.notes.append(f"the files have {found} rows together, and the official ones {TOTAL}: another revision")


def metrics(table: Sequence[Judged]) -> Values:
    """The authors' mean, 1/2 (1/2 (ADE20K + COCO) + Omni3D), the parts, and the plain share, which some report."""
    found = {f"source/{name}": accuracy(part)["accuracy"] for name, part in grouped(table, tag("source")).items()}
    found |= {f"task/{name}": accuracy(part)["accuracy"] for name, part in grouped(table, tag("task")).items()}
    parts = [found.get(f"source/{name}") for name in ("ADE20K", "COCO", "Omni3D")]
    ade, coco, omni = parts
    if ade is not None and coco is not None and omni is not None:
        found["cv_bench"] = ((ade + coco) / 2 + omni) / 2
    return found | accuracy(table)


CVBENCH = Benchmark(
    title="CV-Bench",
    files=tuple(File(name) for name in FILES),
    licence="Apache-2.0; pictures: ADE20K, COCO, Omni3D",
    items=items,
    metrics=metrics,
    headline="cv_bench",
    probes=("letters", "generate"),
    published=(Published("accuracy", "Qwen2.5-VL-7B (plain share)", 79.95, "in circulation, its source was not established"),),
    traps=("one public evaluator reports the plain share, which the authors' formula is not",),
    unofficial="letters in all orders up to four options, and cyclic ones beyond",
)
