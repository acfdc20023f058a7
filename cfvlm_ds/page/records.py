"""What a page shows, as plain records: nothing here knows of manifests, models or HTML. Shapes: I images, C texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

Fact: TypeAlias = tuple[str, str]
"""A name and what is said under it."""

Prompt: TypeAlias = str | Sequence[tuple[str, Sequence[str | None]]]
"""What a text answers: a string, or turns of (role, parts), where None stands for a picture in its place."""

Margin: TypeAlias = tuple[float | None, float | None]
"""By how much a true cell beats the best false text on its image, and the best false image for its text; None where there is none."""


@dataclass(frozen=True)
class Image:
    """What a text is scored with: pictures by their files, and a line that says what it is."""

    pictures: Sequence[Path]
    label: str


@dataclass(frozen=True)
class Text:
    """A text, and which of the item's prompts it answers; ``reference`` is the text that its words are compared with, if any."""

    text: str
    label: str = ""
    prompt: int = 0
    reference: int | None = None


@dataclass(frozen=True)
class ScoreTable:
    """Scores of every cell, such as a model's log-likelihoods; several tables of one item are shown side by side.

    ``rows`` is ``[I][C]``; ``blank`` ``[C]`` are the texts without an image. ``margins`` is ``[I][C]``, None for cells that are compared
    with nothing. ``compared`` is how many comparisons the table decides, ``lost`` how many of them wrongly, ``worst`` the least margin.
    """

    name: str
    rows: Sequence[Sequence[float]]
    blank: Sequence[float] = ()
    margins: Sequence[Sequence[Margin | None]] = ()
    compared: int = 0
    lost: int = 0
    worst: float | None = None


@dataclass(frozen=True)
class Item:
    """One group: pictures, texts, a truth table of 1, 0 or None (unknown), and what is known of it.

    ``filters`` are values by the name of a filter; ``meta`` is further text, shown as it is.
    """

    id: str
    images: Sequence[Image]
    texts: Sequence[Text]
    match: Sequence[Sequence[int | None]]
    prompts: Sequence[Prompt] = ()
    facts: Sequence[Fact] = ()
    changes: Sequence[str] = ()
    scores: Sequence[ScoreTable] = ()
    filters: Mapping[str, Sequence[str]] = field(default_factory=dict)
    meta: str = ""


@dataclass(frozen=True)
class Page:
    """A page of items, which are asked for one by one and once. ``total`` is how many there will be, for the progress; ``scored`` says what
    the numbers of its score tables are."""

    title: str
    items: Iterable[Item]
    total: int
    facts: Sequence[Fact] = ()
    scored: str = "log p(text | image) in nats"
