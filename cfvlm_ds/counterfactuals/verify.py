"""The step ``verify``: what a scorer and the pixels say of each candidate. Everything is written down; the verdict is made of it later.

The scorer fills the matrix of the candidate group, two pictures x two texts, in one row: the pictures are encoded once for both probes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from cfvlm_ds.core.distributed import cores_per_rank
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.files import replace
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.journal import records
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.sequences import side_by_side
from cfvlm_ds.core.text import one_line
from cfvlm_ds.counterfactuals.checks import compared
from cfvlm_ds.counterfactuals.edit.base import picture_by_id, sha256_of
from cfvlm_ds.counterfactuals.judge import GOOD, Calibrated, Thresholds, calibrated, verdict
from cfvlm_ds.counterfactuals.options import VerifyOptions
from cfvlm_ds.counterfactuals.work_folder import ShardStep, WorkFolder
from cfvlm_ds.data.decoding import MAX_BYTES, open_image
from cfvlm_ds.data.picture_file import picture_bytes
from cfvlm_ds.evaluation.benchmarks.base import Item
from cfvlm_ds.evaluation.probes import Caption, Match
from cfvlm_ds.evaluation.scoring import GroupScores

STEP = "verify"
_DECIMALS = 4

Say = Callable[[str], object]
Score = Callable[[Sequence[CounterfactualGroup]], Sequence[GroupScores]]
"""Scores of candidate groups, in their order. Raises DataError for one that no row can hold."""


def verify(
    out: Path,
    options: VerifyOptions,
    shard: int,
    say: Say,
    score: Score | None,
    of: int | None = None,
    identity: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure every candidate of a shard; returns its completion. ``identity`` says which weights score."""
    work = WorkFolder.open(out)
    if (done := work.finished(STEP, shard, of, options, say)) is not None:
        return done
    work.settle(STEP, options, scored=score is not None, weights=dict(identity or {}))
    with ShardStep(work, STEP, shard) as step:
        for record, candidate in zip(work.records(STEP, shard), candidates(work, shard), strict=False):
            step.expect(record, edit=candidate.record["edit"], attempt=candidate.record["attempt"])
        total = (work.done("edit", shard) or {"records": 0})["records"]
        progress = Progress(say, STEP, max(total - step.count, 1), "candidates")
        size = options.batch_size
        whole = step.count // size * size  # batches are cut from the shard alone, never from where a kill was
        looked = side_by_side(_looked_at, islice(candidates(work, shard), whole, None), cores_per_rank(), size)
        while part := list(islice(looked, size)):
            new = measured([each for each, _ in part], [found for _, found in part], options, score)[step.count - whole :]
            whole += len(part)
            for record in new:
                step.add(record)
            progress.advance(len(new))
        return step.finish(counted, say)


@dataclass(frozen=True)
class Candidate:
    """An attempt: the record of the step edit, and its pictures."""

    record: Mapping[str, Any]
    original: Path | None
    edited: Path | None
    mask: Path | None = None

    @property
    def texts(self) -> tuple[str, str]:
        """The caption and the counterfactual one."""
        return str(self.record["caption"]), str(self.record["proposal"]["text"])


def candidates(work: WorkFolder, shard: int) -> Iterator[Candidate]:
    """The attempts of a shard in their order."""
    named = work.settings("edit").get("masks")
    masks = Path(named) if isinstance(named, str) and named else None
    for record in work.records("edit", shard):
        original = Path(record["original"]) if record["original"] else None
        edited = work.picture(record["picture"]) if record.get("picture") else None
        mask = picture_by_id(masks, record["edit"], (".png",)) if masks is not None and "mask_sha256" in record else None
        yield Candidate(record, original, edited, mask)


def measured(chunk: Sequence[Candidate], found: list[dict[str, Any]], options: VerifyOptions, score: Score | None) -> list[dict[str, Any]]:
    """The records of some candidates: ``found``, what the pixels say, with what the scorer says."""
    wanted = [k for k, record in enumerate(found) if "problem" not in record and chunk[k].original is not None]
    if score is None or not wanted:
        return found
    groups = {k: group_of(chunk[k], options) for k in wanted}
    try:
        scores: dict[int, GroupScores | str] = dict(zip(wanted, score([groups[k] for k in wanted]), strict=True))
    except DataError:  # of one of them: which?
        scores = {k: _scored_alone(groups[k], score) for k in wanted}
    for k in wanted:
        each = scores[k]
        found[k] |= (
            {"problem": "it cannot be scored", "detail": each}
            if isinstance(each, str)
            else {"scores": score_record(chunk[k], each, options)}
        )
    return found


def _scored_alone(group: CounterfactualGroup, score: Score) -> GroupScores | str:
    try:
        return score([group])[0]
    except DataError as error:
        return one_line(str(error), 300)


