"""Chat rows in OpenAI's spelling, as TRL, LLaMA-Factory and ms-swift read them.

    {"images": ["a.jpg"], "messages": [{"role": "system", "content": "Be brief."},
                                       {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
                                       {"role": "assistant", "content": [{"type": "text", "text": "A bus."}]}]}

Contents are strings, in which ``<image>`` stands for a picture, or lists of parts. A part may name its picture itself, as ``{"type":
"image", "image": PATH}`` or ``{"type": "image_url", "image_url": {"url": PATH}}``; others are in ``images`` (or ``image``). TRL's
``prompt`` and ``completion`` are read in place of ``messages``, as strings too. ``messages:per_turn=true`` as for ``llava``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cfvlm_ds.core.conversation import Turn
from cfvlm_ds.data.formats.chat import Instruct, Spoken, read_messages, read_text
from cfvlm_ds.data.formats.fields import required


@dataclass(frozen=True)
class Messages(Instruct):
    """A row with ``messages``, or ``prompt`` and ``completion``."""

    keys: tuple[str, ...] = ("messages",)
    source: str = "messages"

    def _spoken(self, row: Mapping[str, Any]) -> tuple[Spoken, tuple[str, ...]]:
        if "messages" in row or "completion" not in row:
            return super()._spoken(row)
        asked, said = (spoken_as(required(row, key, "row"), role, key) for key, role in (("prompt", "user"), ("completion", "assistant")))
        return Spoken(asked.turns + said.turns, asked.pictures + said.pictures, asked.further + said.further), ("prompt", "completion")


def spoken_as(value: Any, role: str, key: str) -> Spoken:
    """A string as one turn of ``role``, or a list of messages."""
    if not isinstance(value, str):
        return read_messages(value, f"row: {key!r}")
    parts = read_text(value)
    return Spoken((Turn(role, parts),), (None,) * sum(not isinstance(part, str) for part in parts), [])
