"""CV-Bench (Tong et al. 2024, arXiv 2406.16860): questions about counting and relations (2D), and about depth and distance (3D)."""

from __future__ import annotations

from collections.abc import Sequence

from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Judged, Row, Values, single
from cfvlm_ds.evaluation.benchmarks.metrics import accuracy, grouped, tag


def item(row: Row) -> Item:
    options = tuple(str(option) for option in row["choices"])
    return single(
        f"{row.part}/{row.number}",
        row.picture(row["filename"], "", "img"),
        options,
        str(row["filename"]),
        row.truth("answer", [f"({chr(65 + place)})" for place in range(len(options))]),
        row.text("question"),
        source=row.text("source"),
        task=row.text("task"),
    )


def metrics(table: Sequence[Judged]) -> Values:
    """Return the authors' mean 1/2 (1/2 (ADE20K + COCO) + Omni3D), the accuracies by source and task, and the accuracy over all items."""
    values = {f"source/{name}": accuracy(part)["accuracy"] for name, part in grouped(table, tag("source")).items()}
    values |= {f"task/{name}": accuracy(part)["accuracy"] for name, part in grouped(table, tag("task")).items()}
    parts = [values.get(f"source/{name}") for name in ("ADE20K", "COCO", "Omni3D")]
    ade, coco, omni = parts
    if ade is not None and coco is not None and omni is not None:
        values["cv_bench"] = ((ade + coco) / 2 + omni) / 2
    return values | accuracy(table)


CVBENCH = Benchmark(
    title="CV-Bench",
    files=tuple(File(f"test_{part}.jsonl", part=part) for part in ("2d", "3d")),
    item=item,
    metrics=metrics,
    headline="cv_bench",
    probes=("letters", "generate"),
    total=2638,
    unofficial="letters in all orders for up to four options, in cyclic orders for more",
)
