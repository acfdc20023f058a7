"""Image folders: pictures whose captions are in text files of the same name, such as ``dog.png`` and ``dog.txt``."""

from __future__ import annotations

from pathlib import Path

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.reading import read_bytes
from cfvlm_ds.data.containers.rows import MAX_ROW, Rows


def picture_rows(path: Path) -> Rows:
    """Yield the row of a picture, or a DataError if its caption is missing or cannot be read."""
    text = path.with_suffix(".txt")
    try:
        if not text.resolve().is_relative_to(path.parent.resolve()):
            raise ValueError("it is a link to outside the folder")
        caption = read_bytes(text, MAX_ROW).decode("utf-8-sig")
        yield path.name, {"image": path.name, "caption": caption.replace("\r\n", "\n").strip()}
    except (OSError, ValueError) as error:
        remedy = "write the caption into a file of that name next to the picture, in UTF-8, or remove the picture"
        yield path.name, DataError(f"{text.name} cannot be read ({getattr(error, 'strerror', None) or error}); {remedy}")
