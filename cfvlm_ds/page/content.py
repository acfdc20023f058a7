"""One item as the plain data that the page's script draws. Every key is ours; what the data say is in values alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfvlm_ds.core.text import one_line, printable
from cfvlm_ds.page.outline import difference
from cfvlm_ds.page.pictures import Seen
from cfvlm_ds.page.records import Item, Prompt, ScoreTable
from cfvlm_ds.page.words import MAX_COMPARED, Span, changed_words, runs, union

_ALL_COMPARED = 20 * MAX_COMPARED
"""Pairs of words of an item; beyond, differing texts are marked as a whole between what they have in common at either end."""
_REASON = 300
_DECIMALS = 3


def item_content(item: Item, seen: Mapping[Path, Seen], problems: Mapping[Path, str]) -> dict[str, Any]:
    """What is drawn of an item. ``seen`` are its pictures, ``problems`` says why one is not among them."""
    changed = _changed(item)
    return {
        "id": printable(item.id),
        "facts": [[printable(part) for part in fact] for fact in item.facts],
        "changes": [runs(change) for change in item.changes],
        "prompts": [_turns(prompt) for prompt in item.prompts],
        "images": [
            {"label": printable(image.label), "pictures": [_picture(item, i, k, seen, problems) for k in range(len(image.pictures))]}
            for i, image in enumerate(item.images)
        ],
        "texts": [
            {"label": printable(text.label), "prompt": text.prompt, "runs": runs(text.text, changed[c])}
            for c, text in enumerate(item.texts)
        ],
        "match": [list(line) for line in item.match],
        "scores": [_table(table) for table in item.scores],
        "meta": runs(item.meta),
    }


def _turns(prompt: Prompt) -> list[Any]:
    """[role, parts] of each turn, where a part is runs, or null for a picture; a string is a turn without a role."""
    turns: Sequence[tuple[str, Sequence[str | None]]] = [("", [prompt])] if isinstance(prompt, str) else prompt
    return [[printable(role), [None if part is None else runs(part) for part in parts]] for role, parts in turns]


def _changed(item: Item) -> list[list[Span]]:
    """For each text the words by which it differs from its reference; for a reference, those by which any other text differs from it."""
    spans: list[list[Span]] = [[] for _ in item.texts]
    left = _ALL_COMPARED
    for c, text in enumerate(item.texts):
        if text.reference is not None:
            whole = item.texts[text.reference].text
            theirs, own = changed_words(whole, text.text, min(left, MAX_COMPARED))
            spans[c] += own
            spans[text.reference] += theirs
            left = max(0, left - min(MAX_COMPARED, len(whole.split()) * len(text.text.split())))
    return [union(each) for each in spans]


def _picture(item: Item, i: int, k: int, seen: Mapping[Path, Seen], problems: Mapping[Path, str]) -> dict[str, Any]:
    path = item.images[i].pictures[k]
    if path not in seen:
        return {"name": printable(str(path)), "missing": one_line(problems.get(path, "it could not be read"), _REASON)}
    copy = seen[path].copy
    found: dict[str, Any] = {"name": printable(str(path)), "src": copy.name, "size": list(copy.size)}
    other = 1 if i == 0 and len(item.images) == 2 else 0
    against = item.images[other].pictures[k] if other != i and k < len(item.images[other].pictures) else None
    if against is None or against not in seen:
        return found
    factual = seen[against].copy
    if factual.size != copy.size:
        note = f"image {other} has another size, {factual.size[0]} x {factual.size[1]}"
    elif factual.digest == copy.digest:
        note = f"the same pixels as image {other}"
    else:
        differs = difference(seen[against].grid, seen[path].grid)
        found |= {"outline": differs.path, "grid": list(differs.size)} if differs.path else {}
        note = (
            f"differs from image {other} in {_percent(differs.share)} of its area"
            if differs.share
            else f"differs invisibly from image {other}"
        )
    return found | ({"note": note} if i else {})


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "less than 1 %"


def _table(table: ScoreTable) -> dict[str, Any]:
    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, _DECIMALS)

    return {
        "name": printable(table.name),
        "rows": [[rounded(value) for value in row] for row in table.rows],
        "blank": [rounded(value) for value in table.blank],
        "margins": [[None if cell is None else [rounded(part) for part in cell] for cell in row] for row in table.margins],
        "compared": table.compared,
        "lost": table.lost,
        "worst": rounded(table.worst),
    }
