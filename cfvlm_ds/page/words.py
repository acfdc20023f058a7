"""Texts as runs that a page can show: the words that differ from another text are marked, and what is invisible is made visible.

A run is a string, or [marks, string] with the marks ``c`` (changed) and ``x`` (an invisible character, written out).
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence
from typing import TypeAlias

from cfvlm_ds.core.text import printable

Run: TypeAlias = str | list[str]
Span: TypeAlias = tuple[int, int]
"""First character, and the one past the last."""

MAX_TEXT = 20_000
"""Characters of a text that are shown."""
MAX_COMPARED = 40_000
"""Pairs of words of two texts, between their common beginning and end, that are compared: a hostile pair takes the cube of its length."""

_CJK = "\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_CJK}]|[^\s!-/:-@\[-`{{-~{_CJK}]+|[!-/:-@\[-`{{-~]")
"""A word, a mark of punctuation, or a character of a script that has no spaces between words."""


def changed_words(reference: str, other: str, budget: int = MAX_COMPARED) -> tuple[list[Span], list[Span]]:
    """The spans of each of two texts that the other has not, in whole words; white space does not count.

    Where more than ``budget`` pairs of words would have to be compared, everything between the common beginning and the common end.
    """
    found = [[(match.start(), match.end()) for match in _WORD.finditer(text)] for text in (reference, other)]
    words = [[text[start:end] for start, end in spans] for text, spans in zip((reference, other), found, strict=True)]
    shorter = min(map(len, words))
    first = next((k for k in range(shorter) if words[0][k] != words[1][k]), shorter)
    last = next((k for k in range(shorter - first) if words[0][-1 - k] != words[1][-1 - k]), shorter - first)
    middle = [part[first : len(part) - last] for part in words]
    changes = [(0, len(middle[0]), 0, len(middle[1]))]
    if len(middle[0]) * len(middle[1]) <= budget:
        matcher = difflib.SequenceMatcher(None, middle[0], middle[1], autojunk=False)
        changes = [(a, b, c, d) for kind, a, b, c, d in matcher.get_opcodes() if kind != "equal"]
    spans: list[list[Span]] = [[], []]
    for a, b, c, d in changes:
        for side, (start, end) in enumerate(((a, b), (c, d))):
            if start < end:
                spans[side].append((found[side][first + start][0], found[side][first + end - 1][1]))
    return _merged(spans[0], reference), _merged(spans[1], other)


def union(spans: Sequence[Span]) -> list[Span]:
    """The spans in order, those that overlap as one."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def runs(text: str, changed: Sequence[Span] = ()) -> list[Run]:
    """The text as runs; ``changed`` are spans in order that do not overlap. A text of more than MAX_TEXT characters says so at its end."""
    found: list[Run] = []
    place = 0
    for start, end in [*changed, (len(text), len(text))]:
        for marks, part in (("", text[place : min(start, MAX_TEXT)]), ("c", text[start : min(end, MAX_TEXT)])):
            found += _visible(part, marks)
        place = end
    if len(text) > MAX_TEXT:
        found.append(["x", f"({len(text) - MAX_TEXT} more characters)"])
    return found


def _merged(spans: list[Span], text: str) -> list[Span]:
    """Spans with nothing but white space between them are one."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and not text[joined[-1][1] : start].strip():
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def _visible(text: str, marks: str) -> list[Run]:
    if printable(text) == text:  # most texts, at once
        return [[marks, text] if marks else text] if text else []
    found: list[Run] = []
    shown = ""
    for place, character in enumerate(text):
        if not is_hidden(text, place):
            shown += character
            continue
        if shown:
            found.append([marks, shown] if marks else shown)
            shown = ""
        found.append([f"{marks}x", _written(character)])
    if shown:
        found.append([marks, shown] if marks else shown)
    return found


_JOINERS = "\u200c\u200d"


def is_hidden(text: str, place: int) -> bool:
    """Whether a character is invisible, or turns what follows around: all controls and formats but line breaks and tabs, and but the
    joiners that Indic scripts, Persian and emoji have between letters."""
    character = text[place]
    if character in "\n\t" or character == " ":
        return False
    kind = unicodedata.category(character)
    if character in _JOINERS:
        return not (0 < place < len(text) - 1 and min(text[place - 1], text[place + 1]) > "\x7f")
    return kind[0] == "C" or kind in ("Zl", "Zp")


def _written(character: str) -> str:
    number = ord(character)
    return f"U+{number:04X}" if number > 0x7F else printable(character)
