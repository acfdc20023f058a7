"""ConMe (Huang et al. 2024, arXiv 2406.08164): questions on details of a picture with two options, the false one hard for models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Judged, Published, Values, one_hot
from cfvlm_ds.evaluation.benchmarks.metrics import accuracy, macro, tag
from cfvlm_ds.evaluation.benchmarks.source import Row, Source, each, text

PARTS = ("replace-att", "replace-obj", "replace-rel")
COLUMNS = ("image", "base_question", "correct_option", "incorrect_option")


def items(source: Source) -> Iterator[Item | DataError]:
    for part in PARTS:

        def item(where: str, row: Row, part: str = part) -> Item:
            picture = source.picture(where, _file(row["image"]), "", "images", "../coco/val2017")
            options = text(where, row, "correct_option"), text(where, row, "incorrect_option")
            number = f"{part}/{where.rpartition(':')[2]}"
            asked = text(where, row, "base_question")
            return Item(number, ((picture,),), options, (one_hot(0, 2),), asked, tags={"part": part}, cluster=picture.name)

        yield from each(source.rows(f"{part}.csv", COLUMNS), item)


def _file(name: str) -> str:
    """The file of a picture that is named by its number in COCO, or by a path."""
    return f"{int(name):012d}.jpg" if name.isascii() and name.isdecimal() and len(name) <= 12 else name


def metrics(table: Sequence[Judged]) -> Values:
    """The mean of the three parts, each, and the share of all rows."""
    return macro(table, tag("part")) | accuracy(table)


CONME = Benchmark(
    title="ConMe",
    files=tuple(File(f"{part}.csv") for part in PARTS),
    licence="Apache-2.0; pictures: their sources",
    items=items,
    metrics=metrics,
    headline="macro",
    probes=("letters", "caption", "generate"),
    published=(
        Published("macro", "LLaVA-1.5-7B, baseline of CF-VLM", 61.8, "arXiv 2506.17267"),
        Published("macro", "Qwen-VL-7B, baseline of CF-VLM", 82.6, "arXiv 2506.17267"),
    ),
    traps=(
        "the authors draw the order of the options when they read the files; here letters are asked in both orders",
        "the columns question and answer, which have the options in one order and its letter, are not read",
        "there is also a version that people have filtered: put its three files in place of these, under the same names",
    ),
    unofficial="columns unverified: known from programs of others that read the files, not from the files themselves",
)
