"""Visual CounterFact (Golovanevsky et al. 2025, arXiv 2505.17127): a picture of a familiar object, and the same picture
with the object's colour or size changed.
"""

from __future__ import annotations

from cfvlm_ds.data.fields import as_list
from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Row
from cfvlm_ds.evaluation.benchmarks.metrics import QUAD_RANDOM, by, quads


def item(row: Row) -> Item:
    usual, changed = _answers(row, "correct_answer"), _answers(row, "incorrect_answer")
    texts = tuple(dict.fromkeys([*usual, *changed]))
    images = tuple((row.picture(row[key], "", "images"),) for key in ("original_image", "counterfact_image"))
    match = tuple(tuple(int(text in true) for text in texts) for true in (usual, changed))
    if row.part == "color":
        question = f"Answer with one word. What color is this {row.text('object')}?"
    else:
        first, second = sorted((usual[0], changed[0]))
        question = f"Answer with the correct option. Which is larger here, {first} or {second}?"
    return Item(f"{row.part}/{row.number}", images, texts, match, question, tags={"part": row.part}, cluster=str(row["object"]))


def _answers(row: Row, column: str) -> list[str]:
    """Return the answers in a column as a list. The column holds a text, a list or, in one revision of the files, a Python literal."""
    value = as_list(row[column])
    answers = [value] if isinstance(value, str) else value
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise row.error(f"{column!r} must be a text or a list of texts")
    return [answer.strip() for answer in answers]


VISUAL_COUNTERFACT = Benchmark(
    title="Visual CounterFact",
    files=(
        File("data/color-*.parquet", rows=493, lines="color.jsonl", part="color"),
        File("data/size-*.parquet", rows=727, lines="size.jsonl", part="size"),
    ),
    item=item,
    metrics=by("part", quads),
    headline="text",  # a model that answers from memory is right only on the first picture, so it scores 0
    probes=("caption", "generate"),
    random=QUAD_RANDOM,
    unofficial="the order of the objects in the questions about size",
)
