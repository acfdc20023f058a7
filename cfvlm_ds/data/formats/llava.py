"""LLaVA and ShareGPT instruction rows: a conversation about one or more pictures.

    {"id": "33471", "image": "coco/train2017/000000033471.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat colour is the bus?"}, {"from": "gpt", "value": "White and red."},
                       {"from": "human", "value": "Is it moving?"}, {"from": "gpt", "value": "Yes."}]}

``image`` or ``images`` is a path or a list of paths; a row with neither is text-only. A system prompt can be given as the first message or
in the column ``system``. The last answer is scored, and the turns before it are its prompt. With ``llava:per_turn=true``, every answer is
scored, each in its own group. Rows without labels contain no false text, so only ``align`` can train on them. ``llava:label=kto_tag`` reads
labels in the same way as ``messages``.
"""

from __future__ import annotations

from dataclasses import dataclass

from cfvlm_ds.data.formats.chat import Instruct


@dataclass(frozen=True)
class Llava(Instruct):
    """Format of rows whose messages are in ``conversations``."""

    keys = ("conversations", "conversation")
    source = "llava"
