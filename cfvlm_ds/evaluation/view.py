"""Page that shows groups: a sample of a manifest, or the groups of a run that have the smallest margins."""

from __future__ import annotations

import heapq
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from cfvlm_ds.core.data_config import AUTO
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup, Groups
from cfvlm_ds.core.progress import Say
from cfvlm_ds.core.reading import read_ids, read_json
from cfvlm_ds.core.run_folder import BASELINE
from cfvlm_ds.core.secrets import print_line
from cfvlm_ds.core.text import quoted
from cfvlm_ds.data import MAX_PIXELS, GroupStore, Root, open_groups
from cfvlm_ds.data.identity import data_identity
from cfvlm_ds.data.stored_scores import StoredScores, read_scores
from cfvlm_ds.evaluation.comparisons import comparisons
from cfvlm_ds.evaluation.metrics import COMPARED, content_hash
from cfvlm_ds.evaluation.scoring import GroupScores
from cfvlm_ds.page import Fact, Item, ScoreTable, Written, group_item, refuse_foreign_folder, write_page

SAMPLE, WORST = 200, 50


class _Source(NamedTuple):
    """Groups of one manifest, and their scores keyed by group id ({} if there are none).

    ``split`` is the name of the run's evaluation set. ``lost_before`` maps a group's id and content hash to whether the model
    got any of its comparisons wrong before training. Groups that were not evaluated before training are absent.
    """

    groups: GroupStore
    scores: Mapping[str, StoredScores]
    split: str = ""
    lost_before: Mapping[tuple[str, int], bool] = MappingProxyType({})


def view(
    source: str | Path,
    out: str | Path = "page",
    *,
    root: Root = None,
    format: str = AUTO,
    scores: str | Path | None = None,
    sample: int = SAMPLE,
    seed: int = 0,
    ids: str | Path | None = None,
    max_pixels: int = MAX_PIXELS,
    say: Say = print_line,
) -> Written:
    """Write a page of groups to the folder ``out``, replacing an earlier page. The return value displays itself in a notebook.

    ``source`` is a manifest. The page shows ``sample`` groups, drawn at random with ``seed``, in the manifest's order. If the file ``ids``
    is given, the page instead shows the groups whose ids it lists (one per line), in the file's order. ``scores`` is a file that
    ``cfvlm-ds score`` or a run wrote.

    Raises DataError if the manifest, scores or ids cannot be read, and ConfigError if ``out`` contains anything other than a page.
    """
    refuse_foreign_folder(Path(out))
    facts: list[Fact] = [("scores", str(scores))] * (scores is not None)
    groups = open_groups(source, root, format, progress=say)
    stored = {} if scores is None else read_scores(Path(scores), groups, data_identity(groups, groups.roots))  # pictures are not compared
    total = len(groups)
    drawn: Sequence[int] = range(total) if sample >= total else sorted(random.Random(seed).sample(range(total), sample))
    chosen, how = (drawn, f"drawn with seed {seed}") if ids is None else (_named(Path(ids), groups, str(source)), "by id")
    title, shown = Path(os.path.normpath(source)).name, [(0, index) for index in chosen]
    return _page(title, str(source), [_Source(groups, stored)], shown, how, facts, Path(out), max_pixels, say)


def view_worst(
    run_dir: Path,
    step: int,
    splits: Mapping[str, GroupStore],
    scores: Mapping[str, Sequence[GroupScores]],
    out: Path,
    max_pixels: int,
    say: Say,
) -> Written:
    """Write a page of the groups with the smallest margins per word after ``step`` steps, with the same number from each split.

    ``scores`` holds the scores of all groups, keyed by split. Raises the same errors as ``view``.
    """
    sources = [
        _Source(
            groups, {group.id: score.stored() for group, score in zip(groups, scores[name], strict=True)}, name, _lost_before(run_dir, name)
        )
        for name, groups in splits.items()
    ]
    without, worst = 0, list[tuple[float, int, int]]()

    def compared(k: int, source: _Source) -> Iterator[tuple[float, int, int]]:
        nonlocal without
        for index, group in enumerate(source.groups):
            if (rank := score_table(group, source.scores[group.id]).rank) is not None:
                yield rank, k, index
            else:
                without += 1

    for k, source in enumerate(sources):  # margins are not comparable between sets with different kinds of texts
        worst += heapq.nsmallest(math.ceil(WORST / len(sources)), compared(k, source))
    shown = [(k, index) for _, k, index in sorted(worst)[:WORST]]
    facts: list[Fact] = [("left out", f"{without} groups without a comparison")] * bool(without)
    title = f"{run_dir.absolute().name} after {step} steps: groups with the smallest margins of {', '.join(splits)}"
    return _page(title, str(run_dir), sources, shown, "as many of each set, smallest margin per word first", facts, out, max_pixels, say)


