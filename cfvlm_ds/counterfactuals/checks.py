"""What two pictures say of an edit by their pixels alone: how much changed, where, in one piece or everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from cfvlm_ds.data.decoding import open_image

SIDE = 128
"""Pixels of the longer side at which pictures are compared: saving one again, as JPEG or by a latent model, changes less than VISIBLE."""
VISIBLE = 16
"""Levels of 255 by which a pixel must differ there."""
_HASHED = 32

Array = npt.NDArray[Any]


def compared(original: Path, edited: Path, mask: Image.Image | None = None) -> dict[str, Any]:
    """Facts of an edited picture beside its original. Raises DataError where one of them cannot be read.

    ``changed``: share of the pixels that differ visibly. ``largest``: share of those that are in the largest connected piece. ``box``:
    left, top, right and bottom of what changed, in shares of the sides. ``outside``: share of the pixels outside of the mask that differ.
    ``mean``: mean absolute difference in levels. ``hash``: bits of 64 by which the perceptual hashes differ. ``same_size``: whether they
    are as large.
    """
    first, second = open_image(original), open_image(edited)
    found: dict[str, Any] = {"same_size": first.size == second.size}
    found["hash"] = int(perceptual_hash(first) ^ perceptual_hash(second)).bit_count()
    if first.size != second.size:
        return found
    scale = min(1.0, SIDE / max(first.size))
    size = max(1, round(first.width * scale)), max(1, round(first.height * scale))
    small = [np.asarray(image.resize(size, Image.Resampling.BOX), np.int16) for image in (first, second)]
    far = np.abs(small[0] - small[1]).max(2)
    exact = np.asarray(first) != np.asarray(second)
    changed = far > VISIBLE
    found |= {"changed": _rounded(changed.mean()), "mean": _rounded(far.mean()), "identical": not bool(exact.any())}
    if changed.any():
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        edges = (columns[0] / size[0], rows[0] / size[1], (columns[-1] + 1) / size[0], (rows[-1] + 1) / size[1])
        found |= {"largest": _rounded(largest_piece(changed) / changed.sum()), "box": [_rounded(edge) for edge in edges]}
    if mask is not None:
        beyond = np.asarray(mask.resize(first.size)) < 128
        found["outside"] = _rounded((exact.any(2) & beyond).sum() / max(int(beyond.sum()), 1))
    return found


def largest_piece(mask: Array) -> int:
    """Cells of the largest piece whose cells touch, at corners too."""
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    return int(np.bincount(labels[mask], minlength=1).max())


def perceptual_hash(image: Image.Image) -> int:
    """64 bits: the signs of the lowest 8 x 8 cosine coefficients of the grey picture, against their median (pHash)."""
    grey = np.asarray(image.convert("L").resize((_HASHED, _HASHED), Image.Resampling.BOX), np.float64)
    low = (_COSINES @ grey @ _COSINES.T).ravel()
    return int.from_bytes(np.packbits(low > np.median(low[1:])).tobytes(), "big")


_COSINES = np.cos(np.pi * np.arange(8)[:, None] * (2 * np.arange(_HASHED)[None, :] + 1) / (2 * _HASHED))


def _rounded(value: float) -> float:
    return round(float(value), 5)
