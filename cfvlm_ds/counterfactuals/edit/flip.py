"""Editor that mirrors pictures, which exchanges left and right exactly. Captions that mention lettering are excluded."""

from __future__ import annotations

from PIL import ImageOps

from cfvlm_ds.counterfactuals.edit.base import Editor, Picture, Refused, Task
from cfvlm_ds.counterfactuals.propose.vocabulary import LETTERING
from cfvlm_ds.counterfactuals.propose.word_difference import words


class Flip(Editor):
    """Editor ``flip``: mirrors the picture if the edit only exchanges left and right."""

    def takes(self, task: Task) -> bool:
        """Return whether the text equals the caption with every "left" and "right" exchanged."""
        old, new = words(task.caption), words(task.text)
        turned = {"left": "right", "right": "left"}
        return task.type == "relation" and bool({"left", "right"} & set(old)) and tuple(turned.get(word, word) for word in old) == new

    def edit(self, task: Task) -> Picture | Refused | None:
        if shown := sorted(LETTERING & set(words(task.caption))):
            return Refused(f"the caption mentions a {shown[0]}, which a mirror image shows reversed")
        return Picture(ImageOps.mirror(task.image()))
