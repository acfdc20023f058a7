"""AMBER (Wang et al. 2023, arXiv 2311.07397), its yes/no questions: existence, attributes and relations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.evaluation.benchmarks.base import YES_NO, Benchmark, File, Item, Judged, Published, Values, one_hot
from cfvlm_ds.evaluation.benchmarks.metrics import sliced, tag, yes_no
from cfvlm_ds.evaluation.benchmarks.source import Row, Source, choice, each, text

QUERIES, TRUTH = "data/query/query_discriminative.json", "data/annotations.json"
ASK = " Please answer Yes or No."


def items(source: Source) -> Iterator[Item | DataError]:
    truth: dict[str, Row] = {}
    for where, row in source.rows(TRUTH, ("id", "type", "truth")):
        if isinstance(row, DataError):
            yield row
        else:
            truth[str(row["id"])] = row | {"where": where}

    def item(where: str, row: Row) -> Item:
        known = truth.get(str(row["id"]))
        if known is None:
            raise DataError(f"{where}: id {row['id']!r} is not in {source.root / TRUTH}; get both files of one revision")
        gold = (one_hot(choice(known["where"], known, "truth", YES_NO), 2),)
        picture = source.picture(where, row["image"], "image", "images")
        kind = str(known["type"]).removeprefix("discriminative-").split("-")[0]
        marks = {"type": {"hallucination": "existence"}.get(kind, kind)}
        asked = text(where, row, "query") + ASK
        return Item(str(row["id"]), ((picture,),), YES_NO, gold, asked, tags=marks, cluster=str(row["image"]))

    if truth:
        yield from each(source.rows(QUERIES, ("id", "image", "query")), item)


def metrics(table: Sequence[Judged]) -> Values:
    """The positive answer is no: F1 is of finding out what is not there."""
    return sliced(table, tag("type"), lambda part: yes_no(part, positive=1))


AMBER = Benchmark(
    title="AMBER (discriminative)",
    files=(File(QUERIES, 14_216), File(TRUTH)),
    licence="Apache-2.0",
    items=items,
    metrics=metrics,
    headline="f1",
    probes=("yes_no", "generate"),
    published=(
        Published("f1", "LLaVA-1.5", 74.7, "arXiv 2311.07397"),
        Published("accuracy", "LLaVA-1.5", 72.0, "arXiv 2311.07397"),
        Published("f1", "Qwen-VL", 84.9, "arXiv 2311.07397"),
    ),
    traps=(
        "precision, recall and F1 are of the answer no; one public evaluator gives plain accuracy",
        "the authors take exactly Yes or No as an answer and state no instruction: the one here is ours",
        "the generative part (CHAIR, Cover, Hal, Cog) needs text and is not here",
    ),
    unofficial=f"the instruction {ASK.strip()!r}",
)
