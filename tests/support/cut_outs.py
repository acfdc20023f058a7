"""Test data for benchmarks/real_prior.py: named shapes of one colour instead of emojis, and a language model with random weights."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

SHOWN = {
    "banana": (255, 217, 61), "apple": (221, 46, 68), "lemon": (255, 217, 61), "carrot": (255, 140, 0), "frog": (70, 160, 70),
    "car": (221, 46, 68), "chair": (120, 75, 40), "door": (120, 75, 40), "pear": (110, 190, 60), "bird": (50, 120, 220),
    "bat": (120, 75, 40), "cloud": (250, 250, 250), "rocket": (230, 230, 235), "kite": (255, 140, 0), "swan": (250, 250, 250),
    "mouse": (150, 150, 155), "sheep": (240, 240, 240), "rose": (221, 46, 68), "snake": (70, 160, 70), "ship": (50, 120, 220),
    "cactus": (70, 160, 70), "tent": (255, 140, 0), "whale": (50, 120, 220),
}  # fmt: skip
"""Name -> colour of most of its area (red, green, blue)."""


def write_cut_outs(folder: Path) -> Path:
    """Write NAME.png for every name: a shape of 80 pixels with transparency, a darker rim, and a grey mark that recolouring must not
    change.
    """
    folder.mkdir(parents=True)
    for at, (name, colour) in enumerate(SHOWN.items()):
        picture = Image.new("RGBA", (80, 80))
        pen = ImageDraw.Draw(picture)
        rim = tuple(round(0.8 * part) for part in colour)
        (pen.ellipse if at % 2 else pen.rectangle)((4, 10 + at % 5, 76, 70), fill=(*colour, 255), outline=(*rim, 255), width=5)
        pen.rectangle((34, 34, 44, 44), fill=(128, 128, 128, 255))
        picture.save(folder / f"{name}.png")
    return folder
