"""VL-CheckList (Zhao et al. 2022, arXiv 2207.00221): a caption and one with its object, attribute or relation exchanged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Judged, Values, one_hot
from cfvlm_ds.evaluation.benchmarks.metrics import accuracy, macro, tag
from cfvlm_ds.evaluation.benchmarks.source import Row, Source, each

BRANCHES = ("Attribute", "Object", "Relation")


def items(source: Source) -> Iterator[Item | DataError]:
    for branch in BRANCHES:
        names = sorted(path.relative_to(source.root).as_posix() for path in (source.root / "data" / branch).rglob("*.json"))
        if not names:
            yield DataError(f"{source.root / 'data' / branch}: no .json file; docs/benchmarks says where the files are and belong")
        for name in names:
            leaf = name.removeprefix("data/").removesuffix(".json")
            folder = next((data_set for data_set in ("swig", "hake") if data_set in leaf), "vg")

            def item(where: str, row: Row, branch: str = branch, leaf: str = leaf, folder: str = folder) -> Item:
                picture = source.picture(where, row["picture"], folder, f"../{folder}")
                texts = row["true"][0], row["false"][0]
                number = where.rpartition("item ")[2]
                tags = {"branch": branch, "leaf": leaf}
                return Item(f"{leaf}/{number}", ((picture,),), texts, (one_hot(0, 2),), tags=tags, cluster=f"{folder}/{row['picture']}")

            yield from each(_pairs(source, name), item)


def _pairs(source: Source, name: str) -> Iterator[tuple[str, Row | DataError]]:
    for where, row in source.values(name):
        if isinstance(row, DataError):
            yield where, row
            continue
        sides = row[1] if isinstance(row, list) and len(row) == 2 and isinstance(row[1], dict) else {}
        true, false = sides.get("POS"), sides.get("NEG")
        if isinstance(true, list) and isinstance(false, list) and true and false:
            yield where, {"picture": row[0], "true": true, "false": false}
        else:
            yield where, DataError(f'{where}: the row must be [picture, {{"POS": [text], "NEG": [text]}}]; get the official file again')


def metrics(table: Sequence[Judged]) -> Values:
    """Each file, the mean of the files of each branch, and the mean of the branches."""
    leaves = macro(table, tag("leaf"))
    found: Values = {}
    for branch in BRANCHES:
        if parts := [value for name, value in leaves.items() if name.startswith(f"macro/{branch}/")]:
            found[f"macro/{branch}"] = sum(parts) / len(parts)
    if not found:
        return {}
    return leaves | {"macro": sum(found.values()) / len(found)} | found | accuracy(table)


VL_CHECKLIST = Benchmark(
    title="VL-CheckList",
    files=tuple(File(f"data/{branch}/*") for branch in BRANCHES),
    licence="none stated for the files, paper CC-BY-4.0; pictures: Visual Genome, SWiG, HAKE",
    items=items,
    metrics=metrics,
    headline="macro",
    probes=("match", "caption", "letters"),
    traps=(
        "rows repeat",
        "in 124 rows both captions are equal: the tie counts as wrong",
        "the authors' configurations take at most 2,000 rows of a file; here all of them count",
    ),
    unofficial="all rows of a file in place of at most 2,000",
)
