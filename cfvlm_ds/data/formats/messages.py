"""Chat rows in OpenAI's spelling, as TRL, LLaMA-Factory and ms-swift read them.

    {"images": ["a.jpg"], "messages": [{"role": "system", "content": "Be brief."},
                                       {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
                                       {"role": "assistant", "content": [{"type": "text", "text": "A bus."}]}]}

Contents are strings, in which ``<image>`` stands for a picture, or lists of parts. A part may name its picture itself, as ``{"type":
"image", "image": PATH}`` or ``{"type": "image_url", "image_url": {"url": PATH}}``; LLaMA-Factory writes ``value`` for either, and for
``text``. Others are in ``images`` (or ``image``). TRL's ``prompt`` and ``completion``, ms-swift's ``query`` and ``response``, and Alpaca's
``instruction``, ``input`` and ``output`` are read in place of ``messages``, the latter two behind a ``history`` of pairs.
``messages:per_turn=true`` as for ``llava``. ``messages:label=label`` reads rows for KTO, whose ``label`` (LLaMA-Factory: ``kto_tag``) says
whether the answer is good: those with one picture and one conversation before the answer are one group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cfvlm_ds.core.conversation import Turn
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.text import quoted
from cfvlm_ds.data.formats.chat import Instruct, Spoken, only, read_messages, read_text

ASKED = ("prompt", "question", "query", "instruction")
"""Columns of what is asked."""
ANSWERS = ("completion", "response", "output")
BESIDE = {"query": ("history",), "instruction": ("input", "history")}
"""Columns that are part of what is asked, beside the one that asks."""


@dataclass(frozen=True)
class Messages(Instruct):
    """A row with ``messages``, or with what is asked and the answer in columns."""

    keys: tuple[str, ...] = ("messages",)
    source: str = "messages"

    def _spoken(self, row: Mapping[str, Any]) -> tuple[Spoken, tuple[str, ...]]:
        if "messages" in row or not (answer := only(row, ANSWERS, "are answers")):
            return super()._spoken(row)
        used, asked = asked_in(row, ASKED)
        if asked is None:
            raise DataError(f"row: column {answer!r} answers nothing; add what is asked as 'prompt', 'query' or 'instruction'")
        said = spoken_as(row[answer], "assistant", answer)
        return Spoken(asked.turns + said.turns, asked.pictures + said.pictures, asked.further + said.further), (*used, answer)


def asked_in(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[tuple[str, ...], Spoken | None]:
    """What is asked in the one of these columns that the row has, and the columns that it is in; none where it has none of them."""
    if not (key := only(row, columns, "say what is asked")):
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
    return (key, *(each for each in beside if each in row)), spoken


def spoken_as(value: Any, role: str, key: str) -> Spoken:
    """A string as one turn of ``role``, or a list of messages."""
    if not isinstance(value, str):
        return read_messages(value, f"row: {key!r}")
    parts = read_text(value)
    return Spoken((Turn(role, parts),), (None,) * sum(not isinstance(part, str) for part in parts), [{}])
