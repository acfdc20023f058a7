"""Pictures of a page: small copies without metadata, and outlines of the differences between two pictures."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow
from scipy.ndimage import binary_dilation, binary_fill_holes

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.data.decoding import open_image

Grid: TypeAlias = npt.NDArray[Any]
"""A picture reduced for comparison, [height, width, 3] in uint8."""

GRID = 96
"""Number of cells along the longer side of the grid for comparing pictures."""
VISIBLE = 10
"""Difference between two cells' means (0 to 255) that counts as visible. JPEG and latent diffusion models cause smaller differences."""
_MOST_SEGMENTS, _MOST_GROWTH, _EVERYWHERE = 1000, 8, 0.6  # limits of an outline; no outline for a larger changed share
_MAX_SIDE, _LOSSLESS_SIDE, SMALL_SIDE = 768, 256, 200  # longest side in pixels of any copy, of PNG copies, of enlarged copies
_RECENT = 2048  # number of cached grids (at most 27 kB each); groups of the same scene share pictures


class Seen(NamedTuple):
    """A picture: file name of its copy (shared by all pictures with the same pixels), size in pixels, and comparison grid."""

    name: str
    size: tuple[int, int]
    grid: Grid


Looks: TypeAlias = Callable[[Path], Seen | str]


def looks(folder: Path, max_pixels: int) -> Looks:
    """Return a cached function that decodes a picture, saves a small copy without metadata, and returns a ``Seen`` record. If the picture
    cannot be decoded, the function returns the error message.

    The copy's file name does not reveal the picture's file name.
    """

    @functools.lru_cache(_RECENT)
    def look(path: Path) -> Seen | str:
        try:
            image = open_image(path, max_pixels)
        except DataError as error:
            return str(error)
        pixels = "x".join(map(str, image.size)) + "-" + hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()
        seen = Seen(f"pictures/{pixels}.{'png' if max(image.size) <= _LOSSLESS_SIDE else 'jpg'}", image.size, reduced(image))
        image.thumbnail((_MAX_SIDE, _MAX_SIDE), Pillow.Resampling.LANCZOS)
        image.info.clear()  # such as comments, and the place where a photograph was taken
        image.save(folder / seen.name, quality=85)
        return seen

    return look


def reduced(image: Pillow.Image, longer: int = GRID) -> Grid:
    """Downsample an RGB picture to a grid of means with ``longer`` cells along the longer side. Smaller pictures are not changed."""
    scale = min(1.0, longer / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    return np.asarray(image.resize((width, height), Pillow.Resampling.BOX))


def difference(first: Grid, second: Grid) -> tuple[str, float]:
    """Compare two reduced pictures of the same shape. Return the outline of the difference as an SVG path, and the fraction of cells that
    differ visibly.

    The path is empty if no cell differs visibly, or if most cells do.
    """
    mask = np.abs(first.astype(np.int16) - second).max(2) > VISIBLE
    share, lines = float(mask.mean()), list[str]()
    if 0 < share <= _EVERYWHERE:
        for _ in range(_MOST_GROWTH):  # a margin, so that the line does not hide the difference
            mask = binary_fill_holes(binary_dilation(mask, np.ones((3, 3))))
            lines = _boundary(mask)
            if len(lines) <= _MOST_SEGMENTS:
                break
    return "".join(lines), share


def _boundary(mask: Grid) -> list[str]:
    """Return the boundary of the mask as SVG lines along the grid."""
    padded, lines = np.pad(mask, 1), []
    across, down = padded[1:, 1:-1] != padded[:-1, 1:-1], (padded[1:-1, 1:] != padded[1:-1, :-1]).T
    for edges, form in ((across, "M{1} {0}h{2}"), (down, "M{0} {1}v{2}")):
        steps = np.diff(np.pad(edges, ((0, 0), (1, 1))).astype(np.int8), axis=1)
        starts, ends = np.argwhere(steps == 1), np.argwhere(steps == -1)
        lines += [form.format(line, start, end - start) for (line, start), (_, end) in zip(starts, ends, strict=True)]
    return lines
