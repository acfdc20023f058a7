"""HallusionBench (Guan et al. 2024, arXiv 2310.14566): yes/no questions on figures, charts and edited pictures, some without a picture."""

from __future__ import annotations

from collections.abc import Sequence

from cfvlm_ds.evaluation.benchmarks.base import YES_NO, Benchmark, Item, Judged, Values
from cfvlm_ds.evaluation.benchmarks.metrics import accuracy, tag, together
from cfvlm_ds.evaluation.benchmarks.source import File, Row

KEY = ("category", "subcategory", "set_id", "figure_id", "question_id")
ASK = " Please answer yes or no."
WITHOUT = "0"


def item(row: Row) -> Item:
    category, subcategory, number, figure, _ = key = tuple(str(row[name]) for name in KEY)
    pictured = str(row["visual_input"]) != WITHOUT
    pictures = (row.picture(f"{category}/{subcategory}/{number}_{figure}.png", "hallusion_bench", ""),) if pictured else ()
    return Item(
        "_".join(key),
        (pictures,),
        YES_NO,
        (row.truth("gt_answer", ("1", "0") if isinstance(row["gt_answer"], str) else (1, 0)),),
        row.text("question") + ASK,
        tags=dict(zip(KEY, key, strict=True)) | {"picture": "with" if pictured else "without"},
        cluster=f"{category}_{subcategory}_{number}",
    )


def metrics(table: Sequence[Judged]) -> Values:
    """aAcc of questions; qAcc of questions right on all figures of their set; fAcc of figures with all questions right.

    Of all rows, the authors' own, and as ``NAME_pictures`` of those with a picture, whose mean is what leaderboards show. Sets and figures
    are told apart by category and subcategory: VD and VS have an ``ocr`` each, with the same numbers.
    """
    found = _three(table, "")
    pictured = _three([each for each in table if each.item.tags["picture"] == "with"], "_pictures")
    if len(pictured) == 3:
        found["mean_pictures"] = sum(pictured.values()) / 3
    return found | pictured


def _three(table: Sequence[Judged], ending: str) -> Values:
    if not table:
        return {}
    figures = [each for each in table if (each.item.tags["category"], each.item.tags["figure_id"]) != ("VS", "0")]
    found = {"aAcc": accuracy(table)["accuracy"], "qAcc": together(table, tag("category", "subcategory", "set_id", "question_id"))}
    found["fAcc"] = together(figures, tag("category", "subcategory", "set_id", "figure_id"))
    return {f"{name}{ending}": value for name, value in found.items() if value is not None}


HALLUSIONBENCH = Benchmark(
    title="HallusionBench",
    files=(File("HallusionBench.json", (*KEY, "visual_input", "question", "gt_answer"), 1129),),
    item=item,
    metrics=metrics,
    headline="mean_pictures",
    probes=("yes_no", "generate"),
    unofficial="yes or no by likelihood in place of GPT-4 as a judge",
)
