"""Static HTML pages that show groups with their pictures and texts. A browser can open them from a folder, without a server.

The template page.html.jinja renders plain records with autoescape, so their text is never interpreted as HTML, a script or a file name.
Each group is a ``<template>`` element in a single document, and its pictures are loaded when the group is shown. Shapes: I images, C texts.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby, islice, zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from cfvlm_ds.core.conversation import Prompt
from cfvlm_ds.core.groups import SHAM, CounterfactualGroup, Edit
from cfvlm_ds.core.progress import Progress, Say, no_op
from cfvlm_ds.core.ranks import cores_per_rank
from cfvlm_ds.core.secrets import without_secrets
from cfvlm_ds.core.sequences import differing
from cfvlm_ds.core.text import printable
from cfvlm_ds.core.untrusted import refuse_replacing, replaced
from cfvlm_ds.data.decoding import MAX_PIXELS
from cfvlm_ds.data.identity import path_in
from cfvlm_ds.page.pictures import SMALL_SIDE, Looks, difference, looks

Fact: TypeAlias = tuple[str, str]
"""Name and value of a fact that the page shows."""
Span: TypeAlias = tuple[int, int]
"""Half-open range of characters: (start, end)."""

MOST = 1000
"""Maximum number of groups on a page. If there are more, the page shows the first 1000 and a note."""
MAX_TEXT = 20_000
"""Maximum number of characters shown per text."""
MAX_COMPARED = 40_000
"""Maximum number of word pairs to compare between two texts. Without this limit, hostile texts would take cubic time."""
_SEARCHED = 1000  # number of searchable characters per group
_SHAM = "sham (rendered again; compared with the edited images only)"
_ASSETS = ("page.css", "page.js")
_MARKER = "page.json"
_NAMES = {"index.html", "pictures", "report.md", "report.json", _MARKER, *_ASSETS}


# ---- records, independent of manifests, models and HTML


@dataclass(frozen=True)
class Image:
    """An image on a page: its picture files and its label."""

    pictures: Sequence[Path]
    label: str


@dataclass(frozen=True)
class Text:
    """A text and the index of its prompt. ``reference`` is the index of the text that its words are compared with, or None."""

    text: str
    label: str = ""
    prompt: int = 0
    reference: int | None = None


@dataclass(frozen=True)
class ScoreTable:
    """Scores of every cell, such as a model's log-likelihoods.

    ``rows`` ``[I][C]`` holds the scores, and ``blank`` ``[C]`` the texts' scores on a blank image. ``margins`` ``[I][C]`` holds two margins
    for each true cell: over the best false text on its image, and over the best false image for its text. A margin is None if there is no
    such text or image. For a cell that is not true, the entry is None. ``decided`` holds the margin of each comparison of two texts or
    images, and ``lengths`` holds the word count of the longer text in each comparison.
    """

    rows: Sequence[Sequence[float | None]]
    blank: Sequence[float] = ()
    margins: Sequence[Sequence[Sequence[float | None] | None]] = ()
    decided: Sequence[float] = ()
    lengths: Sequence[int] = ()

    @property
    def lost(self) -> int:
        """Number of lost comparisons, including ties."""
        return sum(not margin > 0 for margin in self.decided)

    @property
    def rank(self) -> float | None:
        """Smallest margin per word that is not NaN, or None if there is no such margin. Groups are sorted by it.

        Margins are divided by the word count because they are sums over tokens, which grow with the length of a text.
        """
        lengths = self.lengths or (1,) * len(self.decided)
        return min((margin / length for margin, length in zip(self.decided, lengths, strict=True) if margin == margin), default=None)


@dataclass(frozen=True)
class Item:
    """One group: pictures, texts, a truth table (1, 0, or None for unknown), and other facts.

    ``filters`` maps each filter's name, such as "edit type", to the group's values. ``meta`` is metadata that is shown verbatim. Picture
    paths are shown relative to ``roots``.
    """

    id: str
    images: Sequence[Image]
    texts: Sequence[Text]
    match: Sequence[Sequence[int | None]]
    prompts: Sequence[Prompt] = ()
    facts: Sequence[Fact] = ()
    changes: Sequence[str] = ()
    scores: ScoreTable | None = None
    filters: Mapping[str, Sequence[str]] = field(default_factory=dict)
    meta: str = ""
    roots: Sequence[Path] = ()


@dataclass(frozen=True)
class Written:
    """A written page: its folder, and the number of its groups and pictures. ``problems`` maps each picture that could not be shown to the
    reason.
    """

    folder: Path
    num_items: int
    num_pictures: int
    problems: dict[Path, str]

    def _repr_html_(self) -> str:
        """Return an iframe that shows the page in a notebook. The page's folder must be below the notebook's folder."""
        style = "width: 100%; height: 820px; border: 1px solid #8884; border-radius: 6px"
        return Markup('<iframe src="{}/index.html" style="{}" title="groups"></iframe>').format(os.path.relpath(self.folder), style)


def group_item(
    group: CounterfactualGroup,
    scores: ScoreTable | None = None,
    *,
    facts: Sequence[Fact],
    filters: Mapping[str, Sequence[str]],
    roots: Sequence[Path] = (),
) -> Item:
    """Build a group's item for a page. Images and texts are labelled with their edit types. Each text's words are compared with those of
    the anchor text for the same prompt. ``facts`` and ``filters`` are added to those derived from the group. ``roots`` are the folders of
    its pictures.
    """
    numbers = group.prompt_ids
    prompts = list(dict.fromkeys(candidate.prompt for candidate in group.candidates))
    anchors = {number: numbers.index(number) for number in numbers} | {number: c for number, (_, c) in group.anchors.items()}

    def label(kind: str, place: int) -> str:
        types = dict.fromkeys(edit.type for edit in group.edits if getattr(edit, kind) == place)
        return ", ".join(_SHAM if edit_type == SHAM else edit_type for edit_type in types) if place else "factual"

    own: list[Fact] = [("source", group.source)] * bool(group.source) + [("weight", f"{group.weight:g}")] * (group.weight != 1)
    return Item(
        id=group.id,
        images=[Image(pictures, label("image", i)) for i, pictures in enumerate(group.images)],
        texts=[
            Text(candidate.text, label("text", c), numbers[c], None if anchors[numbers[c]] == c else anchors[numbers[c]])
            for c, candidate in enumerate(group.candidates)
        ],
        match=group.match,
        prompts=prompts if any(prompts) else (),
        facts=[*own, *facts],
        changes=[_change(edit) for edit in group.edits],
        scores=scores,
        filters={
            "edit type": list(dict.fromkeys(edit.type for edit in group.edits)) or ["unlabelled"],
            "source": [group.source or "(none)"],
            **filters,
        },
        meta=group.meta and json.dumps(json.loads(group.meta), ensure_ascii=False, indent=1),
        roots=roots,
    )


def _change(edit: Edit) -> str:
    words = f": {edit.source or '(nothing)'} \N{RIGHTWARDS ARROW} {edit.target or '(nothing)'}" if edit.source or edit.target else ""
    places = [f"{kind} {place}" for kind, place in (("image", edit.image), ("text", edit.text)) if place is not None]
    return f"{edit.type}{words}{' (' * bool(places)}{', '.join(places)}{')' * bool(places)}"


# ---- the folder


def refuse_foreign_folder(out: Path) -> Path:
    """Resolve a page's output folder, which must be new or contain an earlier page. Raises ConfigError for any other folder."""
    return refuse_replacing(out, _MARKER, names=_NAMES)


