"""Editor that mirrors pictures, which exchanges left and right exactly. Captions that mention lettering are excluded."""

from __future__ import annotations

from PIL import ImageOps

from cfvlm_ds.counterfactuals.edit.base import Editor, Picture, Refused, Task
from cfvlm_ds.counterfactuals.propose.vocabulary import LETTERING
from cfvlm_ds.counterfactuals.propose.word_difference import words


class Flip(Editor):
    """Editor ``flip``: mirrors the picture if the edit only exchanges left and right."""

    def takes(self, task: Task) -> bool:
        """Return whether the text equals the caption with "left" and "right" exchanged, and the caption mentions no lettering."""
        old, new = words(task.caption), words(task.text)
        turned = {"left": "right", "right": "left"}
        return (
            not LETTERING & set(old)
            and task.type == "relation"
            and bool({"left", "right"} & set(old))
            and tuple(turned.get(word, word) for word in old) == new
        )

    def edit(self, task: Task) -> Picture | Refused | None:
        return Picture(ImageOps.mirror(task.image()))
