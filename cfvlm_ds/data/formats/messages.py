"""Chat rows in OpenAI's notation, which TRL, LLaMA-Factory and ms-swift also read.

    {"images": ["a.jpg"], "messages": [{"role": "system", "content": "Be brief."},
                                       {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
                                       {"role": "assistant", "content": [{"type": "text", "text": "A bus."}]}]}

The ``content`` of a message is a string in which ``<image>`` marks the position of a picture, or a list of parts. A part can name its
picture: ``{"type": "image", "image": PATH}`` or ``{"type": "image_url", "image_url": {"url": PATH}}``; LLaMA-Factory uses the key ``value``
in parts of any type. Other pictures are in ``images`` (or ``image``). Instead of ``messages``, a row can have TRL's ``prompt`` and
``completion``, ms-swift's ``query`` and ``response``, or Alpaca's ``instruction``, ``input`` and ``output``. In the last two cases, a
``history`` of question-answer pairs can precede the question.

``messages:per_turn=true`` works as in ``llava``. ``messages:label=label`` reads rows for KTO, whose ``label`` (LLaMA-Factory: ``kto_tag``)
marks the answer as good or bad; rows with the same picture and the same conversation before the answer form one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cfvlm_ds.core.conversation import Turn
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.text import quoted
from cfvlm_ds.data.fields import Row
from cfvlm_ds.data.formats.chat import Instruct, Spoken, only, read_messages, read_text

ASKED = ("prompt", "question", "query", "instruction")
"""Columns that may contain the question."""
ANSWERS = ("completion", "response", "output")
BESIDE = {"query": ("history",), "instruction": ("input", "history")}
"""Question column -> other columns that belong to the question."""


@dataclass(frozen=True)
class Messages(Instruct):
    """Format of rows with ``messages``, or with a question and its answer in two columns."""

    keys = ("messages",)
    source = "messages"

    def _spoken(self, row: Row) -> tuple[Spoken, tuple[str, ...]]:
        if "messages" in row or not (answer := only(row, ANSWERS, "are answers")):
            return super()._spoken(row)
        used, question = asked_in(row, ASKED)
        if question is None:
            raise DataError(
                f"row: column {answer!r} is an answer without a question; add the question as 'prompt', 'query' or 'instruction'"
            )
        reply = spoken_as(row[answer], "assistant", answer)
        spoken = Spoken(question.turns + reply.turns, question.pictures + reply.pictures, question.further + reply.further)
        return spoken, (*used, answer)


def asked_in(row: Row, columns: Sequence[str]) -> tuple[tuple[str, ...], Spoken | None]:
    """Return the columns that a row's question consists of, and the question; () and None if the row has none of ``columns``."""
    if not (key := only(row, columns, "hold the question")):
        return (), None
    value, beside = row[key], BESIDE.get(key, ())
    if "input" in beside and (more := row.get("input", "")) != "":
        if not isinstance(value, str) or not isinstance(more, str):
            raise DataError(f"row: {key!r} and 'input' must both be texts, not {quoted(value, 80)} and {quoted(more, 80)}")
        value = f"{value}\n{more}" if more.strip() else value
    spoken = spoken_as(value, "user", key)
    if "history" in beside and (history := row.get("history", [])) not in ([], ""):
        if not isinstance(history, list) or not all(isinstance(pair, list) and [*map(type, pair)] == [str, str] for pair in history):
            raise DataError(f"row: 'history' must be a list of pairs of a question and its answer, not {quoted(history, 80)}")
        for pair in reversed(history):
            for text, role in zip(reversed(pair), ("assistant", "user"), strict=True):
                before = spoken_as(text, role, "history")
                spoken = Spoken(*(one + other for one, other in zip(before, spoken, strict=True)))  # type: ignore[operator]
    return (key, *(column for column in beside if column in row)), spoken


def spoken_as(value: Any, role: str, key: str) -> Spoken:
    """Parse the value of column ``key``: a string as one turn of ``role``, and any other value as a list of messages."""
    if not isinstance(value, str):
        return read_messages(value, f"row: {key!r}")
    parts = read_text(value)
    return Spoken((Turn(role, parts),), (None,) * sum(not isinstance(part, str) for part in parts), [{}])