def write_page(
    title: str,
    items: Iterable[Item],
    total: int,
    out: Path,
    *,
    facts: Sequence[Fact] = (),
    scored: str = "log p(text | image) in nats",
    beside: Mapping[str, str] = MappingProxyType({}),
    max_pixels: int = MAX_PIXELS,
    say: Say = no_op,
) -> Written:
    """Write a page of ``total`` items (at most the first ``MOST`` are shown) to a folder. An earlier page is replaced when the new page is
    complete.

    ``scored`` describes the values in the score tables. ``beside`` maps names of additional files to their texts. Items are consumed one at
    a time. Only the page (without its pictures) and up to 2048 downsampled pictures (at most 57 MB) are kept in memory.

    Raises the same errors as refuse_foreign_folder, and StorageError if the folder cannot be written.
    """
    if total > MOST:
        facts = [
            *facts,
            ("shown", shown := f"the first {MOST} of {total} groups, because browsers are slow with more; select fewer to see others"),
        ]
        say(f"note: {shown}")
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(runs=runs, number=_number)
    groups: list[dict[str, Any]] = []
    filters: dict[str, Counter[str]] = defaultdict(Counter)
    problems: dict[Path, str] = {}
    with replaced(out, _MARKER, names=_NAMES) as folder, ThreadPoolExecutor(cores_per_rank()) as pool:
        (folder / "pictures").mkdir()
        look = looks(folder, max_pixels)
        for item in Progress(say, "page", min(total, MOST), "groups").over(islice(items, MOST)):
            list(pool.map(look, dict.fromkeys(picture for image in item.images for picture in image.pictures)))
            searched = " ".join([item.id, *(text.text[:_SEARCHED] for text in item.texts)])[:_SEARCHED]
            chosen = {name: [printable(value) for value in dict.fromkeys(values)] for name, values in item.filters.items()}
            for name, values in chosen.items():
                filters[name].update(values)
            about = {"filters": json.dumps(chosen), "searched": " ".join(searched.lower().split())}
            groups.append({"item": item, "marks": _marks(item.texts), "pictures": _pictures(item, look, problems), **about})
        page = environment.get_template("page.html.jinja").render(
            title=title, facts=[(name, without_secrets(value)) for name, value in facts], scored=scored, filters=filters, groups=groups
        )
        (folder / "index.html").write_text(page, "utf-8", "xmlcharrefreplace")
        for name, text in beside.items():
            (folder / name).write_text(text, "utf-8")
        for name in _ASSETS:
            shutil.copyfile(Path(__file__).with_name(name), folder / name)
        (folder / _MARKER).write_text(json.dumps({"schema": "cfpage/3"}))
        pictures = len(os.listdir(folder / "pictures"))
    return Written(out.resolve(), len(groups), pictures, problems)


