"""What an error about somebody's input is, and what no message may hold."""

from __future__ import annotations

import re

_LONGEST = 2000  # characters
_USERINFO = re.compile(r":(//?)[^/\s@]+@(?=\S)")  # pathlib makes one slash of two


def without_passwords(text: str) -> str:
    """The text with *** in place of the user and password of every URL in it."""
    return _USERINFO.sub(r":\1***@", text)


class InputError(ValueError):
    """Input that its owner can mend. The message is one printable line without passwords, whatever it quotes.

    Ids, paths and values come from files that nobody vouches for: a line break would end the sentence, an escape sequence would command
    the terminal, and half a surrogate pair cannot be printed at all. Such characters are shown as Python writes them, and a quotation of
    thousands of characters loses its middle.
    """

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in without_passwords(message))
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST // 2]} [...] {line[-_LONGEST // 2 :]}"
        super().__init__(line)
