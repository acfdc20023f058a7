"""Audit report on a data set: shortcuts, duplicates and overlap with benchmarks. An HTML page shows the affected groups."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfvlm_ds.core.conversation import normalised
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import SHAM, Groups
from cfvlm_ds.core.progress import Progress, Say
from cfvlm_ds.core.ranks import cores_per_rank
from cfvlm_ds.core.text import few, in_cell, one_line
from cfvlm_ds.counterfactuals.audit.duplicates import NEAR, Look, look, near_pairs
from cfvlm_ds.counterfactuals.audit.shortcuts import LIMIT_AUC, Array, Shortcut, by_grain, by_length, by_words, grain
from cfvlm_ds.counterfactuals.options import AuditOptions
from cfvlm_ds.counterfactuals.verify import Score
from cfvlm_ds.counterfactuals.work_folder import seed_of
from cfvlm_ds.data.decoding import open_image
from cfvlm_ds.data.manifest import Root, named_apart, open_groups
from cfvlm_ds.evaluation.comparisons import factual_texts
from cfvlm_ds.page import Written, group_item, write_page

LIMIT_BLIND = 0.6
_SHOWN = 20  # groups on the page if there is no fault
_SCORED = 256  # groups scored at a time
_GRAINS = 5000  # maximum number of picture pairs whose grain is compared


@dataclass
class Audit:
    """Results of an audit. ``faults`` lists the exceeded limits, each as (sentence, ids of the affected groups), and ``names`` maps group
    ids to display names.
    """

    facts: list[tuple[str, str]] = field(default_factory=list)
    faults: list[tuple[str, list[str]]] = field(default_factory=list)
    shortcuts: list[Shortcut] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)

    def fault(self, sentence: str, ids: Sequence[str] = ()) -> None:
        """Record an exceeded limit: a sentence that describes it, and the ids of the affected groups."""
        self.faults.append((sentence, list(dict.fromkeys(ids))))

    def markdown(self) -> str:
        """Format the report as Markdown."""
        lines = ["# Audit\n\n| | |\n|---|---|", *(f"| {in_cell(name, 400)} | {in_cell(value, 400)} |" for name, value in self.facts), ""]
        lines += [
            f"| shortcut | result with 95 % interval (limit {LIMIT_AUC}) | pairs judged | strongest features (word counts: all pairs) |",
            "|---|---|---:|---|",
        ]
        for cue in self.shortcuts:
            lines.append(f"| {cue.name} | {cue} | {cue.pairs} | {in_cell(', '.join(cue.telling[:8]), 400)} |")
        lines += ["", "## Exceeded limits", ""]
        for sentence, ids in self.faults:
            named = f": {few([self.names[name] for name in ids])}" * bool(ids)
            lines.append(f"- {in_cell(sentence + named, 600)}")
        return "\n".join([*lines, *(["None."] if not self.faults else [])]) + "\n"


@dataclass(frozen=True)
class _Set:
    """A split. ``owners`` maps each picture to the ids of the groups that contain it, and ``looks`` maps each readable picture to its
    hashes.
    """

    name: str
    groups: Groups
    owners: Mapping[Path, list[str]]
    looks: Mapping[Path, Look]


def audit(
    manifests: Sequence[str], root: Root, format: str, options: AuditOptions, say: Say, score: Score | None = None
) -> tuple[Audit, list[_Set]]:
    """Audit all groups and pictures of a data set, which has one manifest per split. Return the report and the splits."""
    report, broken = Audit(), dict[str, str]()
    stores = {name: open_groups(path, root, format, progress=say) for name, path in named_apart(manifests).items()}
    sets = [_read_set(name, store, broken, say) for name, store in stores.items()]
    for group in (group for split in sets for group in split.groups):
        name = report.names.setdefault(group.id, group.shown_name)
        if name != group.shown_name:  # another split has a group with this id
            report.names[group.id] = group.id
    listed = ", ".join(f"{split.name} ({len(split.groups)})" for split in sets)
    report.facts.append(("groups", f"{sum(len(split.groups) for split in sets)} in {listed}"))
    if broken:
        report.fault(f"{len(broken)} pictures cannot be read; the first: {next(iter(broken.values()))}", list(broken))
    _shortcuts(report, sets, options, say)
    _duplicates(report, sets)
    if score is not None:
        _blind(report, sets, score, say)
    return report, sets


def _read_set(name: str, groups: Groups, broken: dict[str, str], say: Say) -> _Set:
    """Read a split and hash its pictures. For each picture that cannot be read, add the reason to ``broken``, keyed by the id of a group
    that uses the picture.
    """
    owners: dict[Path, list[str]] = {}
    for group in groups:
        for image in group.images:
            for picture in image:
                if group.id not in owners.setdefault(picture, []):
                    owners[picture].append(group.id)
    looks: dict[Path, Look] = {}
    for path, result in zip(owners, _looks(name, owners, say), strict=True):
        if isinstance(result, str):
            broken[owners[path][0]] = result
        else:
            looks[path] = result
    return _Set(name, groups, owners, looks)


def _looks(name: str, pictures: Collection[Path], say: Say) -> Iterator[Look | str]:
    with ThreadPoolExecutor(cores_per_rank()) as pool:
        yield from Progress(say, f"pictures of {name}", len(pictures), "pictures").over(pool.map(look, pictures))


def _shortcuts(report: Audit, sets: Sequence[_Set], options: AuditOptions, say: Say) -> None:
    texts: list[tuple[str, str]] = []
    text_halves: list[bool] = []
    pictures: list[tuple[Path, Path, bool]] = []
    for split in sets:
        for group in split.groups:
            source = group.images[0][0].name if group.num_pictures else group.id
            half = bool(seed_of("half", options.seed, source) & 1)
            pairs = [(group.candidates[true].text, group.candidates[false].text) for true, false in factual_texts(group)]
            texts += pairs
            text_halves += [half] * len(pairs)
            for edit in group.edits:
                if edit.type != SHAM and edit.image is not None and group.num_pictures == 1:
                    pictures.append((group.images[0][0], group.images[edit.image][0], half))
    if texts:
        report.shortcuts.extend([by_length(texts), by_words(texts, text_halves)])
    if len(pictures) > _GRAINS:
        pictures = random.Random(options.seed).sample(pictures, _GRAINS)
    grains: tuple[list[Array], list[Array], list[bool]] = ([], [], [])
    progress = Progress(say, "measuring the grain of pictures", len(pictures), "pairs")
    for original, edited, half in progress.over(pictures):
        try:
            pair = grain(open_image(original)), grain(open_image(edited))
        except DataError:
            continue  # already reported by _read_set
        grains[0].append(pair[0])
        grains[1].append(pair[1])
        grains[2].append(half)
    if grains[0]:
        report.shortcuts.append(by_grain(*grains))
    for cue in report.shortcuts:
        if cue.exceeds:
            report.fault(
                f"{cue.name}: AUC {cue.auc:.2f} (limit {LIMIT_AUC}) without the picture; strongest features: {', '.join(cue.telling[:4])}"
            )


def _duplicates(report: Audit, sets: Sequence[_Set]) -> None:
    """Report original (unedited) pictures that several groups share, and pictures and texts (of more than three words) that several splits
    share. Within a split, edited pictures are not compared, because edits of one picture resemble each other.
    """
    report.facts.append(("near duplicates", f"pictures whose perceptual hashes differ in at most {NEAR} of 64 bits"))
    texts = []
    for k, split in enumerate(sets):
        firsts = {group.images[0][0]: group.id for group in split.groups if group.num_pictures == 1}
        originals = [(split.looks[path], name) for path, name in firsts.items() if path in split.looks]
        own = [look for look, _ in originals]
        if pairs := [pair for pair in near_pairs(own, own) if pair[0] < pair[1]]:
            exact = sum(same for *_, same in pairs)
            ids = [originals[place][1] for *pair, _ in pairs for place in pair]
            report.fault(
                f"{split.name}: {len(pairs)} pairs of originals are identical ({exact}) or near duplicates ({len(pairs) - exact})", ids
            )
        looks, every = list(split.looks.values()), {candidate.text for group in split.groups for candidate in group.candidates}
        texts.append({normalised(text).lower() for text in every if len(text.split()) > 3})
        for other, other_texts in zip(sets[:k], texts, strict=False):
            theirs = list(other.looks.values())
            both = f"{other.name} and {split.name}"
            kinds, owners = Counter[bool](), dict[str, None]()  # there can be as many pairs as the product of the splits' sizes
            for i, j, identical in near_pairs(theirs, looks):
                kinds[identical] += 1
                owners |= dict.fromkeys((*other.owners[theirs[i].path], *split.owners[looks[j].path]))
            if kinds:
                report.fault(f"{both}: {kinds[True]} pairs of pictures are identical, and {kinds[False]} are near duplicates", [*owners])
            shared = sorted(texts[k] & other_texts)
            report.facts.append((f"texts of {both}", f"{len(shared)} in both{''.join(f', such as {text!r}' for text in shared[:1])}"))


def _blind(report: Audit, sets: Sequence[_Set], score: Score, say: Say) -> None:
    """Score all texts on a blank picture, and report how often true texts are preferred to false ones. A tie counts as one half."""
    right, total = 0.0, 0
    for split in sets:
        progress = Progress(say, f"blind scores of {split.name}", len(split.groups), "groups")
        for start in range(0, len(split.groups), _SCORED):
            groups = list(split.groups[start : start + _SCORED])
            for group, scores in zip(groups, score(groups), strict=True):
                blank = scores.blank.tolist()
                for true, false in factual_texts(group):
                    right += (blank[true] > blank[false]) + 0.5 * (blank[true] == blank[false])
                    total += 1
            progress.advance(len(groups))
    share = right / max(total, 1)
    result = f"{100 * share:.1f} % of {total} comparisons"
    report.facts.append(
        (
            "true texts preferred on a blank picture",
            result if total else "not measured: no group has a true and a false text for the same prompt",
        )
    )
    if total and max(share, 1 - share) > LIMIT_BLIND:
        report.fault(f"a scorer that sees no picture is right in {result} (limit {100 * LIMIT_BLIND:.0f})")


def write_report(report: Audit, sets: Sequence[Any], out: Path, say: Say) -> Written:
    """Write report.md and an HTML page of the affected groups to the folder ``out``."""
    about: dict[str, list[str]] = {}
    for sentence, ids in report.faults:
        for name in ids:
            about.setdefault(name, []).append(one_line(sentence, 80))
    every = [group for split in sets for group in split.groups]
    shown = [group for group in every if group.id in about] or every[:_SHOWN]
    faults = ((group, about.get(group.id, ["nothing"])) for group in shown)
    items = (group_item(group, facts=[("found", "; ".join(names))], filters={"found": names}) for group, names in faults)
    beside = {"report.md": report.markdown()}
    facts = [*report.facts, *((cue.name, str(cue)) for cue in report.shortcuts)]
    facts += [("exceeded limit", one_line(sentence, 300)) for sentence, _ in report.faults] or [("exceeded limits", "none")]
    return write_page("Audit", items, len(shown), out, facts=facts, beside=beside, say=say)
