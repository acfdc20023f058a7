"""Rendering of scenes to RGB images, with integer arithmetic only, so that every platform draws the same pixels.

Outlines are rasterised here (even-odd rule on integers, 4 x 4 samples per pixel) and not by ImageDraw, whose floating-point edges may be
rounded differently on other platforms. Masks are cached, and a scene takes a dozen Pillow pastes.
"""

from __future__ import annotations

from functools import lru_cache
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cfvlm_ds.demo.scenes.world import GRID, Scene, Thing

Mask = NDArray[np.bool_]
Box = tuple[int, int, int, int]

_SAMPLES = 4  # per pixel and axis

_RGB = {
    "red": (222, 38, 38),
    "green": (34, 150, 52),
    "blue": (40, 76, 226),
    "yellow": (246, 214, 30),
    "purple": (150, 44, 190),
    "cyan": (40, 214, 222),
}
_ACCENT = {colour: (30, 30, 30) if colour in ("yellow", "cyan") else (248, 248, 244) for colour in _RGB}  # stripes and dots
_OUTLINE = (24, 24, 28)
# neutral tones, two similar ones for each background, so that no thing has the colour of its background
_TONES = (
    ((206, 202, 194), (180, 176, 170)),
    ((168, 170, 176), (146, 148, 156)),
    ((132, 128, 122), (112, 108, 104)),
    ((92, 96, 104), (74, 78, 86)),
    ((222, 214, 198), (196, 186, 168)),
    ((150, 138, 124), (128, 118, 106)),
)
# corner points in thousandths of the radius, counter-clockwise from the top, y down
_CORNERS = {
    "square": ((-840, -840), (-840, 840), (840, 840), (840, -840)),
    "triangle": ((0, -960), (-980, 760), (980, 760)),
    "diamond": ((0, -1000), (-1000, 0), (0, 1000), (1000, 0)),
    "cross": tuple(
        (x * 940 // 3, y * 940 // 3)
        for x, y in ((-1, -3), (-1, -1), (-3, -1), (-3, 1), (-1, 1), (-1, 3), (1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3))
    ),
    "star": (
        (0, -1000), (-276, -380), (-951, -309), (-447, 145), (-588, 809), (0, 470), (588, 809), (447, 145), (951, -309), (276, -380),
    ),
}  # fmt: skip
_CIRCLE = 920

_RADIUS = {"small": 50, "medium": 80, "large": 102}  # tenths of a unit
_CLUSTER = {
    1: ((0, 0),),
    2: ((-6, 0), (6, 0)),
    3: ((0, -5), (-6, 5), (6, 5)),
}  # offsets in units
_CLUSTER_RADIUS = 52  # tenths of a unit


def render(scene: Scene, image_size: int) -> Image.Image:
    """Render the scene as an RGB image of ``image_size`` x ``image_size`` pixels."""
    image = _background(scene, image_size)
    for mark in scene.distractors:
        stamp = _mark(mark.kind, image_size)
        shade = (238, 238, 236) if mark.light else (40, 40, 44)
        image.paste(shade, _box_at(mark.x, mark.y, stamp.width // 2, image_size), stamp)
    for index in (1 - scene.front, scene.front):
        thing, look = scene.things[index], scene.looks[index]
        r, g, b = (min(255, max(0, level + shift)) for level, shift in zip(_RGB[thing.colour], look.tint, strict=True))
        outline, fill, accent = _stamp(thing.shape, thing.texture, _sample_radius(thing, look.scale, image_size), image_size)
        for x, y in _centres(scene, index):
            box = _box_at(x, y, fill.width // 2, image_size)
            image.paste(_OUTLINE, box, outline)
            image.paste((r, g, b), box, fill)
            if accent is not None:
                image.paste(_ACCENT[thing.colour], box, accent)
    return image


def _centres(scene: Scene, index: int) -> list[tuple[int, int]]:
    x, y = scene.spots[index]
    return [(x + dx, y + dy) for dx, dy in _CLUSTER[scene.things[index].count]]


def _sample_radius(thing: Thing, scale: int, image_size: int) -> int:
    """Return the radius of a thing in samples."""
    tenths = _RADIUS[thing.size] if thing.count == 1 else _CLUSTER_RADIUS
    return tenths * scale * image_size * _SAMPLES // (10 * 100 * GRID)


def _outline_width(image_size: int) -> int:
    """Return the width of an outline in samples: three quarters of a unit."""
    return max(2, 3 * _SAMPLES * image_size // (4 * GRID))


def _half_width(radius: int, image_size: int) -> int:
    """Return half the side of a stamp in pixels: its radius and outline, rounded up."""
    return -(-(radius + _outline_width(image_size)) // _SAMPLES)


def _box_at(x: int, y: int, half: int, image_size: int) -> Box:
    column, row = x * image_size // GRID, y * image_size // GRID
    return column - half, row - half, column + half, row + half


@lru_cache(maxsize=4096)
def _stamp(shape: str, texture: str, radius: int, image_size: int) -> tuple[Image.Image, Image.Image, Image.Image | None]:
    """Draw the alpha masks of a thing: outline (including its inside), fill, and stripes or dots."""
    half = _half_width(radius, image_size) * _SAMPLES
    inside = _inside(shape, radius, half)
    unit = image_size * _SAMPLES // GRID
    edge = np.arange(-half, half)
    accent = None
    if texture == "hollow":
        inside = inside & ~_eroded(inside, 7 * unit // 4)
    elif texture == "striped":
        accent = inside & (((edge + unit) // (2 * unit)) % 2 == 1)[:, None]
    elif texture == "dotted":
        # a dot at the centre and every five units around it, odd rows shifted by half a step
        step = 5 * unit
        row = (edge + step // 2) // step
        dy = (edge + step // 2) % step - step // 2
        dx = (edge[None, :] + step // 2 + (row[:, None] % 2) * (step // 2)) % step - step // 2
        accent = inside & (4 * (dx * dx + dy[:, None] ** 2) < 9 * unit * unit)
    outline = ~_eroded(~inside, _outline_width(image_size))
    return _alpha(outline), _alpha(inside), None if accent is None else _alpha(accent)


def _inside(shape: str, radius: int, half: int) -> Mask:
    """Return the samples in the shape, [2 half, 2 half]; lengths are in thousandths of a sample, so all products are exact integers."""
    centre = np.arange(-half, half, dtype=np.int64) * 1000 + 500
    x, y = centre[None, :], centre[:, None]
    if shape == "circle":
        mask: Mask = x * x + y * y <= (_CIRCLE * radius) ** 2
        return mask
    points = [(px * radius, py * radius) for px, py in _CORNERS[shape]]
    odd = np.zeros((2 * half, 2 * half), dtype=bool)
    for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1], strict=True):
        if y1 == y2:
            continue
        crosses = (y1 > y) != (y2 > y)
        side = (x - x1) * (y2 - y1) - (x2 - x1) * (y - y1)
        odd ^= crosses & ((side < 0) if y2 > y1 else (side > 0))
    return odd


def _eroded(mask: Mask, steps: int) -> Mask:
    """Remove the ``steps`` outermost samples of a mask; everything beyond the border counts as part of the mask."""
    for _ in range(steps):
        padded = np.pad(mask, 1, constant_values=True)
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


def _alpha(mask: Mask) -> Image.Image:
    rows, columns = mask.shape[0] // _SAMPLES, mask.shape[1] // _SAMPLES
    counts = mask.reshape(rows, _SAMPLES, columns, _SAMPLES).sum(axis=(1, 3))
    return _grey(counts * 255 // _SAMPLES**2)


def _grey(levels: NDArray[np.int64]) -> Image.Image:
    return Image.fromarray(levels.astype(np.uint8))


@lru_cache(maxsize=64)
def _mark(kind: str, image_size: int) -> Image.Image:
    half = 3 * image_size // GRID
    mask = np.zeros((2 * half, 2 * half), dtype=np.int64)
    thick = max(1, image_size // GRID)
    mask[half : half + thick, thick:-thick] = 255
    if kind == "corner":
        mask[thick : half + thick, thick : 2 * thick] = 255
    return _grey(mask)


def _background(scene: Scene, image_size: int) -> Image.Image:
    backdrop = scene.backdrop
    base, other = _TONES[backdrop.tone]
    image = Image.new("RGB", (image_size, image_size), base)
    if backdrop.kind == "noise":
        pattern = Image.frombytes("L", image.size, Random(backdrop.noise).randbytes(image_size * image_size))
    else:
        pattern = _pattern(backdrop.kind, backdrop.phase, image_size)
    image.paste(other, (0, 0), pattern)
    return image


@lru_cache(maxsize=1024)
def _pattern(kind: str, phase: int, image_size: int) -> Image.Image:
    """Return the share of the second tone in each pixel."""
    units = np.arange(image_size, dtype=np.int64) * GRID // image_size + phase
    x, y = units[None, :], units[:, None]
    if kind == "gradient":
        ramp = np.arange(image_size, dtype=np.int64) * 255 // (image_size - 1)
        along = ramp if phase % 2 else ramp[::-1]
        return _grey(np.broadcast_to(along[None, :] if phase % 4 < 2 else along[:, None], (image_size, image_size)))
    if kind == "stripes":
        second = ((x + y) // 6) % 2 == 0
    elif kind == "checker":
        second = (x // 8 + y // 8) % 2 == 0
    elif kind == "bricks":
        second = (y % 6 == 0) | ((x + 6 * (y // 6 % 2)) % 12 == 0)
    else:
        second = np.zeros((1, 1), dtype=bool)
    return _grey(np.broadcast_to(second * np.int64(255), (image_size, image_size)))
