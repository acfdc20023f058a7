"""Step ``select``: writes one group per source. A group contains the best attempt at each good edit, as far as the quotas allow. Edits that
are left out are counted by reason.

Groups are ordinary ``cfgroup`` rows with their provenance in ``meta``. A picture and all its edits go to the same split.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.files import replace, whole_file
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup, Edit, normalised
from cfvlm_ds.core.progress import Progress, Say
from cfvlm_ds.core.reading import lines, parse_json, read_ids
from cfvlm_ds.core.strict import Given, fitted
from cfvlm_ds.core.text import in_cell, quoted
from cfvlm_ds.core.untrusted import own_output
from cfvlm_ds.counterfactuals.history import Edited, History, histories, thresholds_of
from cfvlm_ds.counterfactuals.judge import GOOD, Thresholds, read_thresholds
from cfvlm_ds.counterfactuals.options import SelectOptions, pairs
from cfvlm_ds.counterfactuals.work_folder import STEPS, WorkFolder, row_line, seed_of
from cfvlm_ds.data.cfgroup import SCHEMA, to_row
from cfvlm_ds.data.containers.prepared import ENDING
from cfvlm_ds.data.lines import MAX_LINE

KEPT, NO_ROOM, QUOTA = "kept", "not drawn: over --per_source", "not drawn: over --per_type"
TWICE, ELSEWHERE = "its text is a duplicate", "its real picture belongs to another split"
REPEATED = "its source has the id of an earlier row"
_ROWS = 24
_MANY = 1000
"""With at least this many pictures, a picture's split depends only on its contents and the seed, so the shares are approximate. With fewer
pictures, the shares are exact.
"""
_SHOWN = ("settings", "scorer", "weights", "template", "seed", "cfvlm-ds", "composite")
"""Settings of each step that are copied to every group for reproducibility: back ends, models and versions."""


@dataclass
class Survival:
    """Counts of edit outcomes, by edit type.

    ``sources`` holds the counts of the step ``propose``, such as the number of captions. ``files`` maps each written file to its number of
    groups, and ``shares`` maps it to the share requested with ``--splits``. ``roots`` lists the folders of the pictures; it is empty if all
    pictures are in the folder of the written files.
    """

    by_type: dict[str, Counter[str]] = field(default_factory=dict)
    sources: Counter[str] = field(default_factory=Counter)
    files: dict[str, int] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    roots: list[str] = field(default_factory=list)

    def add(self, kind: str, outcome: str) -> None:
        """Count the outcome of an edit of type ``kind``."""
        self.by_type.setdefault(kind, Counter()).update([outcome, "proposed"])

    @property
    def total(self) -> Counter[str]:
        """Outcome counts summed over types."""
        return sum(self.by_type.values(), Counter())

    def table(self) -> str:
        """Format a table with a row per outcome and a column per edit type. The last column gives the outcome's percentage of all proposed
        edits.
        """
        kinds = sorted(self.by_type)
        total = self.total
        rest = [name for name, _ in sorted(total.items(), key=lambda item: (-item[1], item[0])) if name not in ("proposed", KEPT)]
        lines = [f"| | {' | '.join(map(in_cell, kinds))} | all | |", f"|---|{'---:|' * (len(kinds) + 2)}"]
        rows = [(name, [name]) for name in ("proposed", *rest[:_ROWS], KEPT)]
        if more := rest[_ROWS:]:
            rows.insert(-1, (f"{len(more)} other reasons", more))
        for shown, names in rows:
            counts = [sum(self.by_type[kind][name] for name in names) for kind in kinds]
            share = f"{100 * sum(counts) / max(total['proposed'], 1):.1f} %"
            lines.append(f"| {in_cell(shown)} | {' | '.join(map(str, counts))} | {sum(counts)} | {share} |")
        return "\n".join(lines)

    def summary(self) -> str:
        """Format one line with the number of captions that became groups, and one line per written file."""
        groups = sum(self.files.values())
        captions, proposed = self.sources["captions"], self.sources["with a proposal"]
        rest = f"{captions - proposed} have no proposal, {proposed - groups} have no edit that was kept"
        lines = [f"{captions} captions: {groups} became groups, {rest}"]
        for name, count in self.files.items():
            shares = f" ({count / groups:.0%} of the groups; --splits requests {self.shares[name]:.0%})" if self.shares else ""
            lines.append(f"wrote {name}: {count} groups{shares}")
        return "\n".join(lines)


def select(out: Path, file: Path, options: SelectOptions, say: Say) -> Survival:
    """Write the groups of all shards to ``file``, and the counts to FILE.survival.md next to it.

    Raises ConfigError if no candidate is kept, or if some shards have not been verified; the message lists these shards.
    """
    work = WorkFolder.open(out)
    if missing := work.missing("verify"):
        raise ConfigError(
            f"{out}: verify has not finished {len(missing)} of {work.shards} shards; run them first: --array={ranges(missing)}"
        )
    for shard in range(work.shards):
        work.need("verify", shard)
    files, shares, excluded = checked(file, options, work.about["source"]["path"])
    survival = Survival()
    with ExitStack() as stack:
        handles: dict[str, IO[bytes]] = {name: stack.enter_context(whole_file(path)) for name, path in files.items()}
        thresholds = thresholds_of(work, options.thresholds, options.rule, options.margin)
        cuts = _cuts(work, thresholds, options, excluded) if options.per_type else {}
        ends = _ends(work, thresholds, shares, options.seed, excluded)
        folder, outside = file.parent.absolute(), set[Path]()
        further = [root for root in (*work.roots, work.path.absolute()) if not root.is_relative_to(folder)]
        settings = {step: work.settings(step) for step in STEPS}
        steps = {step: {key: values[key] for key in _SHOWN if key in values} for step, values in settings.items()}
        progress = Progress(say, "select", work.shards, "shards")
        written, seen, unknown = Counter[str](), set[int](), set(excluded)
        for shard in progress.over(range(work.shards)):
            for history in histories(work, shard, thresholds, excluded):
                unknown.difference_update(str(edited.proposal["id"]) for edited in history.edits)
                name = _split(_place(history, options.seed), ends)
                if (number := seed_of(history.id)) in seen:  # the id occurs in another shard
                    for edited in history.edits:
                        survival.add(str(edited.proposal["type"]), REPEATED)
                    continue
                seen.add(number)
                if kept := _kept(history, options, cuts, survival, name, ends):
                    row = _row(history, kept, options, folder, steps, thresholds)
                    handles[name].write(row_line(row))
                    written[name] += 1
                    outside.update(_outside(row, further))
        if unknown:
            line, name = min((excluded[name], name) for name in unknown)
            raise DataError(f"{options.exclude}:{line}: {out} has no edit {quoted(name)}; correct or remove the line")
        if not written:
            became = ", ".join(f"{name}: {count}" for name, count in survival.total.most_common(6)) or "nothing was proposed"
            raise ConfigError(f"{out}: no candidate was kept; outcomes: {became}")
    for shard in range(work.shards):
        survival.sources.update((work.done("propose", shard) or {"counts": {}})["counts"])
    survival.files.update({str(files[name]): written[name] for name in files})
    survival.shares.update({str(files[name]): share for name, share in shares.items()})
    survival.roots.extend(map(str, [folder, *sorted(outside)] if outside else []))
    replace(_beside(file), f"{survival.table()}\n".encode())
    return survival


def checked(file: Path, options: SelectOptions, data: str | Path) -> tuple[dict[str, Path], dict[str, float], dict[str, int]]:
    """Return each split's output file and share, and the line number of each excluded id. Raises ConfigError if options are invalid or an
    output file was written by another program, and DataError if the file of excluded ids cannot be read.
    """
    shares = parse_splits(options.splits)
    excluded = read_ids(Path(options.exclude)) if options.exclude else {}
    read_thresholds(options.thresholds, options.rule, options.margin)
    files = {name: file.with_name(f"{file.stem}.{name}{file.suffix}") for name in shares} if shares else {"": file}
    for path in files.values():
        own_output(path, _is_selected, "select", data)
    own_output(_beside(file), _is_survival, "select", data)
    return files, shares, excluded


def _beside(file: Path) -> Path:
    return file.with_name(f"{file.name}.survival.md")


def _is_selected(file: IO[bytes]) -> bool:
    row = parse_json(next(lines(file, MAX_LINE)).decode())
    return row["schema"] == SCHEMA and isinstance(row["meta"]["steps"], dict)


def _is_survival(file: IO[bytes]) -> bool:
    head, rule = file.readline(MAX_LINE), file.readline(4)
    return head.startswith(b"| | ") and rule == b"|---"


def _outside(row: Mapping[str, Any], roots: Sequence[Path]) -> Iterator[Path]:
    """Yield the folder of each picture outside the output folder: one of ``roots``, or a folder of pictures extracted from a table."""
    for image in row["images"]:
        for path in [image["path"]] if isinstance(image["path"], str) else image["path"] or ():
            if path.startswith("/"):
                known = [root for root in roots if Path(path).is_relative_to(root)]
                yield from (known or [folder for folder in Path(path).parents if folder.name.endswith(ENDING)])[:1]


def _ranked(history: History) -> list[Edited]:
    """Return a source's good edits, sorted by a random number derived from the edit's id, so that quotas keep a random sample."""
    return sorted((edited for edited in history.edits if edited.reason == GOOD), key=_draw)


def _draw(edited: Edited) -> int:
    return seed_of(edited.proposal["id"])


def _cuts(work: WorkFolder, thresholds: Thresholds, options: SelectOptions, excluded: Container[str]) -> dict[str, int]:
    """Map each edit type that exceeds its quota to a cutoff: edits with a larger random number (see ``_draw``) are left out. This takes 8
    bytes of memory per good edit.
    """
    draws: dict[str, array[int]] = {}
    for shard in range(work.shards):
        for history in histories(work, shard, thresholds, excluded):
            for edited in _ranked(history)[: options.per_source]:
                draws.setdefault(str(edited.proposal["type"]), array("Q")).append(_draw(edited))
    return {kind: sorted(values)[options.per_type - 1] for kind, values in draws.items() if len(values) > options.per_type}


def _kept(
    history: History,
    options: SelectOptions,
    cuts: Mapping[str, int],
    survival: Survival,
    home: str,
    ends: dict[str, float],
) -> list[Edited]:
    """Return the edits of ``history`` that are kept, in the order of proposal, and add the outcome of every edit to ``survival``.

    ``home`` is the source's split. Edits whose mined picture belongs to another split are left out.
    """
    taken = _ranked(history)[: options.per_source]
    kept: list[Edited] = []
    texts = {normalised(history.caption)}
    for edited in history.edits:
        kind, text = str(edited.proposal["type"]), normalised(str(edited.proposal["text"]))
        picture = edited.best.made.get("picture") or {}
        outcome = edited.reason or KEPT
        if outcome != KEPT:
            pass
        elif edited not in taken:
            outcome = NO_ROOM
        elif kind in cuts and _draw(edited) > cuts[kind]:
            outcome = QUOTA
        elif "path" in picture and _split(seed_of(options.seed, picture["sha256"]), ends) != home:  # a mined picture
            outcome = ELSEWHERE
        elif text in texts:
            outcome = TWICE
        else:
            kept.append(edited)
            texts.add(text)
        survival.add(kind, outcome)
    return kept


def _row(
    history: History,
    kept: Sequence[Edited],
    options: SelectOptions,
    folder: Path,
    steps: Mapping[str, Any],
    thresholds: Thresholds,
) -> dict[str, Any]:
    made_from = []
    for edited in kept:
        best = edited.best
        proposed = {key: value for key, value in edited.proposal.items() if key not in ("text", "from", "to", "type")}
        made_from.append({"propose": proposed, "edit": dict(best.made), "verify": dict(best.measured), "margin": best.verdict.worst})
    meta: dict[str, Any] = {
        "edits": made_from,
        "steps": steps,
        "rule": thresholds.rule,
        "margin": thresholds.margin,
        "drop": thresholds.drop,
    }
    row = to_row(group_of(history, kept, options), folder, meta)
    return row | ({"license": history.license} if history.license else {})


def group_of(history: History, kept: Sequence[Edited], options: SelectOptions) -> CounterfactualGroup:
    """Build a source's group from its ``kept`` edits. Cells that pair one edit's picture with another edit's text are unknown."""
    images: list[tuple[Path, ...]] = [() if history.picture is None else (history.picture.absolute(),)]
    texts, edits = [history.caption], []
    match: list[list[int | None]] = [[1]]
    for edited in kept:
        picture = edited.best.picture
        image = None
        texts.append(str(edited.proposal["text"]))
        match[0].append(0)
        for line in match[1:]:
            line.append(None)
        if picture is not None:
            image = len(images)
            images.append((picture.absolute(),))
            match.append([0, *[None] * (len(texts) - 2), 1])
        edits.append(Edit(str(edited.proposal["type"]), image, len(texts) - 1, str(edited.proposal["from"]), str(edited.proposal["to"])))
    candidates = tuple(Candidate(options.prompt, text) for text in texts)
    return CounterfactualGroup(history.id, tuple(images), candidates, tuple(map(tuple, match)), tuple(edits), source=options.source)


