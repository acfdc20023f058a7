"""Display of untrusted text, such as names in data rows; also 64-bit hashes of texts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from itertools import groupby, islice, zip_longest


def hashed(content: str | bytes) -> int:
    """Hash a text, or bytes, to 64 bits."""
    content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def printable(text: str) -> str:
    """Return the text with unprintable characters escaped in Python's notation. Otherwise, an escape sequence could control the terminal, a
    line break would end the message, and an unpaired surrogate could not be printed.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(text: str, most: int) -> str:
    """Format a text for one line of a log or table. A text of more than ``most`` characters is cut and ends in three dots."""
    text = printable(" ".join(text[: 2 * most].split()) if len(text) > 2 * most else " ".join(text.split()))
    return text if len(text) <= most else f"{text[:most]}..."


def few(names: Collection[str], most: int = 5) -> str:
    """Join the first ``most`` names with commas, and add an ellipsis if there are more. Long names are cut."""
    return ", ".join(one_line(name, 60) for name in islice(names, most)) + ", ..." * (len(names) > most)


def quoted(value: object, most: int = 200) -> str:
    """Format a value's repr for one line of a message, cut to ``most`` characters."""
    return one_line(repr(value), most)


def in_cell(text: str, most: int = 60) -> str:
    """Format a text for a cell of a Markdown table. Pipes, HTML, links and images are escaped, so that a viewer does not fetch the
    images.
    """
    return re.sub(r"[\\|\[\]]", r"\\\g<0>", one_line(text, most)).replace("<", "&lt;")


def plain_tables(markdown: str) -> str:
    """Reformat the Markdown tables in a text for a terminal, with columns of fixed width and without rules, pipes or the escapes of
    ``in_cell``.
    """
    blocks: list[str] = []
    for is_table, lines in groupby(markdown.split("\n"), lambda line: line.startswith("|")):
        if not is_table:
            blocks += lines
            continue
        head, rule, *rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines)
        table = [[re.sub(r"\\(.)", r"\1", cell).replace("&lt;", "<") for cell in row] for row in (head, *rows)]
        widths = [max(map(len, column)) for column in zip_longest(*table, fillvalue="")]
        to_right = [k < len(rule) and rule[k].endswith(":") for k in range(len(widths))]
        for row in table:
            cells = (cell.rjust(widths[k]) if to_right[k] else cell.ljust(widths[k]) for k, cell in enumerate(row))
            blocks.append("  ".join(cells).rstrip())
    return "\n".join(blocks)
