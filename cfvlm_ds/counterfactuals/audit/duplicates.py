"""Search for duplicate pictures. Near duplicates are detected by their perceptual hashes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.counterfactuals.checks import perceptual_hash
from cfvlm_ds.data.decoding import open_image
from cfvlm_ds.data.picture_index import content_digest

NEAR = 8
"""Two pictures are near duplicates if their hashes differ in at most this many of 64 bits."""
_BLOCK = 64


@dataclass(frozen=True)
class Look:
    """Hashes of a picture: the digest of its file, and its perceptual hash."""

    path: Path
    digest: bytes
    hash: int


def look(path: Path) -> Look | str:
    """Return a picture's hashes, or the reason why it cannot be read."""
    try:
        return Look(path, content_digest(path), perceptual_hash(open_image(path)))
    except (DataError, OSError, ValueError) as error:
        return str(error)


def near_pairs(first: Sequence[Look], second: Sequence[Look]) -> Iterator[tuple[int, int, bool]]:
    """Yield (index in ``first``, index in ``second``, True if the files are identical) for each pair of duplicates or near duplicates.
    Nearly uniform pictures have uninformative hashes, so they count only if their files are identical.
    """
    ours, theirs = (np.array([entry.hash for entry in side], np.uint64) for side in (first, second))
    for i, j in _close(ours, theirs):
        exact = first[i].digest == second[j].digest
        if exact or not (_is_flat(first[i].hash) or _is_flat(second[j].hash)):
            yield i, j, exact


def _is_flat(value: int) -> bool:
    return not 8 <= value.bit_count() <= 56


def _close(ours: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Yield the indices of each pair of hashes that differ in at most NEAR bits. With bits coded as 1 and -1, the dot product of two hashes
    is 64 - 2 x (number of differing bits).
    """
    first, second = (np.unpackbits(side[:, None].view(np.uint8), axis=1) * np.float32(2) - 1 for side in (ours, theirs))
    for start in range(0, len(first), _BLOCK):
        for i, j in np.argwhere(first[start : start + _BLOCK] @ second.T >= 64 - 2 * NEAR):
            yield start + int(i), int(j)
