"""Items of one or two results to look at: those that are decided worst and best, with their pictures, texts and scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import Pictures
from cfvlm_ds.evaluation.benchmarks import Benchmark, Outcome, load
from cfvlm_ds.evaluation.suite.chosen import benchmark_named
from cfvlm_ds.evaluation.suite.comparing import RESOLVED, Compared, is_right
from cfvlm_ds.evaluation.suite.tables import between, number, summary
from cfvlm_ds.evaluation.suite.written import Result
from cfvlm_ds.page import Fact, Image, Item, Page, ScoreTable, Text, Written, least_margins, refuse_foreign_folder, write_page


def results_page(
    results: Sequence[Result] | Sequence[Compared],
    names: Sequence[str],
    root: Path,
    out: Path,
    *,
    sample: int = 200,
    say: Callable[[str], object] = lambda line: None,
) -> Written:
    """Write a page of ``sample`` items of each benchmark: half of them those that the last model decides worst, or for which it has become
    worst, and half the best ones. Pictures are read from the benchmarks' own folders in ``root``, never by what a file of results says.

    Raises DataError where a benchmark's files are not there, ConfigError for a folder that is no page.
    """
    refuse_foreign_folder(out)
    facts: list[Fact] = list(zip(("before", "after") if len(names) > 1 else ("results",), names, strict=False))
    pictures: dict[str, dict[str, tuple[Pictures, ...]]] = {}
    items: list[Callable[[], Item]] = []
    for each in results:
        first = each.before if isinstance(each, Compared) else each
        benchmark, place = benchmark_named(first.name), each.place
        found = each.pairs if isinstance(each, Compared) else [(outcome,) for outcome in each.outcomes]
        if found and first.name not in pictures:
            loaded = load(benchmark, root / first.name, say)
            if not loaded.items:
                raise DataError(f"{loaded.problems[0]}; pictures of the page are read there")
            pictures[first.name] = {item.id: item.images for item in loaded.items}
        left_out, half, ordered = max(0, len(found) - sample), sample // 2 or 1, sorted(found, key=_order)
        chosen = ordered[:half] + ordered[half + left_out :]
        items += [partial(_item, place, benchmark, outcomes, names, pictures[first.name]) for outcomes in chosen]
        told = _facts(each)
        if left_out:
            count = f"{len(found) - left_out} of {len(found)} items are shown, the worst and best"
            told = [(label, f"{said}; {count}") for label, said in told] or [(place, count)]
        facts += told
    if len(names) > 1:
        facts.append(("resolved", RESOLVED))
    return write_page(Page(" and ".join(names), (make() for make in items), len(items), facts, "score of the probe"), out, say=say)


def _facts(result: Result | Compared) -> list[Fact]:
    if isinstance(result, Result):
        return [("without looking", summary(result))]
    headline = result.benchmark.headline
    if (found := result.differences.get(headline)) is None:
        return []
    better, worse = result.changes()
    said = (
        f"{number(found.before)} to {number(found.after)}, {found.after - found.before:+.1f} ({between(found.interval)}), resolved: {found}"
    )
    return [(f"{result.place}: {headline}", f"{said}; {len(better)} items got better, {len(worse)} worse")]


def _order(outcomes: Sequence[Outcome]) -> float:
    """Of one model the least margin by which a true text beats the best false one, of two how that has changed."""
    *before, last = (_table("", outcome).worst or 0.0 for outcome in outcomes)
    return last - sum(before)


def _item(
    place: str, benchmark: Benchmark, outcomes: Sequence[Outcome], names: Sequence[str], pictures: Mapping[str, tuple[Pictures, ...]]
) -> Item:
    item = outcomes[0].item
    images = pictures.get(item.id, item.images)
    words = ["right" if is_right(benchmark, outcome) else "wrong" for outcome in outcomes]
    verdict = {"result": words} if len(words) == 1 else {"change": [f"{words[0]} before, {words[1]} after"]}
    said = [
        (f"{name}: wrote about image {i}" if i or len(item.images) > 1 else f"{name}: wrote", text)
        for name, outcome in zip(names, outcomes, strict=True)
        for i, text in enumerate(outcome.said or ())
    ]
    true = next((c for c, truth in enumerate(item.match[0]) if truth), None)
    return Item(
        id=f"{place}: {item.id}",
        images=[Image(each, "") for each in (images if len(images) == len(item.images) else item.images)],
        texts=[Text(text, reference=None if c == true or len(text.split()) < 2 else true) for c, text in enumerate(item.texts)],
        match=item.match,
        prompts=[item.prompt] * bool(item.prompt),
        facts=[*said, *item.tags.items()],
        scores=[_table(name if len(names) > 1 else "", outcome) for name, outcome in zip(names, outcomes, strict=True)],
        filters={"benchmark": [place], **verdict},
    )


def _table(name: str, outcome: Outcome) -> ScoreTable:
    """An item's scores with the margins of its true cells over false texts on the same image, and over images that the text is false of."""
    match, seen = outcome.item.match, outcome.seen
    true = [(i, c) for i, line in enumerate(match) for c, truth in enumerate(line) if truth]
    compared = [(i, c, 0, seen[i][c] - seen[i][d]) for i, c in true for d, truth in enumerate(match[i]) if not truth]
    compared += [(i, c, 1, seen[i][c] - seen[j][c]) for i, c in true for j, line in enumerate(match) if not line[c]]
    margins = least_margins(len(match), len(outcome.item.texts), compared)
    decided = [cell[0] for line in margins for cell in line if cell and cell[0] is not None]
    return ScoreTable(name, seen, outcome.blank, margins, decided)
