"""Step ``verify``: records the scores and the pixel comparison of every candidate. Verdicts are derived from them later.

The scorer processes a candidate's pictures and texts in one packed row. Each picture is therefore encoded only once for both probes:
``match`` (a yes/no question) and ``likelihood`` (the text as a caption).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.files import replace
from cfvlm_ds.core.groups import CounterfactualGroup, Groups
from cfvlm_ds.core.journal import records
from cfvlm_ds.core.progress import Progress, Say
from cfvlm_ds.core.ranks import cores_per_rank
from cfvlm_ds.core.sequences import side_by_side
from cfvlm_ds.core.text import one_line
from cfvlm_ds.counterfactuals.checks import compared
from cfvlm_ds.counterfactuals.edit.base import picture_by_id, sha256_of
from cfvlm_ds.counterfactuals.judge import Calibrated, Thresholds, calibrated, label, verdict
from cfvlm_ds.counterfactuals.options import VerifyOptions
from cfvlm_ds.counterfactuals.work_folder import ShardStep, WorkFolder
from cfvlm_ds.data.decoding import MAX_BYTES, open_image
from cfvlm_ds.data.picture_file import picture_bytes
from cfvlm_ds.evaluation.benchmarks.base import Item
from cfvlm_ds.evaluation.probes import Caption, Match
from cfvlm_ds.evaluation.scoring import GroupScores

STEP = "verify"
_DECIMALS = 4

Score = Callable[[Groups], Sequence[GroupScores]]
"""Function that returns the scores of candidate groups, in order. It raises DataError for a group that exceeds the context window."""


def verify(
    out: Path,
    options: VerifyOptions,
    shard: int,
    say: Say,
    score: Score | None,
    of: int | None = None,
    identity: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure every candidate in a shard, and return the shard's completion record. ``identity`` holds hashes of the scorer's weights."""
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
        measured_count = step.count // size * size  # after an interruption, batches must start at the same candidates
        inspected = side_by_side(_inspected, islice(candidates(work, shard), measured_count, None), cores_per_rank(), size)
        while part := list(islice(inspected, size)):
            new = measured([candidate for candidate, _ in part], [record for _, record in part], options, score)[
                step.count - measured_count :
            ]
            measured_count += len(part)
            for record in new:
                step.add(record)
            progress.advance(len(new))
        return step.finish(counted, say)


@dataclass(frozen=True)
class Candidate:
    """One edit attempt: its record from the step ``edit``, and its pictures."""

    record: Mapping[str, Any]
    original: Path | None
    edited: Path | None
    mask: Path | None = None

    @property
    def texts(self) -> tuple[str, str]:
        """The caption and the counterfactual caption."""
        return str(self.record["caption"]), str(self.record["proposal"]["text"])


def candidates(work: WorkFolder, shard: int) -> Iterator[Candidate]:
    """Yield the attempts of a shard, in order."""
    folder = work.settings("edit").get("masks")
    masks = Path(folder) if folder else None
    for record in work.records("edit", shard):
        original = Path(record["original"]) if record["original"] else None
        edited = work.picture(record["picture"]) if record.get("picture") else None
        mask = picture_by_id(masks, record["edit"], (".png",)) if masks is not None and "mask_sha256" in record else None
        yield Candidate(record, original, edited, mask)


def measured(
    chunk: Sequence[Candidate], records: list[dict[str, Any]], options: VerifyOptions, score: Score | None
) -> list[dict[str, Any]]:
    """Add the scores to the candidates' records, which already hold the pixel comparisons, and return the records."""
    wanted = [k for k, record in enumerate(records) if "problem" not in record and chunk[k].original is not None]
    if score is None or not wanted:
        return records
    groups = {k: group_of(chunk[k], options) for k in wanted}
    try:
        scores = dict(zip(wanted, score([groups[k] for k in wanted]), strict=True))
    except DataError:  # a group cannot be scored; score each group separately
        scores = {}
    for k in wanted:
        try:
            records[k]["scores"] = score_record(chunk[k], scores[k] if scores else score([groups[k]])[0], options)
        except DataError as error:
            records[k] |= {"problem": "it cannot be scored", "detail": one_line(str(error), 300)}
    return records


