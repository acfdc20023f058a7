"""Pixel-level comparison of an original picture with its edited version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage
from scipy.fft import dctn

from cfvlm_ds.data.decoding import open_image
from cfvlm_ds.page.pictures import reduced

SIDE = 128
"""Length of the longer side, in pixels, to which pictures are downscaled before the comparison. At this size, JPEG compression or a latent
diffusion model's autoencoder changes pixels by less than VISIBLE.
"""
VISIBLE = 16
"""A difference above this level (of 255) counts as visible."""
_HASHED = 32

Array = npt.NDArray[Any]


def compared(original: Path, edited: Path, mask: Image.Image | None = None) -> dict[str, Any]:
    """Compare an edited picture with its original. Raises DataError if a picture cannot be read.

    Returns:
        A dict. ``hash`` is the number of differing bits in the 64-bit perceptual hashes. The other keys exist only if the sizes are equal.
        ``identical`` is True if no pixel differs. ``changed`` is the fraction of pixels that differ visibly. ``largest``, which exists only
        if there are such pixels, is the fraction of them in their largest connected component. ``outside``, which needs a mask, is the
        fraction of the pixels outside the mask that differ at all.
    """
    first, second = open_image(original), open_image(edited)
    facts: dict[str, Any] = {"hash": (perceptual_hash(first) ^ perceptual_hash(second)).bit_count()}
    if first.size != second.size:
        return facts
    changed = np.abs(reduced(first, SIDE).astype(np.int16) - reduced(second, SIDE)).max(2) > VISIBLE
    exact = np.asarray(first) != np.asarray(second)
    facts |= {"changed": _rounded(changed.mean()), "identical": not bool(exact.any())}
    if changed.any():
        facts["largest"] = _rounded(largest_piece(changed) / int(changed.sum()))
    if mask is not None:
        unmasked = np.asarray(mask.resize(first.size)) < 128
        facts["outside"] = _rounded((exact.any(2) & unmasked).sum() / max(int(unmasked.sum()), 1))
    return facts


def largest_piece(mask: Array) -> int:
    """Count the pixels of the mask's largest connected component. Pixels that touch at a corner are connected."""
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    return int(np.max(np.bincount(labels[mask], minlength=1)))


def perceptual_hash(image: Image.Image) -> int:
    """Compute a picture's 64-bit pHash: one bit for each of the lowest 8 x 8 DCT coefficients, set if it exceeds their median."""
    grey = np.asarray(image.convert("L").resize((_HASHED, _HASHED), Image.Resampling.BOX), np.float64)
    low = dctn(grey)[:8, :8].ravel()
    return int.from_bytes(np.packbits(low > np.median(low[1:])).tobytes(), "big")


def _rounded(value: float) -> float:
    return round(float(value), 5)
