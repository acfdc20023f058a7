"""Drawing of scenes: RGB pictures of 64 x 64 pixels, from 16 x 16 pixel art and integers only, so that every platform draws the same."""

from __future__ import annotations

from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cfvlm_ds.demo.habits.world import KINDS, SIDE, Scene

SIZE = 64
"""Side of a picture in pixels."""
ART = 16
"""Side of a drawn thing in pixels."""
CELL = SIZE // SIDE
_ART = """
................ .....######..... ................ ................ ......###....... ................ .....######..... .........#......
.......##....... ...##ooooow##... ................ ................ ....##o#........ .......##....... .....#ooooo##### ...##...#o#.....
......#oo#...... ..#oooooowwwo#.. .##########..... ................ ...#ooo#........ .......##....... .....#ooooooooo# ...#o###oo#.....
......#oo#...... .#owwwooowwwoo#. .#++++++++o#.... ......####...... ..#oooo#........ .......##....... #####oowooooooo# ...#ooooooo####.
.....#oooo#..... .#owwwoooowooo#. .#++++++++oo###. ...###oooo###... ..#oooo#........ ......#oo#...... #oooooooooooooo# ...#oo++++oooo#.
.....#ooooo#.... #oowwwooooowwwo# .#ooooooooo###o# .##ooo+++++oo##. .#ooooo#........ ......#oo#...... #oooooooooooooo# ..#oo+oooo+oo#..
....#oooooo#.... #oooooooooowwwo# .#oooooooo#...## #ooo++oooo++ooo# .#ooooo#........ .#####oooo###### #oooooooooooooo# ##oo+oooooo+o#..
...#oooooooo#... #oooooooooowwwo# .#oooooooo#...## #oo+oooooooo+oo# .#oooooo#....... ..#oooooooooo#.. #ooooooowoooooo# .#oo+oooooo+o#..
...#ooooooooo#.. #####oooooo##### .#oooooooo#...## #oo+oooooooo+oo# .#oooooo#....... ...#oooooooo#... #oooooooooo##### ..#o+oooooo+oo#.
..#oooooooooo#.. .....#wwww#..... .#ooooooooo###o# #ooo++oooo++ooo# .#ooooooo#...... ....#oooooo#.... #ooooooooo#..... ..#o+oooooo+oo##
.#####oooo#####. .....#wwww#..... .#oooooooooo###. .##ooo+++++oo##. .#oooooooo###### ....#oooooo#.... #####ooooo#..... ..#oo+oooo+oo#..
......#++#...... .....#wwww#..... .#ooooooooo#.... ...###oooo###... ..#ooooooooooo#. ....#oooooo#.... .....#owoo#..... .#oooo++++oo#...
......#++#...... .....#wwww#..... .#oooooooo#..... ......####...... ..#ooooooooooo#. ....#o####o#.... .....#oooo#..... .####ooooooo#...
......#++#...... .....#wwww#..... .##########..... ................ ...#ooooooooo#.. ...#o#....#o#... .....#oooo#..... .....#oo###o#...
......#++#...... .....#wwww#..... ................ ................ ....##oooooo#... ...##......##... .....#oooo#..... .....#o#...##...
......####...... .....######..... ................ ................ ......######.... ................ .....######..... ......#.........
.......##....... ................ .............### .......##....... ................ ................ ................ ................
.......#o#...... ................ .............#+# .......##....... ................ .....######..... ................ ................
.......#o#...... ................ .............#o# ......#++#...... ................ ....#oo++oo#.... .....######..... ....#...........
......#ooo#..... .....##........# .............#o# .....#oooo#..... ................ ...#ooo++ooo#... ....#oooooo#.... ..##o##.........
.....#ooooo#.... ..###oo###...### ............#oo# .....#oooo#..... .######......... ..#oooo++oooo#.. ....#++++++#.... .#ooooo#........
.....#oooooo#... .#oooo+ooo#.#oo# #...........#oo# ....#oooooo#.... .#oooo#......... .#ooooo++ooooo#. ...#o++++++o#... .#oo##oo########
....#ooooooo#... #o++oo+oooo#ooo# #..........#ooo# ....#oooooo#.... .#owwww#........ .#ooooo++ooooo#. ...#o++++++o#... #oo#..#oooooooo#
...#ooooooooo#.. #oo+oo+oooooooo# ##.........#ooo# ....#oooooo#.... .#ooooo#........ .#++++++++++++#. ..#oooooooooo#.. #o#...#oooooooo#
..#####oo######. #ooooo+oooooooo# #o#......##oooo# ...#oooooooo#... .#oooooo##...... .#++++++++++++#. ##oooooooooooo## #o#...#oooooooo#
.......##....... #ooooo+oooo#ooo# #oo##..##ooooo#. ..#oooooooooo#.. .#oooooooo####.. .#ooooo++ooooo#. #oooooooooooooo# #oo#..#oooooooo#
#######oo####### .#oooo+ooo#.#oo# #oooo##ooooooo#. ..#oooooooooo#.. .#oooooooooooo#. .#ooooo++ooooo#. #oo##oooooo##oo# .#oo##oo#oooooo#
.#++++++++++++#. ..###oo###...### #oooooooooooo#.. ..#oooooooooo#.. .#ooooooooooooo# ..#oooo++oooo#.. #o####oooo####o# .#ooooo#.#ooooo#
.#oooooooooooo#. .....##........# .##oooooooo##... ..#oooooooooo#.. .#ooooooooooooo# ...#ooo++oooo#.. ################ ..##o##..#oo#oo#
..#oooooooooo#.. ................ ...###ooo##..... ...#oooooooo#... .#wwwwwwwwwwwww# ....#oo++oo##... ..####....####.. ....#.....##.###
...#oooooooo#... ................ ......###....... ....#oooooo#.... .############### .....######..... ...##......##... ................
...##########... ................ ................ .....######..... ................ ................ ................ ................
"""
"""The kinds in their order, eight in a line: outline (#), colour (o), details (+) and highlights (w)."""