def _number(value: float | None, signed: bool = False) -> str:
    if value is None:
        return "\N{EN DASH}"
    return f"{'+' * (signed and value > 0)}{value:.1f}".replace("-", "\N{MINUS SIGN}")


# ---- words

_CJK = "\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_CJK}]|[^\s!-/:-@\[-`{{-~{_CJK}]+|[!-/:-@\[-`{{-~]")
"""A word, a punctuation mark, or a character of a script without spaces between words."""


def changed_words(reference: str, other: str) -> tuple[list[Span], list[Span]]:
    """Compare two texts, ignoring white space. Return the spans of whole words that differ, for each text.

    If there are more than MAX_COMPARED word pairs, everything between the common beginning and the common end counts as changed.
    """
    word_matches = [list(_WORD.finditer(text)) for text in (reference, other)]
    words = [[match[0] for match in matches] for matches in word_matches]
    span = differing(*words)
    first, (one, two) = span[0].start, (part[own] for part, own in zip(words, span, strict=True))
    changes = [("replace", 0, len(one), 0, len(two))]
    if len(one) * len(two) <= MAX_COMPARED:
        changes = difflib.SequenceMatcher(None, one, two, autojunk=False).get_opcodes()  # type: ignore[assignment]
    spans: tuple[list[Span], list[Span]] = [], []
    for kind, *ends in changes:
        for side, (start, end) in enumerate((ends[:2], ends[2:])):
            if kind != "equal" and start < end:
                spans[side].append((word_matches[side][first + start].start(), word_matches[side][first + end - 1].end()))
    return spans


