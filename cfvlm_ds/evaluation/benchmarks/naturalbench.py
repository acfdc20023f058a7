"""NaturalBench (Li et al. 2024, arXiv 2410.14669): two pictures and two questions; the answer to each question differs between the
pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from cfvlm_ds.evaluation.benchmarks.base import YES_NO, Benchmark, File, Item, Judged, Row, Values
from cfvlm_ds.evaluation.benchmarks.metrics import accuracy, all_right, mean, sets, tag, text_right, together

KINDS = {
    "yes_no": (YES_NO, " Please answer Yes or No."),
    "multiple_choice": (("A", "B"), " Please output the letter corresponding to the correct option."),
}


def items(row: Row) -> list[Item]:
    """Return two items, one per question, each with both pictures."""
    kind, group = row["Question_Type"], str(row["Index"])
    if kind not in KINDS:
        raise row.error(f"'Question_Type' must be {' or '.join(KINDS)}, not {kind!r}")
    answers, ask = KINDS[kind]
    images = tuple((row.picture(row[f"Image_{i}"], "", "images"),) for i in (0, 1))
    return [
        Item(
            f"{group}/{q}",
            images,
            answers,
            tuple(row.truth(f"Image_{i}_Question_{q}", answers) for i in (0, 1)),
            row.text(f"Question_{q}") + ask,
            listed=kind == "multiple_choice",
            tags={"group": group, "type": kind},
            cluster=group,
        )
        for q in (0, 1)
    ]


def metrics(table: Sequence[Judged]) -> Values:
    """Return accuracy, the share of correct answers; q_acc, the share of questions answered correctly on both pictures; i_acc, the share of
    pictures with both questions answered correctly; and g_acc, the share of groups with all answers correct.
    """
    if not table:
        return {}
    groups = sets(table, tag("group"))
    pictures = [(len(both) == 2) * prod(text_right(question, image) for question in both) for both in groups for image in (0, 1)]
    values = accuracy(table) | {"q_acc": mean([all_right(question) for question in table]), "i_acc": mean(pictures)}
    return values | {"g_acc": together(table, tag("group")) or 0.0}


NATURALBENCH = Benchmark(
    title="NaturalBench",
    files=(File("data/train-*.parquet", rows=1900, lines="train.jsonl"),),
    item=items,
    metrics=metrics,
    headline="g_acc",
    probes=("yes_no", "generate"),
)
