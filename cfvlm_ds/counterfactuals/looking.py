"""Candidates to look at, rejected ones too, as items of a page."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.counterfactuals.history import Edited, History, histories
from cfvlm_ds.counterfactuals.judge import GOOD, margins, read_thresholds
from cfvlm_ds.counterfactuals.work_folder import WorkFolder
from cfvlm_ds.page import Image, Item, Page, ScoreTable, Text, Written, write_page

_MOST = 100_000


def view_work(out: Path, page: Path, *, rejected: bool, sample: int, seed: int, say: Callable[[str], object]) -> Written:
    """Write a page of candidates of a work folder, those that are not good alone with ``rejected``: a sample drawn by ``seed``.

    Raises ConfigError for no work folder, or none to show.
    """
    work = WorkFolder.open(out)
    own = work.path / "thresholds.json"
    rule = "" if work.settings("verify").get("scored") else "checks"
    thresholds = read_thresholds(own if own.is_file() else None, rule)
    chosen: list[tuple[float, History, Edited]] = []
    draw, seen = random.Random(seed), 0
    for shard in range(work.shards):
        for history in histories(work, shard, thresholds):
            for edited in history.edits:
                if rejected and edited.reason == GOOD:
                    continue
                seen += 1
                chosen.append((draw.random(), history, edited))
                if len(chosen) > 2 * min(sample, _MOST):
                    chosen = sorted(chosen, key=lambda each: each[0])[: min(sample, _MOST)]
    if not chosen:
        raise ConfigError(f"{out}: there is no {'rejected ' * rejected}candidate to show")
    chosen = sorted(chosen, key=lambda each: each[0])[: min(sample, _MOST)]
    items = (_item(history, edited) for _, history, edited in sorted(chosen, key=lambda each: str(each[2].proposal["id"])))
    facts = [("work folder", str(out)), ("candidates", f"{len(chosen)} of {seen}" + " that are not good" * rejected)]
    return write_page(Page(out.name, items, len(chosen), facts, "log P(yes)"), page, say=say)


def _item(history: History, edited: Edited) -> Item:
    best, kind = edited.best, str(edited.proposal["type"])
    images = [] if history.picture is None else [Image((history.picture,), "original")]
    match: list[list[int | None]] = [[1, 0]] if images else []
    if best is not None and best.picture is not None:
        images.append(Image((best.picture,), f"attempt {best.number}"))
        match.append([0, 1])
    texts = [Text(str(history.line["caption"]), "caption"), Text(str(edited.proposal["text"]), kind, reference=0)]
    tables = []
    measured = best.measured if best is not None and best.measured is not None else {}
    if "scores" in measured:
        rows = [[float("nan") if value is None else value for value in row] for row in measured["scores"]["match"]]
        found = margins(measured, "match")
        tables = [
            ScoreTable(
                "log P(yes)",
                rows,
                compared=len(found),
                lost=sum(not each > 0 for each in found.values()),
                worst=min(found.values(), default=None),
            )
        ]
    reason = edited.reason or "good"
    attempts = [{"edit": each.made, "verify": each.measured} for each in edited.attempts]
    return Item(
        str(edited.proposal["id"]), images or [Image((), "no picture")], texts, match or [[1, 0]],
        facts=[("verdict", reason), ("attempts", str(len(edited.attempts)))],
        changes=[f"{kind}: {edited.proposal['from']} \N{RIGHTWARDS ARROW} {edited.proposal['to']}"],
        scores=tables,
        filters={"edit type": [kind], "verdict": [reason], "back end": [str(edited.proposal["back_end"])]},
        meta=json.dumps({"propose": edited.proposal, "attempts": attempts}, indent=1),
    )  # fmt: skip
