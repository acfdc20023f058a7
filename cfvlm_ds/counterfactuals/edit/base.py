"""Interface of picture editors: tasks, results, and functions that find and open pictures from external sources."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.text import one_line
from cfvlm_ds.core.untrusted import own_file
from cfvlm_ds.counterfactuals.options import EditOptions
from cfvlm_ds.data.decoding import open_image


@dataclass(frozen=True)
class Task:
    """One edit attempt: the picture, its ``caption``, the ``text`` that must be true of the edited picture, and the instruction."""

    id: str
    source: str
    type: str
    picture: Path
    caption: str
    text: str
    source_words: str
    target_words: str
    instruction: str
    attempt: int
    seed: int
    mask: Path | None = None

    def image(self) -> Image.Image:
        """Open the picture in RGB, with its EXIF orientation applied. Raises DataError if it cannot be read."""
        return open_image(self.picture)

    def mask_image(self, size: tuple[int, int]) -> Image.Image | None:
        """Open the mask, if any. White marks pixels that are allowed to change. Raises DataError if its size is not ``size`` (width,
        height).
        """
        if self.mask is None:
            return None
        mask = open_image(self.mask).convert("L")
        if mask.size != size:
            raise DataError(
                f"{self.mask}: the mask is {mask.size[0]}x{mask.size[1]}, but its picture is {size[0]}x{size[1]}; make the sizes equal"
            )
        return mask.point(lambda level: 255 if level >= 128 else 0)


@dataclass(frozen=True)
class Picture:
    """An edited picture. ``info`` is the editor's record of how the picture was made."""

    image: Image.Image
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Refused:
    """An editor's refusal to edit a picture, and the reason."""

    reason: str


class Editor:
    """Back end of `data edit`, constructed with the step's options.

    ``varies`` is true if the edited picture depends on the seed, so that several attempts are useful. ``threads`` is the number of
    concurrent tasks.
    """

    varies, threads = False, 1

    def __init__(self, options: EditOptions) -> None: ...

    def settings(self) -> Mapping[str, Any]:
        """Return the settings that determine the edited pictures; the step records them."""
        return {"version": 1}

    def takes(self, task: Task) -> bool:
        """Return whether this editor accepts an edit. Implementations must not read the picture."""
        return True

    def edit(self, task: Task) -> Picture | Refused | None:
        """Return the edited picture (of the same size as the original), a refusal, or None if only the text is edited."""
        return None


def picture_by_id(folder: Path, name: str, suffixes: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".webp")) -> Path | None:
    """Return the picture in ``folder`` whose path, without the suffix, equals the id ``name``. Return None if there is no such picture or
    the id is not a valid path.
    """
    for suffix in suffixes:
        try:
            path = own_file(folder, f"{name}{suffix}", f"the id {name!r}")
        except ConfigError:
            return None
        if path.is_file():
            return path
    return None


def opened(path: Path, shown: str) -> Picture | Refused:
    """Open a picture file. If that fails, return a refusal whose message contains ``shown`` in place of the path."""
    try:
        return Picture(open_image(path))
    except DataError as error:
        return Refused(one_line(str(error).replace(str(path), shown), 300))


def sha256_of(content: bytes) -> str:
    """Return the hexadecimal sha256 of ``content``."""
    return hashlib.sha256(content).hexdigest()
