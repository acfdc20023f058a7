"""AMBER (Wang et al. 2023, arXiv 2311.07397): its yes/no questions about existence, attributes and relations."""

from __future__ import annotations

from functools import lru_cache, partial

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.evaluation.benchmarks.base import YES_NO, Benchmark, File, Item, Row, Source, single
from cfvlm_ds.evaluation.benchmarks.metrics import by, yes_no

QUERIES = File("data/query/query_discriminative.json", ("id", "image", "query"), 14_216)
TRUTH = File("data/annotations.json", ("id", "type", "truth"))
ASK = " Please answer Yes or No."


def item(row: Row) -> Item:
    truth, broken = _truth(row.source)
    if (known := truth.get(str(row["id"]))) is None:
        raise broken or row.error(f"id {row['id']!r} is not in {row.source.root / TRUTH.name}", "get both files from the same revision")
    kind = str(known["type"]).removeprefix("discriminative-").split("-")[0]
    return single(
        str(row["id"]),
        row.picture(row["image"], "image", "images"),
        YES_NO,
        str(row["image"]),
        known.truth("truth", YES_NO),
        row.text("query") + ASK,
        type={"hallucination": "existence"}.get(kind, kind),
    )


@lru_cache(1)
def _truth(source: Source) -> tuple[dict[str, Row], DataError | None]:
    """Return the annotations keyed by id, and the first error among them or None."""
    rows = list(source.rows(TRUTH))
    return {str(row["id"]): row for row in rows if isinstance(row, Row)}, next((row for row in rows if isinstance(row, DataError)), None)


AMBER = Benchmark(
    title="AMBER (discriminative)",
    files=(QUERIES, File(TRUTH.name)),
    item=item,
    metrics=by("type", partial(yes_no, positive=1)),  # F1 measures the detection of absent things
    headline="f1",
    probes=("yes_no", "generate"),
    unofficial=f"the instruction {ASK.strip()!r}",
)
