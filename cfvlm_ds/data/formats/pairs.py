"""Winoground-style rows: two images and two captions, where caption k is true of image k only (Thrush et al. 2022, arXiv 2204.03162).

    {"id": "7", "image_0": "7a.png", "image_1": "7b.png", "caption_0": "a dog chases a cat", "caption_1": "a cat chases a dog",
     "prompt": "Describe the image.", "edit": "relation"}

The format is ``captions`` with these columns as defaults. In Winoground's published rows, picture names have no suffix: ``ex_7_img_0``
stands for the file ex_7_img_0.png in images.zip.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.data.fields import Row
from cfvlm_ds.data.formats.captions import Captions

_WINOGROUND = re.compile(r"ex_[0-9]+_img_[01]", re.ASCII)


@dataclass(frozen=True)
class Pairs(Captions):
    """Format of rows with two images and two captions."""

    image: str = "image_0"
    caption: str = "caption_0"
    negative_caption: str = "caption_1"
    negative_image: str = "image_1"

    source = "pairs"
    needed = ("image", "caption", "negative_caption", "negative_image")

    def __call__(self, row: Row) -> CounterfactualGroup:
        """Convert a row to a group of 2 images x 2 texts whose truth table is the identity matrix. Raises DataError for other numbers of
        images or texts, as in a row with an empty caption.
        """
        bare = {key: f"{name}.png" for key, name in row.items() if isinstance(name, str) and _WINOGROUND.fullmatch(name)}
        group = super().__call__({**row, **bare})
        if (shape := (len(group.images), len(group.candidates))) != (2, 2):
            raise DataError(
                f"row: it has {shape[0]} images and {shape[1]} captions instead of 2 and 2; correct it, or use the format captions"
            )
        return group
