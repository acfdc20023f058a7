"""Comparisons defined by a group's truth table. Apart from marking sham images, the group's edits only determine the edit type under which
a comparison is reported.

Unknown cells are never compared. Texts are compared only if they answer the same prompt. A sham image shows the factual scene again, so it
is used only in ``sham`` comparisons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from typing import Literal

from cfvlm_ds.core.groups import SHAM, CounterfactualGroup

UNLABELLED = "unlabelled"
"""Edit type reported for comparisons without a labelled edit."""

Kind = Literal["quad", "text", "image", "sham"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A comparison and its reported edit types (usually one).

    ``at`` contains indices into the score matrix. Their meaning depends on ``kind``:

    - ``quad``: (i, j, c, d), for images i and j and texts c and d of one prompt. c is true only of i, and d is true only of j. (i, c) is
      the prompt's anchor, its first true cell. For the prompt of the factual text, the anchor is the factual pair;
    - ``text``: (i, c, d), for an image i, a text c that is true of it, and a text d of the same prompt that is false of it;
    - ``image``: (c, i, j), for a text c, an image i for which it is true, and an image j for which it is false;
    - ``sham``: (c, i, j), for the factual text c, a sham image i, and an image j for which the text is false.
    """

    kind: Kind
    at: tuple[int, ...]
    labels: tuple[str, ...]

    @property
    def cells(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The true cell and the other cell, each as (image, text). Not defined for ``quad``."""
        a, b, c = self.at
        return ((a, b), (a, c)) if self.kind == "text" else ((b, a), (c, a))


def comparisons(group: CounterfactualGroup) -> Iterator[Comparison]:
    """Yield every comparison of the group, in a fixed order."""
    match, labels = group.match, _Labels(group)
    shams = {edit.image for edit in group.edits if edit.type == SHAM and edit.image and match[edit.image][0] == 1}
    images = [i for i in range(len(group.images)) if i not in shams]
    prompts: dict[int, list[int]] = {}
    for c, prompt in enumerate(group.prompt_ids):
        prompts.setdefault(prompt, []).append(c)
    for texts in prompts.values():
        for i, c in islice(((i, c) for i, c in product(images, texts) if match[i][c] == 1), 1):
            against = [d for d in texts if match[i][d] == 0]
            for j, d in product([j for j in images if match[j][c] == 0], against):
                if match[j][d] == 1:
                    yield Comparison("quad", (i, j, c, d), labels((i, j), (c, d)))
        for i in images:
            true, false = ([c for c in texts if match[i][c] == truth] for truth in (1, 0))
            for c, d in product(true, false):
                yield Comparison("text", (i, c, d), labels((i,), (c, d)))
    for c in range(len(group.candidates)):
        true, false = ([i for i in images if match[i][c] == truth] for truth in (1, 0))
        for i, j in product(true, false):
            yield Comparison("image", (c, i, j), labels((i, j), (c,)))
    for i, j in product(sorted(shams), images):
        if match[j][0] == 0:
            yield Comparison("sham", (0, i, j), labels((j,), ()))


def factual_texts(group: CounterfactualGroup) -> list[tuple[int, int]]:
    """Return the indices (true text, false text) of every text comparison on the factual image."""
    return [each.at[1:] for each in comparisons(group) if each.kind == "text" and each.at[0] == 0]  # type: ignore[misc]


class _Labels:
    """Callable that labels a comparison with the types of the edits that share the most images and texts with it."""

    def __init__(self, group: CounterfactualGroup) -> None:
        self.edits = [edit for edit in group.edits if edit.type not in (SHAM, "")]
        self.of_image: dict[int | None, list[int]] = {}
        self.of_text: dict[int | None, list[int]] = {}
        for number, edit in enumerate(self.edits):
            self.of_image.setdefault(edit.image, []).append(number)
            self.of_text.setdefault(edit.text, []).append(number)

    def __call__(self, images: tuple[int, ...], texts: tuple[int, ...]) -> tuple[str, ...]:
        shared = Counter(number for image in images for number in self.of_image.get(image, ()))
        shared.update(number for text in texts for number in self.of_text.get(text, ()))
        most = max(shared.values(), default=0)
        return tuple(sorted({self.edits[number].type for number, parts in shared.items() if parts == most})) or (UNLABELLED,)
