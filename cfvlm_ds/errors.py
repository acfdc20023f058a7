"""What an error about somebody's input is."""

from __future__ import annotations

_LONGEST = 2000  # characters


class InputError(ValueError):
    """Input that its owner can mend. The message is one printable line, whatever it quotes.

    Ids, paths and values come from files that nobody vouches for: a line break would end the sentence, an escape sequence would command
    the terminal, and half a surrogate pair cannot be printed at all. Such characters are shown as Python writes them, and a quotation of
    thousands of characters loses its middle.
    """

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST // 2]} [...] {line[-_LONGEST // 2 :]}"
        super().__init__(line)