def _marks(texts: Sequence[Text]) -> list[bytes]:
    """Compare each text with its reference text, and mark the words that differ in both texts. For each text, return one byte per character
    (1 if marked), or b"" if nothing is marked.
    """
    marks = [bytearray(len(text.text)) for text in texts]
    for c, text in enumerate(texts):
        if text.reference is not None:
            for place, spans in zip((text.reference, c), changed_words(texts[text.reference].text, text.text), strict=True):
                for start, end in spans:
                    marks[place][start:end] = b"\1" * (end - start)
    return [bytes(mark) if any(mark) else b"" for mark in marks]


def runs(text: str, marks: bytes = b"") -> Iterator[tuple[bool, bool, str]]:
    """Yield (changed, hidden, text) for each part of a text. ``changed`` is True if ``marks`` marks the part, and ``hidden`` if the part is
    a substitute: a code point for a hidden character, or the number of characters beyond MAX_TEXT.
    """
    shown = text[:MAX_TEXT]
    kinds = ((bool(marks and marks[k]), k if _is_hidden(shown, k) else -1) for k in range(len(shown)))
    if not marks and printable(shown) == shown:  # true of most texts
        yield False, False, shown
    else:
        for (changed, hidden), part in groupby(zip(kinds, shown, strict=True), lambda pair: pair[0]):
            yield changed, hidden >= 0, f"U+{ord(shown[hidden]):04X}" if hidden >= 0 else "".join(c for _, c in part)
    if len(text) > MAX_TEXT:
        yield False, True, f"({len(text) - MAX_TEXT} more characters)"


def _is_hidden(text: str, place: int) -> bool:
    """Return True if a character is invisible or changes the direction of the text after it.

    These are all control and format characters except line breaks, tabs, and the joiners between letters in Indic scripts, Persian and
    emoji.
    """
    character = text[place]
    if printable(character) == character or character in "\n\t" or unicodedata.category(character) == "Zs":
        return False
    return character not in "\u200c\u200d" or not (0 < place < len(text) - 1 and min(text[place - 1], text[place + 1]) > "\x7f")


# ---- pictures


def _pictures(item: Item, look: Looks, problems: dict[Path, str]) -> list[list[dict[str, Any]]]:
    """Describe each image's pictures for the template. A description contains the copy of a picture and its difference from the factual
    picture, or the reason why the picture cannot be shown. The reason is also added to ``problems``.

    If there are only two images, the factual picture is compared with the other one.
    """
    drawn: list[list[dict[str, Any]]] = []
    prefixes = [root.parts for root in item.roots]
    for i, image in enumerate(item.images):
        alt = f"image {i}{': ' * bool(image.label)}{image.label}"
        if 1 in item.match[i]:
            alt += f"; true text: {item.texts[item.match[i].index(1)].text[:MAX_TEXT]}"
        other = 1 if i == 0 and len(item.images) == 2 else 0
        drawn.append([])
        for path, against in zip_longest(image.pictures, item.images[other].pictures[: len(image.pictures)] if other != i else ()):
            shown: dict[str, Any] = {"name": without_secrets(path_in(path, prefixes)), "alt": alt}
            drawn[-1].append(shown)
            if isinstance(seen := look(path), str):
                problems[path] = seen
                shown["missing"] = without_secrets(seen)
                continue
            shown |= {"src": seen.name, "size": seen.size, "small": max(seen.size) < SMALL_SIDE}
            if against is None or isinstance(factual := look(against), str):
                continue
            outline, share = "", 0.0
            if factual.size == seen.size and factual.name != seen.name:
                outline, share = difference(factual.grid, seen.grid)
            if outline:
                shown |= {"outline": outline, "grid": seen.grid.shape[1::-1]}
            if i:
                percent = f"{100 * share:.0f} %" if share >= 0.01 else "less than 1 %"
                shown["note"] = (
                    f"image {other} has another size, {factual.size[0]} x {factual.size[1]}"
                    if factual.size != seen.size
                    else f"the same pixels as image {other}"
                    if factual.name == seen.name
                    else f"differs from image {other} in {percent} of its area"
                    if share
                    else f"differs invisibly from image {other}"
                )
    return drawn
