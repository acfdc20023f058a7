"""Where two pictures of equal size differ, as a line that a page draws around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

GRID = 96
"""Cells of the longer side of the grid on which pictures are compared."""
VISIBLE = 10
"""Levels of 255 by which the mean of a cell must differ. Saving a picture again, as JPEG or by a latent model, changes less."""
_MOST_SEGMENTS, _MOST_GROWTH = 1000, 8
_EVERYWHERE = 0.6


@dataclass(frozen=True)
class Difference:
    """What differs: an SVG path on a grid of ``size`` (width, height) cells, and the share of the cells. The path is empty where nothing
    differs visibly, or nearly everything."""

    path: str
    size: tuple[int, int]
    share: float


def reduced(image: Image.Image) -> npt.NDArray[Any]:
    """The means of an RGB picture on its grid, [height, width, 3] in uint8; a picture that is smaller than the grid is its own."""
    scale = min(1.0, GRID / max(image.size))
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return np.asarray(image.resize(size, Image.Resampling.BOX))  # type: ignore[arg-type]


def difference(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> Difference:
    """Compare two reduced pictures of the same shape."""
    mask = np.abs(first.astype(np.int16) - second).max(2) > VISIBLE
    height, width = mask.shape
    share = float(mask.mean())
    path = ""
    if 0 < share <= _EVERYWHERE:
        for _ in range(_MOST_GROWTH):
            mask = _without_holes(_grown(mask))  # a little room around it, so that the line does not hide what it shows
            path, segments = _boundary(mask)
            if segments <= _MOST_SEGMENTS:
                break
    return Difference(path, (width, height), share)


def _grown(mask: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The cells of a mask and all that touch them."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    return np.logical_or.reduce([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)])


def _without_holes(mask: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The mask with what it encloses: all but what sweeps over the grid reach from outside, in as many rounds as it has windings."""
    free = ~np.pad(mask, 1)
    outside = np.pad(np.zeros_like(mask), 1, constant_values=True)
    reached = 0
    while reached < (reached := int(outside.sum())):
        for seen, open_ in ((outside, free), (outside[::-1], free[::-1]), (outside.T, free.T), (outside.T[::-1], free.T[::-1])):
            for line in range(1, len(seen)):
                seen[line] |= seen[line - 1] & open_[line]
    return ~outside[1:-1, 1:-1]


def _boundary(mask: npt.NDArray[Any]) -> tuple[str, int]:
    """The edges between cells that are in the mask and cells that are not, as lines along the grid, and how many lines."""
    padded = np.pad(mask, 1)
    across = padded[1:, 1:-1] != padded[:-1, 1:-1]
    down = (padded[1:-1, 1:] != padded[1:-1, :-1]).T
    parts = [f"M{start} {line}h{length}" for line, start, length in _lines(across)]
    parts += [f"M{line} {start}v{length}" for line, start, length in _lines(down)]
    return "".join(parts), len(parts)


def _lines(edges: npt.NDArray[Any]) -> list[tuple[int, int, int]]:
    """(line, start, length) of every run of true values along the lines of a table."""
    steps = np.diff(np.pad(edges, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    starts, ends = np.argwhere(steps == 1), np.argwhere(steps == -1)
    return [(int(line), int(start), int(end - start)) for (line, start), (_, end) in zip(starts, ends, strict=True)]
