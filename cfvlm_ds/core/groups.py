"""Counterfactual groups: images and texts, with a table that states which text is true of which image.

A group is the unit of data. Image 0 and candidate 0 are the factual pair (the anchor). Every other image or text is a counterfactual of
this pair, except for a sham: the factual image, rendered again without a change. Shapes used throughout the package: G groups, I images, C
candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from cfvlm_ds.core.conversation import PICTURE as PICTURE
from cfvlm_ds.core.conversation import Prompt as Prompt
from cfvlm_ds.core.conversation import Turn as Turn
from cfvlm_ds.core.conversation import check_conversation, normalised_prompt, pictures_of
from cfvlm_ds.core.conversation import normalised as normalised
from cfvlm_ds.core.errors import DataError

MAX_SIDE = 1024
"""Maximum number of images, and of texts, in a group."""
MAX_EDITS = 2 * MAX_SIDE
MAX_CELLS = 1 << 16
"""Maximum number of cells in a truth table."""
MAX_COMPARISONS = 1 << 18
"""Maximum number of comparisons per group in an evaluation: pairs of a true and a false cell with the same image and prompt, or with the
same text. A table with MAX_CELLS cells, half of them true, would give millions.
"""
SHAM = "sham"
"""Edit type of an image that was rendered again without a change. The factual text is still true of it."""

Pictures: TypeAlias = tuple[Path, ...]
"""Pictures of one image: usually one, several if the prompt contains several, none in a text-only group."""

Cells = Literal["anchor", "matched", "star", "full", "batch"]
"""Sets of cells that are scored in a group. Each of the first four contains the previous set.

- ``anchor``: the factual pair;
- ``matched``: every true pair;
- ``star``: also the known cells in the row and column of each prompt's anchor (its first true cell). They pair the anchor's image with the
  prompt's texts, and the anchor's text with every image. For the first prompt, they are in row 0 and column 0;
- ``full``: all cells;
- ``batch``: ``star``, plus texts of other groups in the optimizer step on each image of the group.
"""


@dataclass(frozen=True)
class Candidate:
    """A text to score and the prompt that it answers. The prompt is a string or a conversation (see cfvlm_ds.core.conversation)."""

    prompt: Prompt
    text: str


@dataclass(frozen=True)
class Edit:
    """The difference between a counterfactual and the anchor. Metrics are reported by edit type; objectives do not use edits.

    ``image`` and ``text`` are indices within the group (None if the edit has no image or no text of its own). ``source`` and ``target`` are
    the words before and after the change.
    """

    type: str
    image: int | None = None
    text: int | None = None
    source: str = ""
    target: str = ""


@dataclass(frozen=True)
class InBatchNegative:
    """A text from another group in the optimizer step, scored as an answer to the factual text's prompt.

    ``group`` is the other group's id, and ``source_group`` is its position in the step. ``number`` is the text's index in that group.
    ``share`` is the text's weight in comparisons of images.
    """

    text: str
    group: str
    number: int
    source_group: int
    share: float


@dataclass(frozen=True)
class InStep:
    """A group's position in its optimizer step, and the texts of other groups that are scored on its images."""

    place: int
    in_batch: tuple[InBatchNegative, ...]


