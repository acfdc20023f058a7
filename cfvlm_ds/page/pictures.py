"""Pictures of a page: small copies without what else their files hold, and lines around what differs between two."""

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
"""A picture reduced to what it is compared by, [height, width, 3] in uint8."""

GRID = 96
"""Cells of the longer side of the grid on which pictures are compared."""
VISIBLE = 10
"""Levels of 255 by which the mean of a cell must differ. Saving a picture again, as JPEG or by a latent model, changes less."""
_MOST_SEGMENTS, _MOST_GROWTH, _EVERYWHERE = 1000, 8, 0.6  # of an outline; the share of a picture from which on it has none
_MAX_SIDE, _LOSSLESS_SIDE, SMALL_SIDE = 768, 256, 200  # pixels of a copy's longer side, of one that is a PNG, of one that is enlarged
_RECENT = 2048  # pictures of which is kept what they are compared by, 27 kB at most: groups of one scene share them


class Seen(NamedTuple):
    """A picture: the name of its copy, which is that of all with the same pixels, its size in pixels, and what it is compared by."""

    name: str
    size: tuple[int, int]
    grid: Grid


Looks: TypeAlias = Callable[[Path], Seen | str]


def looks(folder: Path, max_pixels: int) -> Looks:
    """A function that decodes a picture under the usual bounds and saves it anew, made small and without what else its file holds; or says
    why it cannot. No name of a source is part of a copy's. The last ones are not decoded again."""

    @functools.lru_cache(_RECENT)
    def look(path: Path) -> Seen | str:
        try:
            image = open_image(path, max_pixels)
        except DataError as error:
            return str(error)
        pixels = "x".join(map(str, image.size)) + "-" + hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()
        found = Seen(f"pictures/{pixels}.{'png' if max(image.size) <= _LOSSLESS_SIDE else 'jpg'}", image.size, reduced(image))
        image.thumbnail((_MAX_SIDE, _MAX_SIDE), Pillow.Resampling.LANCZOS)
        image.info.clear()  # comments, and where a photograph was taken
        image.save(folder / found.name, quality=85)
        return found

    return look


def reduced(image: Pillow.Image) -> Grid:
    """The means of an RGB picture on its grid; a picture that is smaller than the grid is its own."""
    scale = min(1.0, GRID / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    return np.asarray(image.resize((width, height), Pillow.Resampling.BOX))


def difference(first: Grid, second: Grid) -> tuple[str, float]:
    """Where two reduced pictures of the same shape differ: an SVG path on their grid, and the share of its cells. The path is empty where
    nothing differs visibly, or nearly everything."""
    mask = np.abs(first.astype(np.int16) - second).max(2) > VISIBLE
    share, lines = float(mask.mean()), list[str]()
    if 0 < share <= _EVERYWHERE:
        for _ in range(_MOST_GROWTH):  # a little room around it, so that the line does not hide what it shows
            mask = binary_fill_holes(binary_dilation(mask, np.ones((3, 3))))
            lines = _boundary(mask)
            if len(lines) <= _MOST_SEGMENTS:
                break
    return "".join(lines), share


def _boundary(mask: Grid) -> list[str]:
    """The edges between cells that are in the mask and cells that are not, as lines along the grid."""
    padded, lines = np.pad(mask, 1), []
    across, down = padded[1:, 1:-1] != padded[:-1, 1:-1], (padded[1:-1, 1:] != padded[1:-1, :-1]).T
    for edges, form in ((across, "M{1} {0}h{2}"), (down, "M{0} {1}v{2}")):
        steps = np.diff(np.pad(edges, ((0, 0), (1, 1))).astype(np.int8), axis=1)
        starts, ends = np.argwhere(steps == 1), np.argwhere(steps == -1)
        lines += [form.format(line, start, end - start) for (line, start), (_, end) in zip(starts, ends, strict=True)]
    return lines