def _page(
    title: str,
    source: str,
    sources: Sequence[_Source],
    shown: Sequence[tuple[int, int]],
    how: str,
    facts: Sequence[Fact],
    out: Path,
    max_pixels: int,
    say: Say,
) -> Written:
    """Write a page of groups, given in ``shown`` as (source index, group index). ``how`` states how they were selected."""
    number, total = len(shown), sum(len(each.groups) for each in sources)
    facts = [("source", source), ("groups", f"{number} of {total} ({how})" if total > number else str(number)), *facts]
    items = (_item(sources[k], index) for k, index in shown)
    return write_page(title, items, number, out, facts=facts, max_pixels=max_pixels, say=say)


def _lost_before(run_dir: Path, name: str) -> dict[tuple[str, int], bool]:
    """Map each group's id and content hash to whether the model got any of its comparisons wrong before training. Return {} if the set was
    not evaluated before training.
    """
    try:
        rows = read_json(run_dir / BASELINE / f"{name}.json")["rows"]
        return {
            (group, content): any(won < made for metric in COMPARED for won, made in points.get(metric, {}).values())
            for group, content, points in rows[-1]["by_group"]
        }
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return {}


def _named(file: Path, groups: Groups, source: str) -> list[int]:
    """Return the indices of the groups whose ids are listed in a file, one per line. Raises DataError for an unknown id."""
    ids = read_ids(file)
    if not ids:
        raise DataError(f"{file}: the file contains no id; write one id per line")
    places = {group.id: index for index, group in enumerate(groups) if group.id in ids}
    for name, line in ids.items():
        if name not in places:
            raise DataError(f"{file}:{line}: {source} has no group {quoted(name)}; correct or remove the line")
    return [places[name] for name in ids]


def _item(source: _Source, index: int) -> Item:
    group = source.groups[index]
    filters: dict[str, list[str]] = {"split": [source.split]} if source.split else {}
    table, facts = score_table(group, source.scores[group.id]) if source.scores else None, list[Fact]()
    if table is not None:
        state = "none" if not table.decided else "some lost" if table.lost else "all won"
        if table.decided and source.lost_before:
            before = source.lost_before.get((group.id, content_hash(group)))
            was = "not evaluated" if before is None else "some lost" if before else "all won"
            state = f"{state} after training, {was} before"
            facts = [("comparisons", state)]
        filters["comparisons"] = [state]
    return group_item(group, table, facts=facts, filters=filters, roots=source.groups.roots)


def score_table(group: CounterfactualGroup, stored: StoredScores) -> ScoreTable:
    """Return a table of a group's stored scores, with each true cell's smallest margin over a false text and over a false image
    (docs/evaluation.md).

    A tie counts as a loss. ``quad`` comparisons are not counted, because their outcomes follow from the two-cell comparisons.
    """
    logp, decided, lengths = stored.logp, list[float](), list[int]()
    margins: list[list[list[float | None] | None]] = [[None] * len(group.candidates) for _ in group.images]
    for comparison in comparisons(group):
        if comparison.kind != "quad":
            (i, c), (j, d) = comparison.cells
            decided.append(logp[i][c] - logp[j][d])
            lengths.append(max(1, *(len(group.candidates[text].text.split()) for text in (c, d))))
            cell, side = (margins[i][c] or [None, None]), int(comparison.kind != "text")
            least = cell[side]
            cell[side] = decided[-1] if least is None else min(least, decided[-1])
            margins[i][c] = cell
    return ScoreTable(logp, stored.blank, margins, decided, lengths)
