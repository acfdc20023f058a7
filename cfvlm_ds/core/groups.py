"""Counterfactual groups: images x texts with a truth table, as plain data.

A group is the unit of data. Image 0 and candidate 0 are the factual pair (the anchor); everything else is a counterfactual of it, or a
sham: the anchor re-rendered with nothing changed. Shapes used throughout the package: G groups, I images, C candidates.
"""

from __future__ import annotations

import math
from collections import Counter
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
"""Images, and texts, that a group may have."""
MAX_EDITS = 2 * MAX_SIDE
MAX_CELLS = 1 << 16
"""Cells of its truth table."""
MAX_COMPARISONS = 1 << 18
"""Pairs of a true and a false cell of one image and prompt, or of one text: what an evaluation compares. 256 images with a text each have
half as many; half of so many cells true, and half false, would have millions."""
MAX_REPORTED = 1 << 21
"""Comparisons, each counted for all edits of one of its images or texts: an evaluation looks at these for each."""
SHAM = "sham"
"""Edit type of an image that was rendered again with nothing changed: a positive for the factual text."""

Pictures: TypeAlias = tuple[Path, ...]
"""What a text is scored with: one picture as a rule, several where a prompt shows several, none for text alone."""

Cells = Literal["anchor", "matched", "star", "full", "batch"]
"""Which cells of a group are scored, each set containing the one before.

- ``anchor``: the factual pair;
- ``matched``: every true pair;
- ``star``: also, where the truth is known, the row and column of each prompt's anchor (its first true cell): the anchor's image with the
  texts of that prompt, the anchor's text with every image. For the first prompt these are row 0 and column 0;
- ``full``: everything;
- ``batch``, which is no set of the group alone: the star and, on each of its images, texts of other groups of the optimizer step.
"""


@dataclass(frozen=True)
class Candidate:
    """A text to be scored, and the prompt it answers: a string, or a conversation (see cfvlm_ds.core.conversation)."""

    prompt: Prompt
    text: str


@dataclass(frozen=True)
class Edit:
    """What distinguishes a counterfactual from the anchor; used to slice metrics, never by an objective.

    ``image`` and ``text`` are indices into the group (None where the edit has no image, or no text, of its own); ``source`` and ``target``
    are the words that changed.
    """

    type: str
    image: int | None = None
    text: int | None = None
    source: str = ""
    target: str = ""


@dataclass(frozen=True)
class InBatchNegative:
    """A text of another group of an optimizer step, scored as an answer to the factual text's prompt.

    ``group`` and ``number`` are the other group's id and which of its texts it is; ``source_group`` is that group's place in the step;
    ``share`` is the weight of its comparison between images.
    """

    text: str
    group: str
    number: int
    source_group: int
    share: float


@dataclass(frozen=True)
class InStep:
    """A group's place in its optimizer step, and the texts of other groups that are scored on its images."""

    place: int
    in_batch: tuple[InBatchNegative, ...]


