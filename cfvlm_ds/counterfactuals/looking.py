"""HTML page of candidates, including rejected ones."""

from __future__ import annotations

import heapq
import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.progress import Say
from cfvlm_ds.counterfactuals.history import Edited, History, histories, thresholds_of
from cfvlm_ds.counterfactuals.judge import GOOD, label, margins
from cfvlm_ds.counterfactuals.options import SelectOptions
from cfvlm_ds.counterfactuals.select import group_of
from cfvlm_ds.counterfactuals.work_folder import WorkFolder
from cfvlm_ds.page import Item, ScoreTable, Written, group_item, write_page


def view_work(out: Path, page: Path, *, rejected: bool, sample: int, seed: int, say: Say) -> Written:
    """Write an HTML page of ``sample`` random candidates, restricted to rejected ones if ``rejected`` is True.

    Raises ConfigError if ``out`` is not a work folder or has no candidate to show.
    """
    work = WorkFolder.open(out)
    thresholds = thresholds_of(work)
    draw, number = random.Random(seed), itertools.count()
    candidates = (
        (draw.random(), next(number), history, edited)
        for shard in range(work.shards)
        for history in histories(work, shard, thresholds)
        for edited in history.edits
        if not rejected or edited.reason != GOOD
    )
    chosen = heapq.nsmallest(sample, candidates)
    if not chosen:
        raise ConfigError(f"{out} has no {'rejected ' * rejected}candidate to show")
    items = (_item(history, edited) for _, _, history, edited in sorted(chosen, key=lambda item: str(item[3].proposal["id"])))
    facts = [("work folder", str(out)), ("candidates", f"{len(chosen)} of {next(number)}" + " rejected ones" * rejected)]
    return write_page(out.name, items, len(chosen), page, facts=facts, scored="log P(yes)", say=say)


def _item(history: History, edited: Edited) -> Item:
    best = edited.best
    reason = label(best.measured, edited.reason)
    attempts = [{"edit": attempt.made, "verify": attempt.measured} for attempt in edited.attempts]
    meta = json.dumps({"propose": edited.proposal, "attempts": attempts})
    table = None
    if "scores" in best.measured:
        table = ScoreTable(best.measured["scores"]["match"], decided=list(margins(best.measured, "match").values()))
    return group_item(
        replace(group_of(history, [edited], SelectOptions(prompt="", source="")), id=str(edited.proposal["id"]), meta=meta),
        table,
        facts=[("verdict", reason), ("attempts", f"{len(edited.attempts)}, of which number {best.made['attempt']} is shown")],
        filters={"verdict": [reason], "back end": [str(edited.proposal["back_end"])]},
    )
