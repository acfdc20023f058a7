"""Groups to look at, as a static page: of a manifest a sample, of a run the groups that its stored scores decide worst."""

from __future__ import annotations

import difflib
import heapq
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.reading import lines, open_regular
from cfvlm_ds.core.run_folder import recorded_options
from cfvlm_ds.core.secrets import print_line
from cfvlm_ds.core.text import quoted
from cfvlm_ds.core.untrusted import bare_name
from cfvlm_ds.data import MAX_PIXELS, GroupStore, Root, open_groups
from cfvlm_ds.data.formats import AUTO
from cfvlm_ds.data.identity import data_identity
from cfvlm_ds.data.stored_scores import StoredScores, read_scores
from cfvlm_ds.evaluation.comparisons import comparisons
from cfvlm_ds.page import Item, Page, ScoreTable, Written, group_item, refuse_foreign_folder, write_page
from cfvlm_ds.page.records import Fact, Margin

MOST = 100_000
"""Groups of a page."""
SAMPLE = 200
_MAX_ID = 1 << 16  # bytes of a line of a file of ids


@dataclass(frozen=True)
class _Source:
    """Groups of one manifest and their scores by id, if any; ``split`` is its name in a run's evaluation."""

    groups: Sequence[CounterfactualGroup]
    scores: Mapping[str, StoredScores]
    split: str = ""


@dataclass(frozen=True)
class _Choice:
    """Which groups are shown, as (source, place in it) in order, how they were chosen, and how many compare nothing and are left out."""

    sources: Sequence[_Source]
    shown: Sequence[tuple[int, int]]
    how: str
    without: int = 0


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
    say: Callable[[str], object] = print_line,
) -> Written:
    """Write a page of groups into the folder ``out``, in place of an earlier page there; in a notebook the result shows itself.

    ``source`` is a manifest, of which ``sample`` groups drawn by ``seed`` are shown in its order, or those named in the file ``ids``, one a
    line, in the file's order; or a run folder, of whose evaluation those are shown that its scores decide worst. ``scores`` is a file that
    ``cfvlm-ds score`` wrote, or one of a run.

    Raises DataError for a manifest, scores or ids that cannot be read, ConfigError for a folder that is no page and would be replaced.
    """
    refuse_foreign_folder(Path(out))
    if sample > MOST:
        raise ConfigError(f"a page of {sample} groups is more than the {MOST} that a browser takes; lower --sample")
    if os.path.isdir(source) and (Path(source) / "config.yaml").is_file():
        if (ids, scores, root) != (None, None, None):
            raise ConfigError(
                f"{source} is a run folder, which has scores and roots of its own; name a manifest with --ids, --scores, --root"
            )
        choice = _of_run(Path(source), sample)
    else:
        groups = open_groups(source, root, format, progress=say)
        choice = _of_manifest(groups, scores, sample, seed, ids)
    number, total = len(choice.shown), sum(len(each.groups) for each in choice.sources)
    facts: list[Fact] = [("source", str(source)), ("groups", f"{number} of {total} ({choice.how})" if total > number else str(number))]
    facts += [("scores", str(scores))] * (scores is not None)
    facts += [("left out", f"{choice.without} groups without anything to compare")] * bool(choice.without)
    page = Page(Path(os.path.normpath(source)).name, _items(choice), number, facts)
    return write_page(page, Path(out), max_pixels=max_pixels, say=say)


def _of_manifest(groups: GroupStore, scores: str | Path | None, sample: int, seed: int, ids: str | Path | None) -> _Choice:
    found = _Source(groups, {} if scores is None else _stored(Path(scores), groups))
    if ids is not None:
        return _Choice([found], [(0, index) for index in _named(Path(ids), groups, str(groups.path))], "by id")
    drawn = range(len(groups)) if sample >= len(groups) else sorted(random.Random(seed).sample(range(len(groups)), sample))
    return _Choice([found], [(0, index) for index in drawn], f"drawn by seed {seed}")


def _of_run(run_dir: Path, sample: int) -> _Choice:
    """The groups of all splits of a run's evaluation whose least margin is the worst, in this order."""
    sources = []
    for name, (path, root, format, limit) in _evaluated(run_dir).items():
        file = run_dir / "scores" / f"{bare_name(name, run_dir / 'config.yaml')}.jsonl"
        if not file.is_file():
            raise DataError(f"{file}: no such scores; a run writes them when it is over, so end it, or name a manifest and --scores")
        groups = open_groups(path, root, format, limit=limit)
        sources.append(_Source(groups, _stored(file, groups), name))
    without = 0

    def compared() -> Iterator[tuple[float, int, int]]:
        nonlocal without
        for k, source in enumerate(sources):
            for index, group in enumerate(source.groups):
                worst = score_table(group, source.scores[group.id]).worst
                without += worst is None
                if worst is not None:
                    yield worst, k, index

    ranked = heapq.nsmallest(sample, compared())
    return _Choice(sources, [(k, index) for _, k, index in ranked], "worst first", without)


