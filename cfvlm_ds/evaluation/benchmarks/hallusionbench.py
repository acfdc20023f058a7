"""HallusionBench (Guan et al. 2024, arXiv 2310.14566): yes/no questions about figures, charts and edited pictures; some have no picture."""

from __future__ import annotations

from collections.abc import Sequence

from cfvlm_ds.evaluation.benchmarks.base import YES_NO, Benchmark, File, Item, Judged, Row, Values
from cfvlm_ds.evaluation.benchmarks.metrics import accuracy, tag, together

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
    """Return aAcc, the share of correct answers; qAcc, the share of questions answered correctly on all figures of their set; and fAcc, the
    share of figures with all questions answered correctly.

    As in the authors' code, these metrics cover all rows, except that fAcc excludes figure 0 of VS. Variants with the suffix ``_pictures``
    cover only rows with a picture; leaderboards show the mean of these three. Sets and figures are identified by category, subcategory and
    number, because VD and VS both have a subcategory ``ocr`` with the same numbers.
    """
    values = _three(table, "")
    pictured = _three([judged for judged in table if judged.item.tags["picture"] == "with"], "_pictures")
    if len(pictured) == 3:
        values["mean_pictures"] = sum(pictured.values()) / 3
    return values | pictured


def _three(table: Sequence[Judged], ending: str) -> Values:
    if not table:
        return {}
    figures = [judged for judged in table if (judged.item.tags["category"], judged.item.tags["figure_id"]) != ("VS", "0")]
    values = {"aAcc": accuracy(table)["accuracy"], "qAcc": together(table, tag("category", "subcategory", "set_id", "question_id"))}
    values["fAcc"] = together(figures, tag("category", "subcategory", "set_id", "figure_id"))
    return {f"{name}{ending}": value for name, value in values.items() if value is not None}


HALLUSIONBENCH = Benchmark(
    title="HallusionBench",
    files=(File("HallusionBench.json", rows=1129),),
    item=item,
    metrics=metrics,
    headline="mean_pictures",
    probes=("yes_no", "generate"),
    unofficial="yes or no by likelihood instead of a judgement by GPT-4",
)
