"""Winoground-style rows: two images and two captions, where caption k is true of image k only (Thrush et al. 2022, arXiv 2204.03162).

    {"id": "7", "image_0": "7a.png", "image_1": "7b.png", "caption_0": "a dog chases a cat", "caption_1": "a cat chases a dog",
     "prompt": "Describe the image.", "edit": "relation"}

``id``, ``prompt`` (default "Describe the image.") and ``edit`` (the type of the difference) are optional. Other keys, such as Winoground's
``tag``, are metadata. In Winoground's published rows, picture names have no suffix: ``ex_7_img_0`` stands for the file ex_7_img_0.png in
images.zip.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfvlm_ds.core.conversation import DESCRIBE
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup, Edit
from cfvlm_ds.data.fields import as_meta, further_keys, name, string
from cfvlm_ds.data.formats.chat import without_nulls

_PAIR_KEYS = ("image_0", "image_1", "caption_0", "caption_1")
_KEYS = (*_PAIR_KEYS, "id", "prompt", "edit")
_WINOGROUND = re.compile(r"ex_[0-9]+_img_[01]", re.ASCII)


@dataclass(frozen=True)
class Pairs:
    """Format of rows with two images and two captions.

    Args:
        ask: prompt for rows that have none; empty for no prompt.
        ignore: columns that are not read, joined by ``+``.
    """

    ask: str = DESCRIBE
    ignore: str = ""

    def __call__(self, row: Mapping[str, Any]) -> CounterfactualGroup:
        """Convert a row to a group of 2 images x 2 texts whose truth table is the identity matrix. Image paths are kept unchanged.

        If the row has no ``id``, the group's id is a hash of the file names, captions and prompt. The hash does not depend on the order of
        the rows, and a repeated row is detected by its duplicate id. Raises DataError for a missing or misspelt key, a value that is not a
        string, or a group that CounterfactualGroup rejects, such as one with two equal captions. The caller adds the file and line to any
        DataError.
        """
        row = without_nulls(row, self.ignore)
        further = further_keys(row, _KEYS, "row")
        image_0, image_1, caption_0, caption_1 = values = [string(row, key, "row") for key in _PAIR_KEYS]
        prompt = (string(row, "prompt", "row") if "prompt" in row else "") or self.ask
        digest = hashlib.sha256("\0".join([*values, prompt]).encode("utf-8", "surrogatepass")).hexdigest()
        return CounterfactualGroup(
            id=name(row, "id", "row", f"pair-{digest[:16]}"),
            images=tuple((Path(f"{image}.png" if _WINOGROUND.fullmatch(image) else image),) for image in (image_0, image_1)),
            candidates=(Candidate(prompt, caption_0), Candidate(prompt, caption_1)),
            match=((1, 0), (0, 1)),
            edits=(Edit(type=string(row, "edit", "row"), image=1, text=1),) if "edit" in row else (),
            meta=as_meta(further),
        )