_RGB = {
    "red": (222, 38, 38),
    "green": (34, 150, 52),
    "blue": (40, 76, 226),
    "yellow": (246, 214, 30),
    "purple": (150, 44, 190),
    "white": (246, 246, 242),
}
_OUTLINE, _HIGHLIGHT = (24, 24, 28), (255, 255, 255)
_TONES = {
    "meadow": ((190, 214, 160), (146, 182, 112)),
    "kitchen": ((214, 208, 204), (182, 172, 170)),
    "night": ((44, 48, 70), (104, 110, 146)),
    "desert": ((230, 204, 158), (206, 174, 124)),
    "lake": ((160, 202, 220), (116, 168, 196)),
}
"""Colour of each background, and of its pattern."""

_LINES = _ART.split("\n")[1:-1]
_STAMPS = {
    kind: np.array([list(line.split()[i % 8]) for line in _LINES[i // 8 * ART : (i // 8 + 1) * ART]]) for i, kind in enumerate(KINDS)
}
_MASKS = {kind: {mark: stamp == mark for mark in "#o+w"} for kind, stamp in _STAMPS.items()}


def render(scene: Scene) -> Image.Image:
    """Draw a scene. The jitter of a cell depends only on the scene's seed and the cell, so an edit changes only what it names."""
    pixels = _background(scene.background, scene.seed)
    for thing in scene.things:
        for column in thing.columns:
            jitter = Random(scene.seed * SIDE**2 + thing.row * SIDE + column)
            x, y = column * CELL + jitter.randint(0, CELL - ART), thing.row * CELL + jitter.randint(0, CELL - ART)
            fill = [min(255, max(0, level + jitter.randint(-14, 14))) for level in _RGB[thing.colour]]
            details = [level * 5 // 9 for level in fill]
            cell, flipped = pixels[y : y + ART, x : x + ART], jitter.random() < 0.5
            for mark, colour in (("#", _OUTLINE), ("o", fill), ("+", details), ("w", _HIGHLIGHT)):
                mask = _MASKS[thing.kind][mark]
                cell[mask[:, ::-1] if flipped else mask] = colour
    return Image.fromarray(pixels)


def _background(name: str, seed: int) -> NDArray[np.uint8]:
    """Draw a background with its pattern, whose offset depends on the seed."""
    x, y = np.arange(SIZE)[None, :] + seed % 29, np.arange(SIZE)[:, None] + seed % 31
    pattern = {
        "meadow": ((x + 3 * (y // 5)) % 7 < 1) & (y % 5 < 3),
        "kitchen": (x % 9 == 0) | (y % 9 == 0),
        "night": (x * 5 + y * 11) % 43 == 0,
        "desert": (y + abs(x % 16 - 8) // 2) % 7 < 2,
        "lake": ((x + 5 * (y // 6)) % 13 < 8) & (y % 6 < 2),
    }[name]
    base, other = np.array(_TONES[name], dtype=np.uint8)
    return np.where(pattern[:, :, None], other, base)
