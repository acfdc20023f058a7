"""LLaVA's instruct rows, and ShareGPT's as many data sets and trainers have them: a conversation about the row's picture or pictures.

    {"id": "33471", "image": "coco/train2017/000000033471.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat colour is the bus?"}, {"from": "gpt", "value": "White and red."},
                       {"from": "human", "value": "Is it moving?"}, {"from": "gpt", "value": "Yes."}]}

``image`` is a path or a list, ``images`` is the same; a row without either is one of text alone. A first message may be from ``system``, or
the row has a ``system`` of its own. The last answer is scored, and the turns before it are its prompt; with ``llava:per_turn=true`` every
answer is, each in a group of its own. Such a row has nothing false in it: only ``align`` learns from it. ``llava:label=kto_tag`` reads
labels as ``messages`` does.
"""

from __future__ import annotations

from dataclasses import dataclass

from cfvlm_ds.data.formats.chat import Instruct


@dataclass(frozen=True)
class Llava(Instruct):
    """A row with ``conversations``."""

    keys: tuple[str, ...] = ("conversations", "conversation")
    source: str = "llava"
