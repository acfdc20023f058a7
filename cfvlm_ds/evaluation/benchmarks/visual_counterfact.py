"""Visual CounterFact (Golovanevsky et al. 2025, arXiv 2505.17127): a thing as it usually is, and the same picture with it changed."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Judged, Values
from cfvlm_ds.evaluation.benchmarks.metrics import QUAD_CHANCE, quads, sliced, tag
from cfvlm_ds.evaluation.benchmarks.source import Row, Source, each, text

FILES = {
    "color": File("data/color-*.parquet", 493, lines="color.jsonl"),
    "size": File("data/size-*.parquet", 727, lines="size.jsonl"),
}
COLUMNS = ("object", "correct_answer", "incorrect_answer", "original_image", "counterfact_image")


def items(source: Source) -> Iterator[Item | DataError]:
    for part, file in FILES.items():

        def item(where: str, row: Row, part: str = part) -> Item:
            usual, changed = (_answers(where, row, key) for key in ("correct_answer", "incorrect_answer"))
            texts = tuple(dict.fromkeys([*usual, *changed]))
            images = tuple((source.picture(where, row[key], "", "images"),) for key in ("original_image", "counterfact_image"))
            match = tuple(tuple(int(each in true) for each in texts) for true in (usual, changed))
            if part == "color":
                asked = f"Answer with one word. What color is this {text(where, row, 'object')}?"
            else:
                first, second = sorted((usual[0], changed[0]))
                asked = f"Answer with the correct option. Which is larger here, {first} or {second}?"
            number = f"{part}/{where.rpartition(':')[2]}"
            return Item(number, images, texts, match, asked, tags={"part": part}, cluster=str(row["object"]))

        yield from each(source.rows(file.name, COLUMNS, file.lines), item)


def _answers(where: str, row: Row, key: str) -> list[str]:
    """A text, or several in the form of a Python list, as one revision of the files has them."""
    value = text(where, row, key) if isinstance(row[key], str) else row[key]
    if isinstance(value, str) and value.startswith("[") and len(value) < 10_000:
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise DataError(f"{where}: {key!r} is no list of texts ({error}); get the official file again") from error
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not found or not all(isinstance(each, str) and each.strip() for each in found):
        raise DataError(f"{where}: {key!r} must be a text or a list of texts; get the official file again")
    return [each.strip() for each in found]


def metrics(table: Sequence[Judged]) -> Values:
    """Text: each picture has its answer. A model that answers from memory has the first picture alone, and no text score."""
    return sliced(table, tag("part"), quads)


VISUAL_COUNTERFACT = Benchmark(
    title="Visual CounterFact",
    files=tuple(FILES.values()),
    licence="none stated on the card",
    items=items,
    metrics=metrics,
    headline="text",
    probes=("caption", "generate"),
    chance=QUAD_CHANCE,
    traps=(
        "answers are texts in one revision and lists written as texts in another",
        "the authors draw the order of the two objects at random; here it is alphabetical, the same for both pictures",
    ),
    unofficial="the order of objects in the question of size",
)