def _inspected(candidate: Candidate) -> dict[str, Any]:
    """Build a candidate's record: its ids, and either the pixel comparison or the problem with its pictures."""
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
            return record | {"problem": "a picture has changed since the step edit", "detail": one_line(str(changed), 300)}
        if candidate.original is None or candidate.edited is None:
            if candidate.original is not None:
                open_image(candidate.original)  # raises if the picture cannot be read
            return record | {"checks": None}
        if "path" in made["picture"]:
            record["mined"] = True
        mask = open_image(candidate.mask).convert("L") if candidate.mask is not None else None
        return record | {"checks": compared(candidate.original, candidate.edited, mask)}
    except (DataError, OSError, ValueError) as error:
        return record | {"problem": "a picture cannot be read", "detail": one_line(str(error), 300)}


def _replaced(candidate: Candidate) -> Path | None:
    """Return the path of a picture that has changed since the step ``edit``, or None."""
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
    """Build a group of the pictures and all texts to score: the two captions, and every spelling of "yes" and "no" as an answer to the
    question about each caption.
    """
    item = _item(candidate)
    cells = (*Match(options.template).cells(item), *Caption(prompt=options.prompt).cells(item))
    return CounterfactualGroup.to_score(f"{item.id}@{candidate.record['attempt']}", item.images, cells)


def score_record(candidate: Candidate, scores: GroupScores, options: VerifyOptions) -> dict[str, Any]:
    """Return the results of both probes in nats: each text's log P(yes) and log-likelihood on each picture, and its log-likelihood on a
    blank picture.
    """
    item, probe = _item(candidate), Match(options.template)
    num_match = len(probe.cells(item))
    rows = [tuple(row) for row in scores.logp.tolist()]
    return {
        "match": [[rounded(value) for value in probe.row(item, row[:num_match], (), ())] for row in rows],
        "likelihood": [[rounded(value) for value in row[num_match:]] for row in rows],
        "blank": [rounded(value) for value in scores.blank.tolist()[num_match:]],
    }


def rounded(value: float) -> float | None:
    """Round a number. If it is not finite, return None, because JSON cannot represent it."""
    value = round(float(value), _DECIMALS)
    return value if value - value == 0 else None


def counted(record: Mapping[str, Any], counts: Counter[str]) -> None:
    """Add a record to the counts, with its verdict under the default thresholds."""
    counts["candidates"] += 1
    if scored := "scores" in record:
        counts["scored"] += 1
    reason = verdict(record, Thresholds(rule="match" if scored else "checks")).reason
    counts[f"verdict: {label(record, reason)[:80]}"] += 1


def calibrate(out: Path, labelled: Path, start: Thresholds, precision: float) -> Calibrated:
    """Fit thresholds to labelled candidates, and write them to thresholds.json in the work folder. The file ``labelled`` contains lines of
    the form {"edit": ID, "attempt": 0, "good": true}.

    Raises DataError for labels that cannot be read or do not match any candidate, and ConfigError if no thresholds reach the precision.
    """
    work = WorkFolder.open(out)
    if not labelled.is_file():
        raise DataError(f"{labelled}: no such file; write one JSON object per line")
    labels: dict[tuple[str, int], bool] = {}
    for number, row in enumerate(records(labelled, "write one JSON object per line"), 1):
        edit, attempt, good = row.get("edit"), row.get("attempt", 0), row.get("good")
        if not isinstance(edit, str) or type(attempt) is not int or not isinstance(good, bool):
            raise DataError(f'{labelled}: line {number} is not {{"edit": ID, "attempt": 0, "good": true}}')
        if labels.setdefault((edit, attempt), good) != good:
            raise DataError(f"{labelled}: line {number} contradicts an earlier line about {edit!r}, attempt {attempt}; keep one")
    judged: list[tuple[Mapping[str, Any], bool]] = []
    for shard in range(work.shards):
        for record in work.records(STEP, shard):
            if (name := (record["edit"], record["attempt"])) in labels:
                judged.append((record, labels.pop(name)))
    if labels:
        edit, attempt = next(iter(labels))
        raise DataError(
            f"{labelled}: {len(labels)} labels refer to no verified candidate, for example {edit!r}, attempt {attempt}; run verify first"
        )
    fitted = calibrated(judged, start, precision)
    replace(out / "thresholds.json", json.dumps(asdict(fitted.thresholds), indent=1).encode() + b"\n", shared=True)
    return fitted
