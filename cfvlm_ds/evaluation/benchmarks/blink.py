"""BLINK (Fu et al. 2024, arXiv 2404.12390), validation set: fourteen multiple-choice perception tasks, with one to four pictures per
question.
"""

from __future__ import annotations

from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Row
from cfvlm_ds.evaluation.benchmarks.metrics import macro_by

TASKS = (
    "Art_Style", "Counting", "Forensic_Detection", "Functional_Correspondence", "IQ_Test", "Jigsaw", "Multi-view_Reasoning",
    "Object_Localization", "Relative_Depth", "Relative_Reflectance", "Semantic_Correspondence", "Spatial_Relation",
    "Visual_Correspondence", "Visual_Similarity",
)  # fmt: skip


def item(row: Row) -> Item:
    names = [row["image_1"], *(row.values.get(f"image_{number}") for number in range(2, 5))]
    pictures = tuple(row.picture(name, row.part, f"{row.part}/images", "images", "") for name in names if name is not None)
    letters = tuple(chr(65 + place) for place in range(len(row["choices"])))
    gold = row.truth("answer", [f"({letter})" for letter in letters])
    number = str(row["idx"])
    return Item(number, (pictures,), letters, (gold,), row.text("prompt"), listed=True, tags={"task": row.part}, cluster=number)


BLINK = Benchmark(
    title="BLINK (validation)",
    files=tuple(File(f"{task}/val-*.parquet", lines=f"{task}/val.jsonl", part=task) for task in TASKS),
    item=item,
    metrics=macro_by("task"),
    headline="macro",
    probes=("yes_no", "generate"),
    total=1901,
)