def _looked_at(candidate: Candidate) -> dict[str, Any]:
    """Ids, and what the pixels say."""
    made = candidate.record
    record: dict[str, Any] = {
        "edit": made["edit"],
        "source": made["source"],
        "attempt": made["attempt"],
        "type": made["proposal"]["type"],
        "made": made,
    }
    if "refused" in made:
        return record | {"problem": f"no picture: {one_line(str(made['refused']), 200)}"}
    try:
        if (changed := _replaced(candidate)) is not None:
            return record | {"problem": "a picture is another one than when it was edited", "detail": one_line(str(changed), 300)}
        if candidate.original is None or candidate.edited is None:
            if candidate.original is not None:
                open_image(candidate.original)  # what nobody can look at is no example of anything
            return record | {"checks": None}
        if "path" in made["picture"]:
            record["mined"] = True
        mask = open_image(candidate.mask).convert("L") if candidate.mask is not None else None
        return record | {"checks": compared(candidate.original, candidate.edited, mask)}
    except (DataError, OSError, ValueError) as error:
        return record | {"problem": "a picture cannot be read", "detail": one_line(str(error), 300)}


def _replaced(candidate: Candidate) -> Path | None:
    """A picture whose contents are not those that the step edit has seen or made."""
    seen = (
        (candidate.original, candidate.record.get("parent_sha256")),
        (candidate.edited, (candidate.record.get("picture") or {}).get("sha256")),
    )
    for path, sha256 in seen:
        if path is not None and sha256 is not None and sha256_of(picture_bytes(path, MAX_BYTES)) != sha256:
            return path
    return None


def _item(candidate: Candidate) -> Item:
    images = ((candidate.original or Path(),),) if candidate.edited is None else ((candidate.original or Path(),), (candidate.edited,))
    return Item(str(candidate.record["edit"]), images, candidate.texts, ((1, 0), (0, 1))[: len(images)])


def group_of(candidate: Candidate, options: VerifyOptions) -> CounterfactualGroup:
    """Both pictures with every text that is scored: yes and no for each caption in its ways of writing, and the captions themselves."""
    item = _item(candidate)
    cells = (*Match(options.template).cells(item), *Caption(prompt=options.prompt).cells(item))
    match = tuple(tuple(1 if (i, c) == (0, 0) else None for c in range(len(cells))) for i in range(len(item.images)))
    return CounterfactualGroup(f"{item.id}@{candidate.record['attempt']}", item.images, cells, match)


def score_record(candidate: Candidate, scores: GroupScores, options: VerifyOptions) -> dict[str, Any]:
    """The matrix by both probes, in nats: log P(yes) of each text on each picture, log-likelihoods, and those on a blank picture."""
    item, probe = _item(candidate), Match(options.template)
    asked = len(probe.cells(item))
    rows = [tuple(row) for row in scores.logp.tolist()]
    return {
        "match": [[_rounded(value) for value in probe.row(item, row[:asked], (), ())] for row in rows],
        "likelihood": [[_rounded(value) for value in row[asked:]] for row in rows],
        "blank": [_rounded(value) for value in scores.blank.tolist()[asked:]],
        "blank_match": [_rounded(value) for value in probe.row(item, tuple(scores.blank.tolist()[:asked]), (), ())],
    }


def _rounded(value: float) -> float | None:
    """A number that is not finite is none: JSON has no word for it."""
    value = round(float(value), _DECIMALS)
    return value if value - value == 0 else None


def counted(record: Mapping[str, Any], counts: Counter[str]) -> None:
    """Add what a record has, with the verdict by default thresholds."""
    counts["candidates"] += 1
    counts["scored"] += "scores" in record
    reason = verdict(record, Thresholds(rule="match" if "scores" in record else "checks")).reason
    counts["good by default thresholds" if reason == GOOD else f"not: {reason[:80]}"] += 1


def calibrate(out: Path, labelled: Path, start: Thresholds, precision: float) -> Calibrated:
    """Fit the margin to labelled candidates, {"edit": ID, "attempt": 0, "good": true} a line, and write W/thresholds.json.

    Raises DataError for labels that cannot be read or name no candidate, ConfigError where no margin reaches the precision.
    """
    work = WorkFolder.open(out)
    if not labelled.is_file():
        raise DataError(f"{labelled}: no such file; write one JSON object a line")
    labels: dict[tuple[str, int], bool] = {}
    for number, row in enumerate(records(labelled, "write one JSON object a line"), 1):
        edit, attempt, good = row.get("edit"), row.get("attempt", 0), row.get("good")
        if not isinstance(edit, str) or type(attempt) is not int or not isinstance(good, bool):
            raise DataError(f'{labelled}: line {number} is not {{"edit": ID, "attempt": 0, "good": true}}')
        if labels.setdefault((edit, attempt), good) != good:
            raise DataError(f"{labelled}: line {number} says of {edit!r}, attempt {attempt}, the opposite of an earlier line")
    found: list[tuple[Mapping[str, Any], bool]] = []
    for shard in range(work.shards):
        for record in work.records(STEP, shard):
            if (name := (record["edit"], record["attempt"])) in labels:
                found.append((record, labels.pop(name)))
    if labels:
        edit, attempt = next(iter(labels))
        raise DataError(f"{labelled}: {len(labels)} labels are of no verified candidate, such as {edit!r}, attempt {attempt}; verify first")
    fitted = calibrated(found, start, precision)
    replace(out / "thresholds.json", fitted.as_json().encode(), shared=True)
    return fitted
