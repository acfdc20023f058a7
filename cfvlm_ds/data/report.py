"""Report of the data check, as an object and as text."""

from __future__ import annotations

import bisect
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from cfvlm_ds.core.conversation import DESCRIBE
from cfvlm_ds.core.groups import SHAM, CounterfactualGroup
from cfvlm_ds.core.text import one_line

_SHOWN_PROBLEMS = 50


_PROVENANCE = {"edits", "steps", "rule", "margin", "drop"}
"""Metadata that `data select` writes to record how a group was made."""
_SHOWN, _SHOWN_CHARS = 30, 60  # maximum names per line and characters per name


@dataclass
class CheckReport:
    """Counts for a manifest's valid rows, and the manifest's problems. Each problem is a sentence that begins with the file and row."""

    manifest: str
    num_groups: int = 0
    num_images: int = 0
    """Number of distinct picture files, readable or not."""
    num_texts: int = 0
    num_cells: int = 0
    num_unknown_cells: int = 0
    """Number of cells whose truth value is unknown, because ``match`` does not list them."""
    num_false_cells: int = 0
    prompts: Counter[str] = field(default_factory=Counter)
    """Number of groups by prompt: DESCRIBE (the default prompt for captions), "empty" or "others"."""
    shapes: Counter[str] = field(default_factory=Counter)
    """"images x texts" -> number of groups of that shape; a group without pictures has 0 images."""
    sources: Counter[str] = field(default_factory=Counter)
    edit_types: Counter[str] = field(default_factory=Counter)
    num_counterfactuals: Counter[int] = field(default_factory=Counter)
    """K -> number of groups with K counterfactuals. K is the number of texts that are not true of the factual image, or the number of
    images (without shams) for which the factual text is not true, whichever is larger.
    """
    text_lengths: Counter[int] = field(default_factory=Counter)
    longest_text: int = 0
    longest_text_unit: str = "characters"
    """"characters" of the text or, if the model is known, "tokens of prompt, pictures and text"."""
    longest_text_where: str = ""
    sides: Counter[int] = field(default_factory=Counter)
    """Longer side of a picture in pixels -> number of files; empty unless the pictures were opened."""
    num_repeated_rows: int = 0
    """Number of rows with the same prompts, texts and pictures as an earlier row."""
    num_repeated_pictures: int = 0
    """Number of picture files with the same contents as an earlier file."""
    visual_tokens: Counter[int] = field(default_factory=Counter)
    """Number of visual tokens -> number of distinct images with that many tokens; empty without a model."""
    metadata: Counter[str] = field(default_factory=Counter)
    """Metadata key -> number of groups that have it. Keys that record how a group was made are excluded."""
    problems: list[str] = field(default_factory=list)

    def add_group(self, group: CounterfactualGroup) -> None:
        """Add the contents of a valid group to the counts."""
        self.num_groups += 1
        self.num_texts += len(group.candidates)
        self.num_cells += len(group.images) * len(group.candidates)
        self.num_unknown_cells += sum(line.count(None) for line in group.match)
        self.num_false_cells += sum(line.count(0) for line in group.match)
        prompts = {candidate.prompt for candidate in group.candidates}
        self.prompts[repr(DESCRIBE) if prompts == {DESCRIBE} else "empty" if prompts == {""} else "others"] += 1
        self.shapes[f"{len(group.images) if group.num_pictures else 0} x {len(group.candidates)}"] += 1
        self.sources[group.source or "(none)"] += 1
        meta = json.loads(group.meta or "null")
        if isinstance(meta, dict):
            own = _PROVENANCE if isinstance(meta.get("steps"), dict) else ()  # of rows that `data select` wrote
            self.metadata.update(repr(key) for key in meta if key not in own)
        elif meta:
            self.metadata["meta"] += 1
        self.edit_types.update(edit.type for edit in group.edits)
        shams = {edit.image for edit in group.edits if edit.type == SHAM and edit.image is not None}
        images = sum(line[0] != 1 for i, line in enumerate(group.match) if i not in shams)
        self.num_counterfactuals[max(images, sum(truth != 1 for truth in group.match[0]))] += 1

    def note_length(self, length: int, unit: str, where: Callable[[], str], number: int) -> None:
        """Record a text's length and, if it is the longest text so far, its location.

        All lengths in a report have the same ``unit``. ``where`` returns the group's location, and ``number`` is the text's index in the
        group.
        """
        self.longest_text_unit = unit
        self.text_lengths[length] += 1
        if length > self.longest_text:
            self.longest_text, self.longest_text_where = length, f"{where()}, text {number}"

    def add(self, other: CheckReport) -> None:
        """Merge a report on later rows of the same manifest into this report."""
        if other.longest_text > self.longest_text:
            self.longest_text_unit, self.longest_text_where = other.longest_text_unit, other.longest_text_where
        self.longest_text = max(self.longest_text, other.longest_text)
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
            elif name.startswith("num_"):
                setattr(self, name, getattr(self, name) + value)
        self.problems += other.problems

    @property
    def ok(self) -> bool:
        """True if there are no problems."""
        return not self.problems

    @property
    def visual_range(self) -> str:
        """Minimum, median and maximum number of visual tokens per image; "" if unknown."""
        return _spread(self.visual_tokens, "per image")

    @property
    def unused(self) -> str:
        """Keys of ``metadata`` with their counts, most frequent first."""
        return f"{counted(self.metadata)} (kept, not used)"

    def __str__(self) -> str:
        lines = [("manifest", self.manifest), *(self._counts() if self.num_groups or self.ok else ())]  # counts of zero are not informative
        lines.append(("problems", str(len(self.problems)) if self.problems else "none"))
        table = [f"{name:<16} {value}" for name, value in lines]
        first: dict[str, str] = {}
        for problem in self.problems:
            first.setdefault(without_place(problem), problem)
        counts, shown = Counter(map(without_place, self.problems)), dict(itertools.islice(first.items(), _SHOWN_PROBLEMS))
        table += [f"  {problem}" + f" (and {counts[what] - 1} more like it)" * (counts[what] > 1) for what, problem in shown.items()]
        if more := len(self.problems) - sum(counts[what] for what in shown):
            table.append(f"  ... and {more} more")
        return "\n".join(table)

    def _counts(self) -> list[tuple[str, str]]:
        true = self.num_cells - self.num_false_cells - self.num_unknown_cells
        lines = {
            "groups": str(self.num_groups),
            "sources": counted(self.sources),
            "images x texts": counted(self.shapes),
            "images": ", ".join(filter(None, (f"{self.num_images} distinct files", _spread(self.sides, "pixels on the longer side")))),
            "texts": str(self.num_texts),
            "prompts": counted(self.prompts) or "none",
            "cells": f"{true} true, {self.num_false_cells} false, {self.num_unknown_cells} unknown",
            "edit types": counted(self.edit_types) or "none",
            "counterfactuals": ", ".join(f"K={k}: {count} groups" for k, count in sorted(self.num_counterfactuals.items())) or "none",
            "text lengths": _spread(self.text_lengths, f"{self.longest_text_unit} ({self.longest_text_where})"),
            "visual tokens": self.visual_range,
            "repeated": ", ".join(
                f"{n} {of}" for n, of in ((self.num_repeated_rows, "rows"), (self.num_repeated_pictures, "picture files")) if n
            ),
            "metadata": self.unused if self.metadata else "",
        }
        return [(name, line) for name, line in lines.items() if line]


def without_place(problem: str) -> str:
    """Return a problem without its file and row, so that equal problems in different rows have equal texts."""
    place = _PLACE.search(problem)
    return problem[place.end() :] if place else problem


_PLACE = re.compile(r"(?::|\bitem |\brow )\d+: ")


def _spread(counts: Counter[int], unit: str) -> str:
    """Format the minimum, median and maximum of a distribution, which is given as counts of values; return "" if it is empty."""
    if not counts:
        return ""
    values = sorted(counts)
    ends = list(itertools.accumulate(counts[value] for value in values))
    median = values[bisect.bisect_right(ends, (ends[-1] - 1) // 2)]
    return f"min {values[0]}, median {median}, max {values[-1]} {unit}"


def counted(counts: Counter[str]) -> str:
    """Return a line that lists names with their counts, most frequent first. Its length is limited."""
    shown = [f"{one_line(name, _SHOWN_CHARS)}: {count}" for name, count in counts.most_common(_SHOWN)]
    more = len(counts) - len(shown)
    return ", ".join([*shown, *[f"and {more} more"] * bool(more)])
