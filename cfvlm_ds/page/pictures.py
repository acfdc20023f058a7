"""Copies of pictures for a page: decoded under the usual bounds, made small, and saved anew without what else their files hold."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
from PIL import Image

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.data.decoding import MAX_PIXELS, open_image
from cfvlm_ds.page.outline import reduced

MAX_SIDE = 768
"""Pixels of a copy's longer side."""
_LOSSLESS_SIDE = 256
"""Up to here a copy is the picture itself, saved as PNG."""


@dataclass(frozen=True)
class Copy:
    """A picture's copy: its name in the page's folder, the size in pixels of the picture itself, and a digest of its pixels."""

    name: str
    size: tuple[int, int]
    digest: bytes


@dataclass(frozen=True)
class Seen:
    """A picture that was just decoded: its copy, and what it is compared by."""

    copy: Copy
    grid: npt.NDArray[Any]


class Copies:
    """The copies that a page has made so far; one for each file, however many items show it.

    Args:
        folder: where they are written, as ``pictures/NUMBER.jpg`` or ``.png``. No name of a source is part of a copy's.
        max_pixels: as of open_image.
    """

    def __init__(self, folder: Path, max_pixels: int = MAX_PIXELS) -> None:
        self._folder, self._max_pixels = folder, max_pixels
        self._known: dict[Path, Copy] = {}
        self._numbers = itertools.count()
        self.problems: dict[Path, str] = {}
        """What could not be shown, and why."""
        (folder / "pictures").mkdir()

    def __len__(self) -> int:
        return len(self._known)

    def look(self, pictures: Iterable[Path], pool: ThreadPoolExecutor, alive: Callable[[], object] = lambda: None) -> dict[Path, Seen]:
        """Decode pictures, and write copies of those that have none yet. What cannot be decoded is noted as a problem and left out.

        Raises OSError for a copy that cannot be written.
        """
        wanted = [path for path in dict.fromkeys(pictures) if path not in self.problems]
        new = [path for path in wanted if path not in self._known]
        numbers = {path: next(self._numbers) for path in new}
        seen: dict[Path, Seen] = {}
        for path, found in zip(wanted, pool.map(lambda path: self._decoded(path, numbers.get(path)), wanted), strict=True):
            alive()
            if isinstance(found, Seen):
                seen[path], self._known[path] = found, found.copy
            else:
                self.problems[path] = found
        return seen

    def _decoded(self, path: Path, number: int | None) -> Seen | str:
        """``number`` is that of a new copy."""
        try:
            image = open_image(path, self._max_pixels)
        except DataError as error:
            return str(error)
        copy = self._known[path] if number is None else self._written(image, number)
        return Seen(copy, reduced(image))

    def _written(self, image: Image.Image, number: int) -> Copy:
        size, digest = image.size, hashlib.blake2b(image.tobytes(), digest_size=16).digest()
        small = image.copy()
        small.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        small.info.clear()  # comments, and where a photograph was taken
        lossless = max(size) <= _LOSSLESS_SIDE
        name = f"pictures/{number:06d}.{'png' if lossless else 'jpg'}"
        with (self._folder / name).open("xb") as file:
            if lossless:
                small.save(file, "PNG")
            else:
                small.save(file, "JPEG", quality=85)
        return Copy(name, size, digest)