@dataclass(frozen=True)
class CounterfactualGroup:
    """I images x C candidate texts with a truth table; (image 0, candidate 0) is the factual pair.

    ``match[i][c]`` is 1 if text c is true of image i, 0 if it is false, and None if unknown. An image is a tuple of pictures, and all
    images of a group have the same number of pictures. ``source`` is the name of the group's data set. ``objectives`` lists the terms that
    use the group; None means all terms. ``meta`` holds all further fields of the manifest's row as unparsed JSON.

    ``keys`` holds one key per text, or is empty if no text has a key. Texts with equal keys have the same meaning. If a key is "", the text
    itself is its key. ``exclude`` lists the keys of other groups' texts that must not be used as negatives of the group's images.
    ``in_step`` is added during training and never stored.
    """

    id: str
    images: tuple[Pictures, ...]
    candidates: tuple[Candidate, ...]
    match: tuple[tuple[int | None, ...], ...]
    edits: tuple[Edit, ...] = ()
    weight: float = 1.0
    source: str = ""
    meta: str = ""
    objectives: tuple[str, ...] | None = None
    keys: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    in_step: InStep | None = None

    def __post_init__(self) -> None:
        if not self.images or not self.candidates:
            raise DataError(f"group {self.id!r} needs at least one image and one text; add them")
        check_side(len(self.images), len(self.candidates), f"group {self.id!r}")
        if len(self.edits) > MAX_EDITS:
            raise DataError(
                f"group {self.id!r} has {len(self.edits)} edits, over the limit of {MAX_EDITS}; list the change of each image or text "
                "only once"
            )
        if len(self.match) != len(self.images) or any(len(row) != len(self.candidates) for row in self.match):
            raise DataError(f"group {self.id!r}: match must be {len(self.images)} images x {len(self.candidates)} texts")
        for i, line in enumerate(self.match):
            for c, truth in enumerate(line):
                if truth not in (0, 1, None):
                    raise DataError(f"group {self.id!r}: match[{i}][{c}] is {truth!r}; it must be 1, 0 or None")
        self._check_pictures()
        if not self.num_pictures and len(self.images) > 1:
            raise DataError(f"group {self.id!r}: a group without pictures must have one image entry, with the path null; split the row")
        if self.match[0][0] != 1:
            raise DataError(f"group {self.id!r}: the first image and the first text must match; list the factual pair first")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise DataError(
                f"group {self.id!r}: weight must be a positive number, not {self.weight}; to leave the group out, remove the row"
            )
        for index, candidate in enumerate(self.candidates):
            if not candidate.text.strip():
                raise DataError(f"group {self.id!r}: text {index} is empty; write a text or remove it")
        if self.keys and len(self.keys) != len(self.candidates):
            raise DataError(f"group {self.id!r} has {len(self.keys)} keys for {len(self.candidates)} texts; give every text a key, or none")
        check_comparisons(self)
        prompts = dict.fromkeys([candidate.prompt for candidate in self.candidates])
        for turns in prompts:
            if isinstance(turns, str):
                continue
            check_conversation(turns, f"group {self.id!r}")
            if (shown := pictures_of(turns)) != self.num_pictures:
                raise DataError(
                    f"group {self.id!r}: the conversation shows {shown} pictures, but each image of the group has {self.num_pictures}; "
                    "make the two numbers equal"
                )
        seen: dict[tuple[Prompt, str], int] = {}
        prompt_forms = {prompt: normalised_prompt(prompt) for prompt in prompts}
        for index, candidate in enumerate(self.candidates):
            if (first := seen.setdefault((prompt_forms[candidate.prompt], normalised(candidate.text)), index)) != index:
                other = f"text {first} ({self.candidates[first].text!r})"
                raise DataError(f"group {self.id!r}: text {index} equals {other}; counterfactuals must differ, so remove one of them")

    def _check_pictures(self) -> None:
        number = self.num_pictures
        for index, pictures in enumerate(self.images):
            if len(pictures) != number:
                raise DataError(f"group {self.id!r}: image {index} has {len(pictures)} pictures, but image 0 has {number}; split the row")

    @classmethod
    def to_score(cls, id: str, images: tuple[Pictures, ...], candidates: tuple[Candidate, ...]) -> CounterfactualGroup:
        """Build a group for scoring only. Every group needs a true cell, so the first cell is marked as true and all others as unknown."""
        texts = len(candidates)
        return cls(id, images, candidates, ((1, *[None] * (texts - 1)), *[(None,) * texts] * (len(images) - 1)))

    def with_images(self, images: tuple[Pictures, ...]) -> CounterfactualGroup:
        """Return a copy of the group with its image paths replaced by ``images``. Only one check is repeated: all images must have the same
        number of pictures.
        """
        other = self._changed(images=images)
        other._check_pictures()
        return other

    def in_the_step(self, place: int, in_batch: tuple[InBatchNegative, ...]) -> CounterfactualGroup:
        """Return a copy of the group with its position in the optimizer step and the texts of other groups to score on its images."""
        return self._changed(in_step=InStep(place, in_batch))

    def _changed(self, **changes: object) -> CounterfactualGroup:
        other = object.__new__(type(self))
        vars(other).update(vars(self), **changes)  # ten times faster than copy.copy
        return other

    @property
    def num_pictures(self) -> int:
        """Number of pictures in each image: usually 1, and 0 in a text-only group."""
        return len(self.images[0])

    @property
    def shown_name(self) -> str:
        """Name for display: the id, preceded by the first picture's file name, because a generated id means nothing to a reader."""
        return f"{self.images[0][0].name} ({self.id})" if self.images[0] else self.id

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Index of each text's prompt among the group's distinct prompts. Only texts with the same prompt can be compared."""
        numbers: dict[Prompt, int] = {}
        return tuple(numbers.setdefault(candidate.prompt, len(numbers)) for candidate in self.candidates)

    @property
    def anchors(self) -> dict[int, tuple[int, int]]:
        """First true cell (image, text) of each prompt, keyed by the prompt's index in ``prompt_ids``. For prompt 0, this is the factual
        pair. Prompts without a true cell are absent.
        """
        prompts, anchors = self.prompt_ids, dict[int, tuple[int, int]]()
        for i, line in enumerate(self.match):
            for c, truth in enumerate(line):
                if truth == 1:
                    anchors.setdefault(prompts[c], (i, c))
        return anchors


Groups: TypeAlias = Sequence[CounterfactualGroup]
"""A sequence of groups, held in memory or read on access."""


def check_comparisons(group: CounterfactualGroup) -> None:
    """Raise DataError for a group with more than MAX_COMPARISONS comparisons between a true cell and a false cell."""
    images, texts = len(group.images), len(group.candidates)
    if images * texts * (images + texts) // 4 <= MAX_COMPARISONS:  # holds for nearly all groups
        return
    of_prompt = [[c for c, prompt in enumerate(group.prompt_ids) if prompt == number] for number in set(group.prompt_ids)]
    rows = [[line[c] for c in numbers] for line in group.match for numbers in of_prompt]
    comparisons = sum(line.count(1) * line.count(0) for line in (*rows, *zip(*group.match, strict=True)))
    if comparisons > MAX_COMPARISONS:
        raise DataError(
            f"group {group.id!r} has {comparisons} comparisons of a true and a false cell, over the limit of {MAX_COMPARISONS}; "
            "split the row"
        )


def check_side(num_images: int, num_texts: int, where: str) -> None:
    """Raise DataError for a group with too many images, texts or cells (MAX_SIDE, MAX_CELLS)."""
    if max(num_images, num_texts) > MAX_SIDE:
        raise DataError(f"{where} has {num_images} images and {num_texts} texts, over the limit of {MAX_SIDE} for either; split the row")
    if num_images * num_texts > MAX_CELLS:
        raise DataError(f"{where} has {num_images} x {num_texts} pairs of images and texts, over the limit of {MAX_CELLS}; split the row")
