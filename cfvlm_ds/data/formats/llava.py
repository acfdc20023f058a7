"""LLaVA's and ShareGPT's instruct rows: a conversation about the row's picture or pictures.

    {"id": "33471", "image": "coco/train2017/000000033471.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat colour is the bus?"}, {"from": "gpt", "value": "White and red."},
                       {"from": "human", "value": "Is it moving?"}, {"from": "gpt", "value": "Yes."}]}

``image`` is a path or a list of paths, and so is ``images``; a row with neither is text only. A system prompt is the first message, or a
column ``system``. The last answer is scored, and the turns before it are its prompt; with ``llava:per_turn=true`` every answer is scored,
each in its own group. Such a row contains no false text, so only ``align`` learns from it. ``llava:label=kto_tag`` reads labels in the same
way as ``messages``.
"""

from __future__ import annotations

from dataclasses import dataclass

from cfvlm_ds.data.formats.chat import Instruct


@dataclass(frozen=True)
class Llava(Instruct):
    """Format of rows whose messages are in ``conversations``."""

    keys = ("conversations", "conversation")
    source = "llava"
