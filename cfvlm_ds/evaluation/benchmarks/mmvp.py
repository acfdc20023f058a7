"""MMVP (Tong et al. 2024, arXiv 2401.06209): pairs of pictures that CLIP takes for the same, one question with two options on both."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Judged, Published, Values, one_hot
from cfvlm_ds.evaluation.benchmarks.metrics import accuracy, tag, together
from cfvlm_ds.evaluation.benchmarks.source import Row, Source, each, text

INDEX = ("Index", "lndex")  # the second with a small L: as the released file has it
_OPTIONS = re.compile(r"\s*\(a\)(?P<a>.+?)\(b\)(?P<b>.+)", re.DOTALL)


def items(source: Source) -> Iterator[Item | DataError]:
    def item(where: str, row: Row) -> Item:
        name = next((key for key in INDEX if key in row), "")
        if not name or not str(row[name]).isdecimal() or not int(row[name]):
            raise DataError(f"{where}: column 'Index' must be a number from 1, not {row.get(name)!r}; get the official file again")
        number = int(row[name])
        options = _OPTIONS.fullmatch(text(where, row, "Options"))
        answer = text(where, row, "Correct Answer").lower()
        if options is None or answer not in ("(a)", "(b)"):
            raise DataError(f"{where}: 'Options' must be (a) ... (b) ... and 'Correct Answer' one of them; get the official file again")
        picture = source.picture(where, f"{number}.jpg", "MMVP Images")
        pair = str((number + 1) // 2)
        texts = options["a"].strip(), options["b"].strip()
        gold = (one_hot("ab".index(answer[1]), 2),)
        return Item(str(number), ((picture,),), texts, gold, text(where, row, "Question"), tags={"pair": pair}, cluster=pair)

    yield from each(source.rows("Questions.csv", ("Question", "Options", "Correct Answer")), item)


def metrics(table: Sequence[Judged]) -> Values:
    """Share of pairs with both questions right, and of single questions."""
    value = together(table, tag("pair"))
    return {} if value is None else {"pair": value} | accuracy(table)


MMVP = Benchmark(
    title="MMVP",
    files=(File("Questions.csv", 300),),
    licence="MIT (from memory, not checked)",
    items=items,
    metrics=metrics,
    headline="pair",
    probes=("letters", "yes_no", "generate"),
    published=(
        Published("pair", "human", 95.7, "arXiv 2401.06209"),
        Published("pair", "GPT-4V", 38.7, "arXiv 2401.06209"),
        Published("pair", "LLaVA-1.5", 24.7, "arXiv 2401.06209"),
    ),
    traps=(
        "two pairs are swapped in the released file (99/100 and 279/280): nothing is repaired here, other evaluators may",
        "a copy on the hub has changed four answers",
        "the authors judge free answers by GPT-4; here letters are scored in both orders",
    ),
    unofficial="letters in both orders in place of free answers with a judge",
)
