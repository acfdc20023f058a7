"""Image decoding for untrusted files: the size is checked before decoding, the result is always RGB, and every failure is a DataError."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.data.picture_file import open_picture, picture_file, picture_stat

Size = tuple[int, int]
"""Width and height in pixels."""

MAX_PIXELS = 50_000_000
"""Default limit on width x height. An RGB image of this size takes 150 MB and is larger than any vision tower can use."""

MAX_ASPECT = 200
"""Limit on the ratio of the longer to the shorter side. Processors scale the shorter side up to a fixed length, so a picture of 5,000,000
x 1 pixels would grow to 34 GB. Qwen's processors have the same limit."""

MAX_BYTES = 4 << 30
"""Maximum size of a picture file in bytes (about 80 bytes per pixel at MAX_PIXELS). A limit is needed because whole files are hashed."""

# Formats with simple decoders. PIL would start Ghostscript for an EPS file, and decode an ICO payload larger than its header states.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
"""File name suffixes of the supported formats, without the dot."""
_PIL_LIMIT = threading.Lock()


def open_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image to RGB (8 bits per channel) and apply its EXIF orientation. Only the first frame of an animation is used.

    ``max_pixels`` limits width x height, and MAX_ASPECT limits the ratio of the longer to the shorter side. Width and height are read from
    the header and checked before anything is decoded. Transparent pixels are blended with white. 16-bit grey is scaled to 8 bits. Raises a
    DataError that names the file if it is missing, in an unsupported format, 0 pixels wide or high, too large, too elongated, truncated or
    corrupt. This function does not check that the file is inside a data root; read_manifest does.
    """
    with _opened(Path(path), max_pixels) as image:
        ImageOps.exif_transpose(image, in_place=True)  # decodes
        return _to_rgb(image)


def image_size(path: str | Path, max_pixels: int = MAX_PIXELS) -> Size:
    """Return the width and height of the image that open_image would return. Only the header is read, so damaged pixels are not detected;
    all other errors are the same as in open_image.
    """
    with _opened(Path(path), max_pixels) as image:
        return image.size[::-1] if _is_turned(image) else image.size


@contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """Yield an image after checking its header. Any error inside the ``with`` block is converted to a DataError."""
    try:
        if not picture_file(path).is_file():  # a named pipe would block for ever
            raise DataError(f"{path}: no such image file; restore it, correct its path, or name the pictures' folder (--root or data.root)")
        if (size := picture_stat(path)[0]) > MAX_BYTES:
            raise DataError(f"{path}: image file has {size} bytes, over the limit of {MAX_BYTES}; save it again, or drop the row")
        with open_picture(path) as handle:
            handle.peek()  # fetch the header before taking the lock, so that threads wait for the network in parallel
            image = _read_header(handle)
            _check_size(path, image, max_pixels)  # first, because _is_turned decodes a PNG whose orientation tag follows its pixels
            yield image
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise DataError(
            f"{path}: it contains no image (corrupt header, 0 pixels wide or high, or not one of {', '.join(_FORMATS)}); "
            "replace or convert the file"
        ) from error
    except Exception as error:  # PIL's decoders raise nearly anything on corrupt bytes: OSError, SyntaxError, struct.error, KeyError, ...
        raise DataError(f"{path}: image cannot be read ({error}); it may be truncated or corrupt, so copy or download it again") from error


def _check_size(path: str | Path, image: Image.Image, max_pixels: int) -> None:
    size = width, height = image.size
    if width * height > max_pixels:
        raise DataError(
            f"{path}: image is {width}x{height} = {width * height} pixels, over the limit of {max_pixels}; shrink it, or raise max_pixels"
        )
    if max(size) > MAX_ASPECT * min(size):
        raise DataError(f"{path}: image is {width}x{height}, over the limit of {MAX_ASPECT}:1 for its sides; crop it, or drop the row")
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # a tile is decoded completely even if the image shows only a part of it
        across, down = (int(image.tag_v2.get(side, 1)) for side in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH))
        if across * down > max_pixels:
            raise DataError(f"{path}: image has tiles of {across}x{down} pixels, over the limit of {max_pixels}; save it again")


def _is_turned(image: Image.Image) -> bool:
    """Return whether the EXIF orientation swaps the image's width and height. For a TIFF, PIL has already swapped them in ``size``."""
    return image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)


def _read_header(handle: io.BufferedReader) -> Image.Image:
    # PIL warns above its own limit and raises above twice that limit, without stating the size. Our limit is always checked right after,
    # so PIL's limit is lifted while the header is read. It is a global variable, so a lock guards it (catch_warnings is not thread-safe).
    with _PIL_LIMIT:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(handle, formats=_FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        # convert("RGB") would clip every value above 255 to white.
        low, high = (float(value) for value in image.convert("F").getextrema())  # type: ignore[arg-type]
        if image.mode == "F" or low < 0 or high > 65535:
            raise ValueError(f"mode {image.mode} with values from {low:g} to {high:g} has no defined range; save it as 8 or 16 bit")
        return image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L").convert("RGB")
    if image.has_transparency_data:
        # convert("RGB") would show the colours of transparent pixels, mostly black.
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
