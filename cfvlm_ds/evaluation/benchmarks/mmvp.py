"""MMVP (Tong et al. 2024, arXiv 2401.06209): pairs of pictures that CLIP confuses, with one question and two options per pair."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cfvlm_ds.evaluation.benchmarks.base import Benchmark, Item, Judged, Values, single
from cfvlm_ds.evaluation.benchmarks.metrics import accuracy, tag, together
from cfvlm_ds.evaluation.benchmarks.source import File, Row, one_hot

INDEX = ("Index", "lndex")  # the released file spells it with a lower-case L
_OPTIONS = re.compile(r"\s*\(a\)(?P<a>.+?)\(b\)(?P<b>.+)", re.DOTALL)


def item(row: Row) -> Item:
    index = next((str(row[key]) for key in INDEX if key in row.values), "")
    if not index.isdecimal() or not int(index):
        raise row.error(f"column 'Index' must be a number from 1, not {index!r}")
    options = _OPTIONS.fullmatch(row.text("Options"))
    answer = row.text("Correct Answer").lower()
    if options is None or answer not in ("(a)", "(b)"):
        raise row.error("'Options' must be (a) ... (b) ... and 'Correct Answer' one of them")
    number, pair = int(index), str((int(index) + 1) // 2)
    picture = row.picture(f"{number}.jpg", "MMVP Images")
    texts = options["a"].strip(), options["b"].strip()
    return single(str(number), picture, texts, pair, one_hot("ab".index(answer[1]), 2), row.text("Question"), pair=pair)


def metrics(table: Sequence[Judged]) -> Values:
    """Return the share of pairs with both answers correct, and the accuracy on individual questions."""
    value = together(table, tag("pair"))
    return {} if value is None else {"pair": value} | accuracy(table)


MMVP = Benchmark(
    title="MMVP",
    files=(File("Questions.csv", rows=300),),
    item=item,
    metrics=metrics,
    headline="pair",
    probes=("letters", "yes_no", "generate"),
    unofficial="letters in both orders instead of free answers and a judge",
)
