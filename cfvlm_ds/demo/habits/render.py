"""Renderer of scenes: RGB pictures of 64 x 64 pixels from 16 x 16 pixel art. Integer arithmetic gives the same pixels on every platform."""

from __future__ import annotations

from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cfvlm_ds.demo.habits.world import KINDS, SIDE, Scene

SIZE = 64
"""Side of a picture in pixels."""
ART = 16
"""Side of the pixel art of one thing, in pixels."""
CELL = SIZE // SIDE
_ART = """
................ .....######..... ................ ................ ......###....... ................ .....######..... .........#......
.......##....... ...##ooooow##... ................ ................ ....##o#........ .......##....... .....#oooo#..... ...##...#o#.....
......#oo#...... ..#oooooowwwo#.. .##########..... ................ ...#ooo#........ .......##....... .....#oooo#.#### ...#o###oo#.....
......#oo#...... .#owwwooowwwoo#. .#++++++++o#.... ......####...... ..#oooo#........ .......##....... .....#oooo#.#oo# ...#ooooooo####.
.....#oooo#..... .#owwwoooowooo#. .#++++++++oo###. ...###oooo###... ..#oooo#........ ......#oo#...... ####.#oooo#.#oo# ...#oo++++oooo#.
.....#ooooo#.... #oowwwooooowwwo# .#ooooooooo###o# .##ooo+++++oo##. .#ooooo#........ ......#oo#...... #oo#.#oooo#.#oo# ..#oo+oooo+oo#..
....#oooooo#.... #oooooooooowwwo# .#oooooooo#...## #ooo++oooo++ooo# .#ooooo#........ .#####oooo###### #oo#.#ooooo#ooo# ##oo+oooooo+o#..
...#oooooooo#... #oooooooooowwwo# .#oooooooo#...## #oo+oooooooo+oo# .#oooooo#....... ..#oooooooooo#.. #oo#.#ooooooooo# .#oo+oooooo+o#..
...#ooooooooo#.. #####oooooo##### .#oooooooo#...## #oo+oooooooo+oo# .#oooooo#....... ...#oooooooo#... #ooo#oooooo##### ..#o+oooooo+oo#.
..#oooooooooo#.. .....#wwww#..... .#ooooooooo###o# #ooo++oooo++ooo# .#ooooooo#...... ....#oooooo#.... #ooooooooo#..... ..#o+oooooo+oo##
.#####oooo#####. .....#wwww#..... .#oooooooooo###. .##ooo+++++oo##. .#oooooooo###### ....#oooooo#.... #####ooooo#..... ..#oo+oooo+oo#..
......#++#...... .....#wwww#..... .#ooooooooo#.... ...###oooo###... ..#ooooooooooo#. ....#oooooo#.... .....#oooo#..... .#oooo++++oo#...
......#++#...... .....#wwww#..... .#oooooooo#..... ......####...... ..#ooooooooooo#. ....#o####o#.... .....#oooo#..... .####ooooooo#...
......#++#...... .....#wwww#..... .##########..... ................ ...#ooooooooo#.. ...#o#....#o#... .....#oooo#..... .....#oo###o#...
......#++#...... .....#wwww#..... ................ ................ ....##oooooo#... ...##......##... .....#oooo#..... .....#o#...##...
......####...... .....######..... ................ ................ ......######.... ................ .....######..... ......#.........
.......##....... ................ ......####...... .......##....... ................ ................ ................ ................
.......#o#...... ................ ....##o##o##.... .......##....... ................ .....######..... ................ ................
.......#o#...... ................ ...#oo#..#oo#... ......#++#...... ................ ....#oo++oo#.... .....######..... ................
......#ooo#..... .....##........# ...#o#....#o#... .....#oooo#..... ................ ...#ooo++ooo#... ....#oooooo#.... ...####.........
.....#ooooo#.... ..###oo###...### ..#o#......#o#.. .....#oooo#..... .######......... ..#oooo++oooo#.. ....#++++++#.... .##oooo##.......
.....#oooooo#... .#oooo+ooo#.#oo# ..#o#......#o#.. ....#oooooo#.... .#oooo#......... .#ooooo++ooooo#. ...#o++++++o#... .#oo##oo#.......
....#ooooooo#... #o++oo+oooo#ooo# ..##........##.. ....#oooooo#.... .#owwww#........ .#ooooo++ooooo#. ...#o++++++o#... #oo#..#oo#######
...#ooooooooo#.. #oo+oo+oooooooo# ##oo########oo## ....#oooooo#.... .#ooooo#........ .#++++++++++++#. ..#oooooooooo#.. #o#....#ooooooo#
..#####oo######. #ooooo+oooooooo# #oooooooooooooo# ...#oooooooo#... .#oooooo##...... .#++++++++++++#. ##oooooooooooo## #o#....#ooooooo#
.......##....... #ooooo+oooo#ooo# .#+++++++++++++# ..#oooooooooo#.. .#oooooooo####.. .#ooooo++ooooo#. #oooooooooooooo# #oo#..#ooo##ooo#
#######oo####### .#oooo+ooo#.#oo# .#oooooooooooo#. ..#oooooooooo#.. .#oooooooooooo#. .#ooooo++ooooo#. #oo##oooooo##oo# .#oo##ooo#..#oo#
.#++++++++++++#. ..###oo###...### .#oooooooooooo#. ..#oooooooooo#.. .#ooooooooooooo# ..#oooo++oooo#.. #o####oooo####o# .##ooooo#...#oo#
.#oooooooooooo#. .....##........# .#++++++++++++#. ..#oooooooooo#.. .#ooooooooooooo# ...#ooo++oooo#.. ################ ...#####....#oo#
..#oooooooooo#.. ................ .#oooooooooooo#. ...#oooooooo#... .#wwwwwwwwwwwww# ....#oo++oo##... ..####....####.. ............####
...#oooooooo#... ................ ..#oooooooooo#.. ....#oooooo#.... .############### .....######..... ...##......##... ................
...##########... ................ ..############.. .....######..... ................ ................ ................ ................
"""
"""Pixel art of all kinds in order, eight per row: outline (#), colour (o), details (+) and highlights (w)."""

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
"""Background -> (base colour, pattern colour)."""

_LINES = _ART.split("\n")[1:-1]
_STAMPS = {
    kind: np.array([list(line.split()[i % 8]) for line in _LINES[i // 8 * ART : (i // 8 + 1) * ART]]) for i, kind in enumerate(KINDS)
}
_MASKS = {kind: {mark: stamp == mark for mark in "#o+w"} for kind, stamp in _STAMPS.items()}


def render(scene: Scene) -> Image.Image:
    """Render a scene as an RGB picture. The jitter of a cell (random shift, shade and mirroring) depends only on the cell and the scene's
    seed, so an edit of one thing does not change the others.
    """
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
