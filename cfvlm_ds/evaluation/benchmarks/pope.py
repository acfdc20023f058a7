"""POPE (Li et al. 2023, arXiv 2305.10355): is there such a thing in the picture? Absent things are drawn at random, or are likely ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.evaluation.benchmarks.base import YES_NO, Benchmark, File, Item, Judged, Published, Values, one_hot
from cfvlm_ds.evaluation.benchmarks.metrics import sliced, tag, yes_no
from cfvlm_ds.evaluation.benchmarks.source import Row, Source, choice, each, text

SPLITS = ("random", "popular", "adversarial")
ASK = "\nAnswer the question using a single word or phrase."


def items(source: Source) -> Iterator[Item | DataError]:
    for split in SPLITS:

        def item(where: str, row: Row, split: str = split) -> Item:
            picture = source.picture(where, row["image"], "val2014", "images/val2014", "../coco/val2014")
            gold = (one_hot(choice(where, row, "label", YES_NO), 2),)
            asked = text(where, row, "text") + ASK
            return Item(
                f"{split}/{row['question_id']}", ((picture,),), YES_NO, gold, asked, tags={"split": split}, cluster=str(row["image"])
            )

        yield from each(source.rows(f"output/coco/coco_pope_{split}.json", ("question_id", "image", "text", "label")), item)


def metrics(table: Sequence[Judged]) -> Values:
    """Of all questions, of each split, and the mean of the splits, which papers report."""
    found = sliced(table, tag("split"), yes_no)
    for name in ("f1", "accuracy"):
        if parts := [value for key, value in found.items() if key.startswith(f"{name}/")]:
            found[f"{name}_macro"] = sum(parts) / len(parts)
    return found


POPE = Benchmark(
    title="POPE (COCO)",
    files=tuple(File(f"output/coco/coco_pope_{split}.json", 3000) for split in SPLITS),
    licence="MIT; pictures: COCO",
    items=items,
    metrics=metrics,
    headline="f1_macro",
    probes=("yes_no", "generate"),
    published=(
        Published("f1_macro", "LLaVA-1.5-7B (2,910 random questions)", 85.9, "haotian-liu/LLaVA, MODEL_ZOO"),
        Published("f1_macro", "LLaVA-1.5-13B", 85.9, "haotian-liu/LLaVA, MODEL_ZOO"),
    ),
    traps=(
        "the files are JSON lines though they are named .json",
        "LLaVA's revision has 2,910 random questions in place of 3,000",
        "generate takes the authors' rule: an answer without a no is yes, an empty one too; by likelihood a tie is wrong and not predicted",
        "yes_ratio is of predictions; one public evaluator gives that of the truth",
    ),
)
