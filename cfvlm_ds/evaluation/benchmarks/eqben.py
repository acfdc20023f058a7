"""EqBen (Wang et al. 2023, arXiv 2303.14465), its subset for large models: two pictures that differ a little, two captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.data.decoding import MAX_PIXELS
from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Judged, Published, Values
from cfvlm_ds.evaluation.benchmarks.metrics import QUAD_CHANCE, quads, sliced, tag
from cfvlm_ds.evaluation.benchmarks.source import Row, Source, each, keep_picture, text
from cfvlm_ds.evaluation.benchmarks.winoground import quad

SUBSETS = {
    "eqbensd": "sd", "eqbenkubric_cnt": "kubric", "eqbenkubric_loc": "kubric", "eqbenkubric_attr": "kubric", "eqbengebc": "gebc",
    "eqbenag": "ag", "eqbenyoucook2": "youcook2",
}  # fmt: skip

MADE = "png"
"""Folder of the pictures that are made of arrays."""


def items(source: Source) -> Iterator[Item | DataError]:
    def item(where: str, row: Row) -> Item:
        folder = text(where, row, "image0").split("/")[0]
        if folder not in SUBSETS:
            raise DataError(f"{where}: picture folder {folder!r} is none of {', '.join(SUBSETS)}; get the official file again")
        return quad(
            where.rpartition("item ")[2],
            tuple(_picture(source, where, row[key]) for key in ("image0", "image1")),
            (text(where, row, "caption0"), text(where, row, "caption1")),
            {"subset": SUBSETS[folder]},
        )

    yield from each(source.rows("all_select.json", ("image0", "image1", "caption0", "caption1")), item)


def _picture(source: Source, where: str, name: Any) -> Path:
    """A picture. Frames of videos are arrays of blue, green and red in the official files, and are written once more as PNG."""
    path = source.picture(where, name, "images")
    if path.suffix != ".npy" or path in source.absent:
        return path
    made = (source.root / MADE / path.relative_to(source.root / "images")).with_suffix(".png")
    return made if made.is_file() else keep_picture(source.root, made, _frame(path))


def _frame(path: Path) -> Image.Image:
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # which is held against the size of the file, and takes no objects
    except (OSError, ValueError, EOFError, SyntaxError, MemoryError, RecursionError, OverflowError) as error:
        raise DataError(f"{path}: no array of numbers in it ({error}); get the official file again") from error
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not 0 < array.shape[0] * array.shape[1] <= MAX_PIXELS:
        raise DataError(f"{path}: an array {array.dtype} {array.shape} is no picture (height, width, 3); get the official file again")
    return Image.fromarray(np.ascontiguousarray(array[:, :, ::-1]))


def metrics(table: Sequence[Judged]) -> Values:
    return sliced(table, tag("subset"), quads)


EQBEN = Benchmark(
    title="EqBen (mini)",
    files=(File("all_select.json"),),
    licence="Apache-2.0 (code); pictures: their sources",
    items=items,
    metrics=metrics,
    headline="group",
    probes=("match", "caption", "letters"),
    chance=QUAD_CHANCE,
    published=(Published("group", "VQAScore, CLIP-FlanT5-XXL", 47.9, "arXiv 2404.01291"),),
    traps=(
        "frames of videos are .npy files, blue before red: they are read so, and written once as PNG beside the official ones",
        "LLaVA's group accuracy is 95.0 with options in one order and 0.0 in the other (EqBen README): letters are asked in both",
    ),
)
