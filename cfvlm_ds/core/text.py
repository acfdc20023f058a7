"""Texts of somebody else's, such as names in rows of data, where a person reads them; and what stands for one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from itertools import islice


def hashed(content: str | bytes) -> int:
    """64 bits that stand for a text, or for bytes."""
    content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def printable(text: str) -> str:
    """The text with what is no printable character as Python writes it: an escape sequence would command the terminal, a line break end a
    sentence, and half of a surrogate pair cannot be printed at all."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(text: str, most: int) -> str:
    """The text on one line of a log or table, of at most ``most`` characters and three dots."""
    text = printable(" ".join(text[: 2 * most].split()) if len(text) > 2 * most else " ".join(text.split()))
    return text if len(text) <= most else f"{text[:most]}..."


def few(names: Collection[str], most: int = 5) -> str:
    """The first of some names, each on one line, and dots where there are more."""
    return ", ".join(one_line(each, 60) for each in islice(names, most)) + ", ..." * (len(names) > most)


def quoted(value: object, most: int = 200) -> str:
    """A value as Python writes it, on one line of a message."""
    return one_line(repr(value), most)


def in_cell(text: str, most: int = 60) -> str:
    """A text on one line of a Markdown table that is nothing but text there: no bar, no HTML, no link and no picture, which a reader's
    program would fetch."""
    return re.sub(r"[\\|\[]", r"\\\g<0>", one_line(text, most)).replace("<", "&lt;")