def parse_splits(text: str) -> dict[str, float]:
    """Parse ``train=0.9,test=0.1`` into shares. Raises ConfigError for malformed shares, and for shares that do not add up to 1."""
    given = {name: Given(share) for name, share in pairs(text, "--splits", "train=0.9,test=0.1").items()}
    shares: dict[str, float] = fitted(dict[str, float], given, "--splits")
    if shares and not (min(shares.values()) > 0 and abs(sum(shares.values()) - 1) < 1e-6):
        raise ConfigError(
            f"--splits {text}: shares must be positive and add up to 1 (not {sum(shares.values()):g}), as in train=0.9,test=0.1"
        )
    return shares


def _place(history: History, seed: int) -> int:
    """Hash the contents of a source's picture, so that all rows with this picture are in the same split."""
    made = next((attempt.made for edited in history.edits for attempt in edited.attempts if "parent_sha256" in attempt.made), {})
    return seed_of(seed, made.get("parent_sha256") or history.picture or history.id)


def _ends(work: WorkFolder, thresholds: Thresholds, shares: Mapping[str, float], seed: int, excluded: Container[str]) -> dict[str, float]:
    """Map each split to the upper bound of its picture hashes (see ``_place``). If fewer than ``_MANY`` pictures have a good edit, the
    bounds give each split its exact share of these pictures.
    """
    shards = range(work.shards if shares else 0)
    good = (history for shard in shards for history in histories(work, shard, thresholds, excluded) if _ranked(history))
    places = set[int]()
    while len(places) < _MANY and (history := next(good, None)) is not None:
        places.add(_place(history, seed))
    sums = dict(zip(shares, accumulate(shares.values()), strict=True))
    if len(places) == _MANY:
        return {name: total * 2**63 for name, total in sums.items()}
    order = [*sorted(places), math.inf]
    return {name: order[round(total * len(places))] for name, total in sums.items()}


def _split(place: int, ends: dict[str, float]) -> str:
    return next((name for name, end in ends.items() if place < end), next(reversed(ends), ""))


def ranges(numbers: Sequence[int]) -> str:
    """Format ascending numbers in sbatch's notation, such as ``0-3,7``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
