"""Conversations as prompts. A prompt is a string or a conversation: a sequence of turns that interleave text and pictures.

A string is shorthand for a single user turn with all pictures before the text. The text to score answers the last turn. The pictures in a
conversation are those of one image of the group, in the same order.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any, Literal, NamedTuple, TypeAlias

from cfvlm_ds.core.errors import DataError

ROLES = ("system", "user", "assistant")
DESCRIBE = "Describe the image."
"""Default prompt for captions."""
MAX_TURNS = 1024
"""Maximum number of turns in a conversation. MAX_PARTS limits the total number of parts in all turns."""
MAX_PARTS = 4 * MAX_TURNS


class Marker(Enum):
    """Placeholder for a picture within a turn."""

    PICTURE = "picture"

    def __repr__(self) -> str:
        return self.name


PICTURE: Literal[Marker.PICTURE] = Marker.PICTURE
Part: TypeAlias = str | Literal[Marker.PICTURE]


class Turn(NamedTuple):
    """A turn of a conversation: its role (one of ROLES) and its parts. Each part is a text or the placeholder PICTURE."""

    role: str
    parts: tuple[Part, ...]


Prompt: TypeAlias = str | tuple[Turn, ...]


def texts_of(prompt: Prompt) -> Iterator[str]:
    """Yield all texts of a prompt, in order."""
    return iter([prompt]) if isinstance(prompt, str) else (part for turn in prompt for part in turn.parts if isinstance(part, str))


def pictures_of(turns: Sequence[Turn]) -> int:
    """Count the pictures in the turns."""
    return sum(part is PICTURE for turn in turns for part in turn.parts)


def check_conversation(turns: Sequence[Turn], where: str) -> None:
    """Raise DataError if the turns are not a valid prompt. The error message starts with ``where``."""
    if not turns or turns[-1].role != "user":
        ending = f"ends with a turn of the {turns[-1].role}" if turns else "has no turns"
        raise DataError(f"{where}: the conversation {ending}; it must end with a turn of the user, which the text answers")
    if len(turns) > MAX_TURNS or sum(len(turn.parts) for turn in turns) > MAX_PARTS:
        raise DataError(f"{where}: the conversation has {len(turns)} turns, over the limit of {MAX_TURNS} ({MAX_PARTS} parts); shorten it")
    for number, turn in enumerate(turns, 1):
        if turn.role not in ROLES:
            raise DataError(f"{where}: turn {number} of the conversation has the role {turn.role!r}; the roles are {', '.join(ROLES)}")
        if turn.role == "system" and number > 1:
            raise DataError(
                f"{where}: turn {number} of the conversation has the role system; only the first turn may have it, so move it there"
            )
        if not any(part is PICTURE or part.strip() for part in turn.parts):
            raise DataError(f"{where}: turn {number} of the conversation ({turn.role}) is empty; write a text, or remove the turn")


def messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Convert a conversation to a list of messages, as used in chat templates and data rows."""
    return [
        {"role": turn.role, "content": [{"type": "image"} if part is PICTURE else {"type": "text", "text": part} for part in turn.parts]}
        for turn in turns
    ]


def spelled(prompt: Prompt) -> str | list[dict[str, Any]]:
    """Convert a prompt to JSON values: a string or a list of messages. If a message consists of a single text, its content is a string, not
    a list.
    """
    if isinstance(prompt, str):
        return prompt
    written = messages(prompt)
    for message in written:
        if len(parts := message["content"]) == 1 and "text" in parts[0]:
            message["content"] = parts[0]["text"]
    return written


def simplest(turns: Sequence[Turn]) -> Prompt:
    """Return the prompt as a string if it is a single user turn with all pictures before the text, else as a tuple of turns."""
    if len(turns) == 1 and turns[0].role == "user":
        *before, last = turns[0].parts or ("",)
        if all(part is PICTURE for part in before):
            return "" if last is PICTURE else last
    return tuple(turns)


def readable(prompt: Prompt) -> str:
    """Format a prompt for display. Each turn of a conversation is preceded by its role, and [picture] stands for a picture."""
    if isinstance(prompt, str):
        return prompt
    return " ".join(f"{turn.role}: {''.join('[picture]' if part is PICTURE else part for part in turn.parts)}" for turn in prompt)


def normalised(text: str) -> str:
    """Return the text in Unicode's composed form (NFC), with runs of white space collapsed. Texts with the same normalised form count as
    duplicates.
    """
    return " ".join((text if text.isascii() else unicodedata.normalize("NFC", text)).split())


def normalised_prompt(prompt: Prompt) -> Prompt:
    """Return the prompt with all its texts normalised. Prompts with the same normalised form count as the same question."""
    if isinstance(prompt, str):
        return normalised(prompt)
    return tuple(Turn(turn.role, tuple(part if part is PICTURE else normalised(part) for part in turn.parts)) for turn in prompt)