def _evaluated(run_dir: Path) -> dict[str, tuple[str, Root, str, int | None]]:
    """Split -> manifest, root, format and limit, as the run's configuration has them. Raises ConfigError where it has none."""
    file = run_dir / "config.yaml"
    data = recorded_options(run_dir).get("data")
    splits = data.get("evaluation") if isinstance(data, dict) else None
    if not isinstance(splits, dict) or not isinstance(data, dict) or not splits:
        raise ConfigError(f"{file} names no evaluation (data.evaluation), so the run has no scores; name a manifest")
    found: dict[str, tuple[str, Root, str, int | None]] = {}
    for name, split in splits.items():
        own = {"path": split} if isinstance(split, str) else split if isinstance(split, dict) else {}
        if own.get("benchmark"):
            continue  # whose items `cfvlm-ds compare RUN/benchmarks` shows
        root = data.get("root") if own.get("root") is None else own["root"]
        path, format, limit = own.get("path"), own.get("format") or data.get("format") or AUTO, own.get("limit")
        roots = root if isinstance(root, list) else [] if root is None else [root]
        if not all(isinstance(each, str) for each in (name, path, format, *roots)) or not (limit is None or type(limit) is int):
            raise ConfigError(f"{file}: data.evaluation.{name} names no manifest; restore it")
        found[str(name)] = (str(path), root, str(format), limit)
    return found


def _stored(file: Path, groups: GroupStore) -> Mapping[str, StoredScores]:
    """The scores of a file, if it is of these groups by their texts and the paths of their pictures; contents are not hashed for a look."""
    return read_scores(file, groups, data_identity(groups, groups.roots))


def _named(file: Path, groups: Sequence[CounterfactualGroup], source: str) -> list[int]:
    """The places of the groups that a file names, one id a line. Raises DataError for one that is not there, or is named twice."""
    wanted: dict[str, int] = {}
    try:
        with open_regular(file) as handle:
            for number, line in enumerate(lines(handle, _MAX_ID), 1):
                if not (name := line.decode("utf-8-sig").strip()):
                    continue
                if name in wanted:
                    raise DataError(f"{file}:{number}: group {quoted(name)} is named on line {wanted[name]} too; keep one")
                wanted[name] = number
                if len(wanted) > MOST:
                    break
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{file}: ids cannot be read ({reason}); write one id a line, in UTF-8") from error
    if not 0 < len(wanted) <= MOST:
        many = "no" if not wanted else f"more than {MOST}"
        raise DataError(f"{file}: it names {many} groups, and a page has 1 to {MOST}; write one id a line")
    found: dict[str, int] = {}
    others: list[str] = []  # of which one may be what was meant
    for index, group in enumerate(groups):
        if group.id in wanted:
            found.setdefault(group.id, index)
        elif len(others) < MOST:
            others.append(group.id)
    for name, number in wanted.items():
        if name not in found:
            near = difflib.get_close_matches(name, [*others, *found], n=1) if len(groups) <= MOST else []
            hint = f"did you mean {near[0]!r}?" if near else "correct or remove the line"
            raise DataError(f"{file}:{number}: {source} has no group {quoted(name)}; {hint}")
    return [found[name] for name in wanted]


def _items(choice: _Choice) -> Iterator[Item]:
    for k, index in choice.shown:
        source = choice.sources[k]
        group = source.groups[index]
        filters: dict[str, list[str]] = {"split": [source.split]} if source.split else {}
        tables = [score_table(group, source.scores[group.id])] if source.scores else []
        for table in tables:
            filters["comparisons"] = ["none" if not table.compared else "some lost" if table.lost else "all won"]
        yield group_item(group, tables, filters=filters)


def score_table(group: CounterfactualGroup, stored: StoredScores, name: str = "") -> ScoreTable:
    """A group's stored scores with the margins of every true cell, over the comparisons that evaluation makes of it (docs/evaluation.md).

    A tie is lost. Two images with two texts add no comparison of their own: they are right where those of their cells are.
    """
    logp = stored.logp
    beside: dict[tuple[int, int], list[float | None]] = {}
    compared = lost = 0
    worst: float | None = None
    for each in comparisons(group):
        if each.kind == "quad":
            continue
        if each.kind == "text":
            i, c, d = each.at
            cell, margin, side = (i, c), logp[i][c] - logp[i][d], 0
        else:
            c, i, j = each.at
            cell, margin, side = (i, c), logp[i][c] - logp[j][c], 1
        compared, lost = compared + 1, lost + (margin <= 0)
        worst = margin if worst is None else min(worst, margin)
        known = beside.setdefault(cell, [None, None])
        before = known[side]
        known[side] = margin if before is None else min(before, margin)
    margins: list[list[Margin | None]] = [[None] * len(group.candidates) for _ in group.images]
    for (i, c), (text, image) in beside.items():
        margins[i][c] = (text, image)
    return ScoreTable(name, logp, stored.blank, margins, compared, lost, worst)
