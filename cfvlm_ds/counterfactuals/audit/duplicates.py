"""Search for duplicate pictures in a data set, and for pictures and texts that it shares with benchmarks. Near duplicates are detected by
their perceptual hashes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cfvlm_ds.core.conversation import normalised
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.counterfactuals.checks import perceptual_hash
from cfvlm_ds.counterfactuals.propose.word_difference import words
from cfvlm_ds.data.decoding import ENDINGS, open_image
from cfvlm_ds.data.picture_index import content_digest

NEAR = 8
"""Pictures are near duplicates if their hashes differ in at most this number of bits (of 64)."""
_BLOCK = 64
GRAM = 8
"""Two captions that share this number of consecutive words count as copies."""
_SUFFIXES = {f".{ending}" for ending in ENDINGS}


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


def pictures_below(folder: Path) -> list[Path]:
    """List every picture file below a folder. Links to folders are not followed."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())


def grams(text: str) -> set[tuple[str, ...]]:
    """Return the word 8-grams of a text. A text of four to seven words is a single n-gram; a shorter text has none."""
    tokens = [word for word in words(text) if word.isalnum()]
    return {tuple(tokens[k : k + GRAM]) for k in range(max(1, len(tokens) - GRAM + 1))} if len(tokens) >= 4 else set()


def shared_texts(ours: Mapping[str, Iterable[str]], theirs: Iterable[str]) -> dict[str, str]:
    """Return the first text of each group that equals a benchmark text or shares eight consecutive words with one, keyed by group id.
    Groups without such a text are absent.
    """
    known: set[tuple[str, ...]] = set()
    exact: set[str] = set()
    for text in theirs:
        exact.add(normalised(text).lower())
        known |= {gram for gram in grams(text) if len(gram) == GRAM}
    shared: dict[str, str] = {}
    for name, texts in ours.items():
        for text in texts:
            if normalised(text).lower() in exact or not known.isdisjoint(grams(text)):
                shared.setdefault(name, text)
    return shared