@dataclass(frozen=True)
class CounterfactualGroup:
    """I images x C candidate texts with a truth table; (image 0, candidate 0) is the factual pair.

    ``match[i][c]`` is 1 where text c is true of image i, 0 where it is false, None where that is unknown. An image is a tuple of pictures,
    as many as every other image of its group has. ``source`` names the data set it comes from; ``objectives`` those that it counts in, None
    for all. ``meta`` is what else its row says, as JSON: read by nothing, and kept.

    ``keys`` name what each text says, "" for the text itself; none where no text has one. ``exclude`` lists the keys of other groups' texts
    that must not be taken for false of the group's images. ``in_step`` is what a training adds; no file has it.
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
            raise DataError(f"group {self.id!r} needs at least one image and one text")
        check_side(len(self.images), len(self.candidates), f"group {self.id!r}")
        if len(self.edits) > MAX_EDITS:
            raise DataError(
                f"group {self.id!r} has {len(self.edits)} edits, and {MAX_EDITS} is the bound; name what each image or text changes once"
            )
        if len(self.match) != len(self.images) or any(len(row) != len(self.candidates) for row in self.match):
            raise DataError(f"group {self.id!r}: match must be {len(self.images)} images x {len(self.candidates)} texts")
        for i, line in enumerate(self.match):
            for c, truth in enumerate(line):
                if truth not in (0, 1, None):
                    raise DataError(f"group {self.id!r}: match[{i}][{c}] is {truth!r}; it must be 1, 0 or None")
        self._check_pictures()
        if not self.num_pictures and len(self.images) > 1:
            raise DataError(f"group {self.id!r}: a group without an image has one image entry, with the path null; split the row")
        if self.match[0][0] != 1:
            raise DataError(f"group {self.id!r}: the first image and the first text must match; list the factual pair first")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise DataError(f"group {self.id!r}: weight must be a positive number, not {self.weight}; drop the row to leave it out")
        for index, candidate in enumerate(self.candidates):
            if not candidate.text.strip():
                raise DataError(f"group {self.id!r}: text {index} is empty; write a text or remove it")
        if self.keys and len(self.keys) != len(self.candidates):
            raise DataError(f"group {self.id!r}: {len(self.keys)} keys for {len(self.candidates)} texts; give each text one, or none")
        check_comparisons(self)
        prompts = dict.fromkeys([candidate.prompt for candidate in self.candidates])
        for turns in prompts:
            if isinstance(turns, str):
                continue
            check_conversation(turns, f"group {self.id!r}")
            if (shown := pictures_of(turns)) != self.num_pictures:
                raise DataError(
                    f"group {self.id!r}: the conversation shows {shown} pictures, and an image has {self.num_pictures}; name a picture for "
                    "every place, and a place for every picture"
                )
        seen: dict[tuple[Prompt, str], int] = {}
        asked = {prompt: normalised_prompt(prompt) for prompt in prompts}
        for index, candidate in enumerate(self.candidates):
            if (first := seen.setdefault((asked[candidate.prompt], normalised(candidate.text)), index)) != index:
                other = f"text {first} ({self.candidates[first].text!r})"
                raise DataError(f"group {self.id!r}: text {index} equals {other}; a counterfactual must differ, remove one of them")

    def _check_pictures(self) -> None:
        number = self.num_pictures
        for index, pictures in enumerate(self.images):
            if len(pictures) != number:
                raise DataError(f"group {self.id!r}: image {index} has {len(pictures)} pictures and image 0 has {number}; split the row")

    def with_images(self, images: tuple[Pictures, ...]) -> CounterfactualGroup:
        """The same group with as many images under other paths; what is not about pictures is not checked a second time."""
        other = self._changed(images=images)
        other._check_pictures()
        return other

    def in_the_step(self, place: int, in_batch: tuple[InBatchNegative, ...]) -> CounterfactualGroup:
        """The same group at a place of an optimizer step, with the texts of others that are scored on its images."""
        return self._changed(in_step=InStep(place, in_batch))

    def _changed(self, **changes: object) -> CounterfactualGroup:
        other = object.__new__(type(self))
        vars(other).update(vars(self), **changes)  # copy.copy does the same in ten times the time
        return other

    @property
    def num_pictures(self) -> int:
        """Pictures that a text is scored with: 1 as a rule, 0 without an image."""
        return len(self.images[0])

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """A number per text, equal where texts answer one prompt: only those can be compared with each other."""
        numbers: dict[Prompt, int] = {}
        return tuple(numbers.setdefault(candidate.prompt, len(numbers)) for candidate in self.candidates)

    @property
    def anchors(self) -> dict[int, tuple[int, int]]:
        """Prompt (of prompt_ids) -> its first true (image, text), for the first prompt the factual pair; none where nothing is true."""
        prompts, found = self.prompt_ids, dict[int, tuple[int, int]]()
        for i, line in enumerate(self.match):
            for c, truth in enumerate(line):
                if truth == 1:
                    found.setdefault(prompts[c], (i, c))
        return found


def check_comparisons(group: CounterfactualGroup) -> None:
    """Raise DataError for a group that an evaluation would compare, and look up edits for, without end."""
    images, texts = len(group.images), len(group.candidates)
    if images * texts * (images + texts) // 4 * max(1, len(group.edits)) <= MAX_COMPARISONS:  # as nearly all have
        return
    of_prompt = [[c for c, each in enumerate(group.prompt_ids) if each == number] for number in set(group.prompt_ids)]
    rows = [[line[c] for c in numbers] for line in group.match for numbers in of_prompt]
    found = sum(line.count(1) * line.count(0) for line in (*rows, *zip(*group.match, strict=True)))
    if found > MAX_COMPARISONS:
        raise DataError(
            f"group {group.id!r} has {found} comparisons of a true and a false cell, and {MAX_COMPARISONS} is the bound; split the row"
        )
    parts = Counter(part for edit in group.edits for part in (("image", edit.image), ("text", edit.text)) if part[1] is not None)
    most = max(parts.values(), default=1)
    if found * most > MAX_REPORTED:
        raise DataError(
            f"group {group.id!r} has {found} comparisons and {most} edits of one image or text, and {MAX_REPORTED} is the bound for their "
            "product; name what each image or text changes once, or split the row"
        )


def check_side(num_images: int, num_texts: int, where: str) -> None:
    """Raise DataError for a group that is larger than any forward could take."""
    if max(num_images, num_texts) > MAX_SIDE:
        raise DataError(f"{where} has {num_images} images and {num_texts} texts, and {MAX_SIDE} is the bound for either; split the row")
    if num_images * num_texts > MAX_CELLS:
        raise DataError(f"{where} has {num_images} x {num_texts} images and texts, and {MAX_CELLS} pairs are the bound; split the row")
