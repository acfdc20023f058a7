"""Pictures and texts that are there twice: exactly, or nearly so by a perceptual hash; within a set, across its splits, in benchmarks."""

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
"""Bits of 64 by which near duplicates differ at most."""
_BLOCK = 64
GRAM = 8
"""Words in a row that a caption and a benchmark's caption have in common when one was copied."""
_SUFFIXES = {f".{ending}" for ending in ENDINGS}


@dataclass(frozen=True)
class Look:
    """A picture by its contents: a digest of its file and its perceptual hash."""

    path: Path
    digest: bytes
    hash: int


@dataclass(frozen=True)
class Pair:
    """Two places that show the same: indices into two sequences, and by how many bits they differ; -1 for the same file."""

    first: int
    second: int
    bits: int


def look(path: Path) -> Look | str:
    """Why it cannot be looked at, in place of a look."""
    try:
        return Look(path, content_digest(path), perceptual_hash(open_image(path)))
    except (DataError, OSError, ValueError) as error:
        return str(error)


def near_pairs(first: Sequence[Look], second: Sequence[Look]) -> Iterator[Pair]:
    """Pairs of one sequence and another that are the same or nearly so. Flat pictures, whose hash says nothing, only count when equal."""
    ours, theirs = (np.array([each.hash for each in side], np.uint64) for side in (first, second))
    for i, j in _close(ours, theirs):
        if first[i].digest == second[j].digest:
            yield Pair(i, j, -1)
        elif not (_is_flat(first[i].hash) or _is_flat(second[j].hash)):
            yield Pair(i, j, (first[i].hash ^ second[j].hash).bit_count())


def _is_flat(value: int) -> bool:
    return not 8 <= value.bit_count() <= 56


def _close(ours: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Yield all pairs that differ by at most NEAR bits: with 1 and -1 for bits, the product of two hashes is 64 less 2 for each."""
    first, second = (np.unpackbits(side[:, None].view(np.uint8), axis=1) * np.float32(2) - 1 for side in (ours, theirs))
    for start in range(0, len(first), _BLOCK):
        for i, j in np.argwhere(first[start : start + _BLOCK] @ second.T >= 64 - 2 * NEAR):
            yield start + int(i), int(j)


def pictures_below(folder: Path) -> list[Path]:
    """Every picture file below a folder, folders that are links not followed."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())


def grams(text: str) -> set[tuple[str, ...]]:
    """Every eight words in a row; of a shorter text all of them."""
    said = [word for word in words(text) if word.isalnum()]
    return {tuple(said[k : k + GRAM]) for k in range(max(1, len(said) - GRAM + 1))} if len(said) >= 4 else set()


def shared_texts(ours: Mapping[str, Iterable[str]], theirs: Iterable[str]) -> dict[str, str]:
    """Id -> one of its texts that a benchmark has too: the same, or eight words in a row of it."""
    known: set[tuple[str, ...]] = set()
    exact: set[str] = set()
    for text in theirs:
        exact.add(normalised(text).lower())
        known |= {gram for gram in grams(text) if len(gram) == GRAM}
    found: dict[str, str] = {}
    for name, texts in ours.items():
        for text in texts:
            if normalised(text).lower() in exact or not known.isdisjoint(grams(text)):
                found.setdefault(name, text)
    return found
