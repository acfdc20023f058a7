"""EqBen (Wang et al. 2023, arXiv 2303.14465), subset for large models: two slightly different pictures and two captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.data.decoding import MAX_PIXELS
from cfvlm_ds.evaluation.benchmarks.base import Benchmark, Item, quad
from cfvlm_ds.evaluation.benchmarks.metrics import QUAD_RANDOM, by, quads
from cfvlm_ds.evaluation.benchmarks.source import File, Row, keep_picture

SUBSETS = {
    "eqbensd": "sd", "eqbenkubric_cnt": "kubric", "eqbenkubric_loc": "kubric", "eqbenkubric_attr": "kubric", "eqbengebc": "gebc",
    "eqbenag": "ag", "eqbenyoucook2": "youcook2",
}  # fmt: skip

MADE = "png"
"""Folder for pictures converted from arrays."""


def item(row: Row) -> Item:
    folder = row.text("image0").split("/")[0]
    if folder not in SUBSETS:
        raise row.error(f"picture folder {folder!r} is not one of {', '.join(SUBSETS)}")
    pictures = [_picture(row, row[key]) for key in ("image0", "image1")]
    return quad(row.number, pictures, (row.text("caption0"), row.text("caption1")), subset=SUBSETS[folder])


def _picture(row: Row, name: Any) -> Path:
    """Return the path of a picture. Official video frames are BGR arrays, which are converted to PNG files once."""
    path, source = row.picture(name, "images"), row.source
    if path.suffix != ".npy" or path in source.absent:
        return path
    png = (source.root / MADE / path.relative_to(source.root / "images")).with_suffix(".png")
    return png if png.is_file() else keep_picture(source.root, png, _frame(path))


def _frame(path: Path) -> Image.Image:
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # checks the file size and loads no Python objects
    except (OSError, ValueError, EOFError, SyntaxError, MemoryError, RecursionError, OverflowError) as error:
        raise DataError(f"{path}: contains no array of numbers ({error}); get the official file again") from error
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not 0 < array.shape[0] * array.shape[1] <= MAX_PIXELS:
        raise DataError(f"{path}: an array {array.dtype} {array.shape} is not a picture (height, width, 3); get the official file again")
    return Image.fromarray(np.ascontiguousarray(array[:, :, ::-1]))


EQBEN = Benchmark(
    title="EqBen (mini)",
    files=(File("all_select.json"),),
    item=item,
    metrics=by("subset", quads),
    headline="group",
    probes=("match", "caption", "letters"),
    random=QUAD_RANDOM,
)
