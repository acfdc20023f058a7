"""VL-CheckList (Zhao et al. 2022, arXiv 2207.00221): a caption and a copy with an object, attribute or relation replaced."""

from __future__ import annotations

from collections.abc import Sequence

from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Judged, Row, Values, single
from cfvlm_ds.evaluation.benchmarks.metrics import accuracy, macro, means, tag

BRANCHES = ("Attribute", "Object", "Relation")


def item(row: Row) -> Item:
    leaf = row.file.removeprefix("data/").removesuffix(".json")
    folder = next((data_set for data_set in ("swig", "hake") if data_set in leaf), "vg")
    picture, sides = row.picture(row["picture"], folder, f"../{folder}"), [row["texts"][side] for side in ("POS", "NEG")]
    if not all(isinstance(side, list) for side in sides):
        raise row.error("the row must be [picture, {'POS': [text], 'NEG': [text]}]")
    texts = sides[0][0], sides[1][0]
    return single(f"{leaf}/{row.number}", picture, texts, f"{folder}/{row['picture']}", branch=row.part, leaf=leaf)


def metrics(table: Sequence[Judged]) -> Values:
    """Return the accuracy on each file, the mean over the files of each branch (attribute, object, relation), the mean over branches, and
    the accuracy over all items.
    """
    leaves = macro(table, tag("leaf"))
    branches = means(leaves, {f"macro/{branch}": f"macro/{branch}/" for branch in BRANCHES})
    return leaves | means(branches, {"macro": "macro/"}) | branches | accuracy(table)


VL_CHECKLIST = Benchmark(
    title="VL-CheckList",
    files=tuple(File(f"data/{branch}/**/*.json", ("picture", "texts"), part=branch) for branch in BRANCHES),
    item=item,
    metrics=metrics,
    headline="macro",
    probes=("match", "caption", "letters"),
    unofficial="all rows of a file instead of at most 2,000",
)
