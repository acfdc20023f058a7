"""Cut-out pictures of named things, from an emoji font or a folder, and exact edits of their colour, number and position.

A colour name is a range of hue, saturation and brightness. A thing has a natural colour if one name applies to most of its visible area.
Recolouring rotates the hue of this area, and scales its saturation and brightness to those of the new colour. A recoloured thing is kept
only if the classifier that named its natural colour gives it the name of the new colour.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from random import Random

import inflect
import numpy as np
import yaml
from PIL import Image, ImageDraw, ImageFont

from cfvlm_ds.counterfactuals.propose.english import article
from cfvlm_ds.counterfactuals.propose.vocabulary import NOUNS

SIDE = 60
"""Side of a picture in pixels: 5 patches of 12."""
COLOURS = {
    "red": (0.0, 0.85, 0.82),
    "orange": (28.0, 0.90, 0.98),
    "yellow": (50.0, 0.80, 0.97),
    "green": (115.0, 0.65, 0.62),
    "blue": (215.0, 0.78, 0.85),
    "purple": (275.0, 0.58, 0.66),
    "pink": (335.0, 0.45, 0.95),
    "brown": (22.0, 0.62, 0.48),
}
"""Name -> hue in degrees, saturation and brightness of a recoloured area."""
HUES = {"red": (346, 373), "orange": (20, 37), "yellow": (38, 62), "green": (64, 165), "blue": (190, 245), "purple": (260, 305)}
"""Name -> first and last hue in degrees. People disagree on the names of the hues between these ranges."""
SHARE = 0.5
"""A thing has a natural colour if at least this share of its visible area has about the same hue."""
NEAR = 32
"""Largest difference in degrees between a colour's hue and the hues of its highlights and shadows."""
GLYPH = 109  # the only bitmap size in the font
BLOCKS = ((0x2600, 0x27C0), (0x2B00, 0x2C00), (0x1F300, 0x1F600), (0x1F680, 0x1F700), (0x1F900, 0x1FB00))
_FILE = yaml.safe_load(Path(__file__).with_name("prior_things.yaml").read_text())
LISTED = {what: [name.strip() for name in text.split(";")] for what, text in _FILE.items()}
CALLED = {standard.strip(): (name or standard).strip() for standard, _, name in (each.partition("=") for each in LISTED["names"])}
"""Name in the Unicode standard -> name of the thing."""


UNCOUNTED = ("sheep", "fish", "tennis")
"""Nouns with the same form in singular and plural, and uncountable nouns."""
FORMS = inflect.engine()


@lru_cache(1 << 12)
def is_plural(noun: str) -> bool | None:
    """Return whether a noun is plural, or None if its form does not show it."""
    return None if noun.lower() in UNCOUNTED else bool(FORMS.singular_noun(noun.lower()))


def renumbered(noun: str, plural: bool) -> str | None:
    """Return the singular or plural of a noun, or None for nouns in UNCOUNTED."""
    word = noun.lower()
    if word in NOUNS:
        return NOUNS[word][2 if plural else 1]
    if word in UNCOUNTED:
        return None
    singular = FORMS.singular_noun(word)  # False if the word is singular
    if plural:
        return word if singular else str(FORMS.plural_noun(word))
    return str(singular) if singular else word


@dataclass(frozen=True)
class Thing:
    """A cut-out with its name and its natural ``colour`` ("" for none).

    ``alone`` is True if natural pictures never show several copies. ``held_out`` is True if training has no counterfactual with the thing.
    """

    name: str
    cutout: Image.Image
    colour: str
    held_out: bool
    alone: bool

    @cached_property
    def is_counted(self) -> bool:
        last = self.name.split()[-1]
        return self.name not in LISTED["uncounted"] and is_plural(last) is False and renumbered(last, True) is not None

    @property
    def takes_article(self) -> bool:
        last = self.name.split()[-1]
        return self.name not in LISTED["uncounted"] and not is_plural(last)

    @property
    def plural(self) -> str:
        *first, last = self.name.split()
        return " ".join([*first, str(renumbered(last, True))])

    @property
    def in_sky(self) -> bool:
        return self.name in LISTED["above"]

    def phrase(self, colour: str = "") -> str:
        """Return a noun phrase such as "a banana", "a blue banana" or "brown bread"."""
        words = f"{colour} {self.name}".strip()
        return f"{article(words.split()[0])} {words}" if self.takes_article else words

    def shown(self, colour: str = "") -> Image.Image:
        """Return the cut-out in a colour, by default its natural colour."""
        return self.cutout if colour in ("", self.colour) else self._recoloured[colour]

    @property
    def colours(self) -> list[str]:
        """Colours in which the thing can be shown, except its natural one."""
        return sorted(self._recoloured)

    @cached_property
    def _recoloured(self) -> dict[str, Image.Image]:
        if not self.colour:
            return {}
        made = {colour: recoloured(self.cutout, colour) for colour in COLOURS if colour != self.colour}
        return {colour: picture for colour, picture in made.items() if dominant(picture) == colour}


# colours --------------------------------------------------------------------------------------------------------------------------------


def named(hue: float, saturation: float, value: float) -> str:
    """Return the name of a colour, or "" if the colour lies between two names or is nearly grey."""
    if value < 0.25 or saturation < 0.25:
        return ""
    if (hue - 320) % 360 < 36 and saturation < 0.62 and value > 0.75:
        return "pink"
    if 8 <= hue <= 38 and value < 0.72:
        return "brown" if saturation > 0.3 else ""
    if saturation < 0.45:
        return ""
    name = next((each for each, (low, high) in HUES.items() if (hue - low) % 360 <= high - low), "")
    vivid = {"orange": saturation >= 0.88 and value >= 0.95, "yellow": saturation >= 0.55 and value >= 0.9}
    return name if vivid.get(name, True) else ""


def hsv_of(picture: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Return two float arrays: [H, W, 3] with hue in degrees, saturation and brightness, and [H, W] with opacity."""
    rgba = np.asarray(picture.convert("RGBA"), dtype=np.float64) / 255
    rgb, alpha = rgba[..., :3], rgba[..., 3]
    high, low = rgb.max(-1), rgb.min(-1)
    spread = np.where(high > low, high - low, 1.0)
    red, green, blue = np.moveaxis(rgb, -1, 0)
    hue = np.select([high == red, high == green], [(green - blue) / spread, 2 + (blue - red) / spread], 4 + (red - green) / spread)
    return np.stack(
        [np.where(high > low, 60 * hue, 0) % 360, np.where(high > 0, (high - low) / np.where(high > 0, high, 1), 0), high], -1
    ), alpha


def rgba_of(hsv: np.ndarray, alpha: np.ndarray) -> Image.Image:
    """Convert arrays from ``hsv_of`` back to a picture."""
    hue, saturation, value = np.moveaxis(hsv, -1, 0)
    turns = (np.array([5.0, 3.0, 1.0]) + hue[..., None] / 60) % 6
    rgb = value[..., None] * (1 - saturation[..., None] * np.clip(np.minimum(turns, 4 - turns), 0, 1))
    return Image.fromarray(np.round(255 * np.concatenate([rgb, alpha[..., None]], -1)).astype(np.uint8), "RGBA")


def dominant(picture: Image.Image) -> str:
    """Return the name of the colour that covers most of a cut-out, including its highlights and shadows, or "" if there is none."""
    hsv, alpha = hsv_of(picture)
    part = _main_part(hsv, alpha)
    if not part.any() or part.sum() < SHARE * (alpha > 0.5).sum():
        return ""
    return named(_middle_hue(hsv[part][:, 0]), *np.median(hsv[part][:, 1:], 0))


def recoloured(picture: Image.Image, new: str) -> Image.Image:
    """Recolour the main area of a cut-out, including its highlights and shadows. Areas with another hue are unchanged."""
    hsv, alpha = hsv_of(picture)
    part = _main_part(hsv, alpha)
    middle, medians = _middle_hue(hsv[part][:, 0]), np.median(hsv[part], 0)
    turned = (hsv[..., 0] - middle + 180) % 360 - 180
    near = (np.abs(turned) < NEAR) & (hsv[..., 1] > 0.12)
    hue, saturation, value = COLOURS[new]
    changed = np.stack(
        [
            (hue + turned / 4) % 360,
            np.clip(hsv[..., 1] * saturation / medians[1], 0, 1),
            np.clip(hsv[..., 2] * value / medians[2], 0, 1),
        ],
        -1,
    )
    return rgba_of(np.where(near[..., None], changed, hsv), alpha)


def _main_part(hsv: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Return [H, W] bool: the coloured pixels near the most common hue."""
    coloured = (alpha > 0.5) & (hsv[..., 1] > 0.25) & (hsv[..., 2] > 0.2)
    counts = np.bincount((hsv[coloured][:, 0] // 5).astype(int), minlength=72)
    around = sum(np.roll(counts, shift) for shift in range(-3, 4))
    hue = 5 * int(np.argmax(around)) + 2.5
    return coloured & (np.abs((hsv[..., 0] - hue + 180) % 360 - 180) < NEAR)


def _middle_hue(hues: np.ndarray) -> float:
    """Return the circular mean of hues, in degrees."""
    angles = np.deg2rad(hues)
    return float(np.rad2deg(np.arctan2(np.sin(angles).mean(), np.cos(angles).mean())) % 360)


# things ---------------------------------------------------------------------------------------------------------------------------------


def things(source: Path, held_out: float = 0.25) -> list[Thing]:
    """Return the things in an emoji font (.ttf) or a folder of cut-outs (NAME.png with transparency). A thing's split depends only on its
    name.
    """
    if not source.exists():
        raise SystemExit(
            f"{source} is missing; install fonts-noto-color-emoji, or give its NotoColorEmoji.ttf or a folder of cut-outs with --font"
        )
    found: dict[str, Image.Image] = {}
    for name, cutout in _files(source) if source.is_dir() else _glyphs(source):
        found.setdefault(name, cutout)
    return [_thing(name, found[name], held_out) for name in sorted(found)]


def _thing(name: str, cutout: Image.Image, held_out: float) -> Thing:
    return Thing(name, cutout, dominant(cutout), _drawn("held out", name) < held_out, _drawn("alone", name) < 0.5)


def _drawn(what: str, name: str) -> float:
    """Return a uniformly distributed number in [0, 1) that depends only on the arguments."""
    return int.from_bytes(hashlib.sha256(f"{what}/{name}".encode()).digest()[:4], "big") / 2**32


def _files(folder: Path) -> Iterator[tuple[str, Image.Image]]:
    for path in sorted(folder.glob("*.png")):
        yield path.stem.replace("_", " "), cropped(Image.open(path).convert("RGBA"))


def _glyphs(font_file: Path) -> Iterator[tuple[str, Image.Image]]:
    font = ImageFont.truetype(str(font_file), GLYPH)
    for character in _drawn_by(font):
        if name := CALLED.get(unicodedata.name(character).lower()):
            canvas = Image.new("RGBA", (160, 160))
            ImageDraw.Draw(canvas).text((10, 10), character, font=font, embedded_color=True)
            yield name, cropped(canvas)


def _drawn_by(font: ImageFont.FreeTypeFont) -> list[str]:
    """Return the characters in BLOCKS for which a font has a picture (a wide, non-empty glyph)."""
    characters = [chr(code) for first, end in BLOCKS for code in range(first, end) if unicodedata.name(chr(code), "")]
    return [character for character in characters if font.getlength(character) > 100 and font.getmask(character).getbbox()]


def cropped(picture: Image.Image) -> Image.Image:
    """Remove a picture's empty margins."""
    return picture.crop(picture.getchannel("A").point(lambda value: 255 * (value > 127)).getbbox())


# scenes ---------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """Contents of a picture: ``things`` and their colours, each in its own part of the square.

    ``layout`` is ``free`` (one thing anywhere), ``grid`` (things in quarters), ``above`` or ``left`` (the first of two things is above the
    second, or to the left of it).
    """

    things: tuple[Thing, ...]
    colours: tuple[str, ...]
    layout: str

    def drawn(self, rng: Random) -> Image.Image:
        """Draw an RGB picture with a side of SIDE pixels, on a grey background, so that only the things have a colour.

        If two scenes are drawn with ``rng`` in the same state, the pictures differ only in their contents.
        """
        grey = rng.randint(150, 255)
        canvas = Image.new("RGB", (SIDE, SIDE), (grey, grey, grey))
        for thing, colour, (left, top, side) in zip(self.things, self.colours, self._places(rng), strict=False):
            cutout = thing.shown(colour)
            cutout = cutout.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else cutout
            cutout = cutout.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, expand=True)
            scale = side * rng.uniform(0.85, 1.0) / max(cutout.size)
            cutout = cutout.resize([max(1, round(scale * edge)) for edge in cutout.size], Image.Resampling.LANCZOS)
            at = [round(edge + rng.random() * max(0, side - own)) for edge, own in zip((left, top), cutout.size, strict=True)]
            canvas.paste(cutout, tuple(at), cutout)
        return canvas

    def _places(self, rng: Random) -> list[tuple[float, float, float]]:
        """Return the left edge, top edge and side length of the square that each thing is drawn in. In a grid, the first things keep their
        places when more are added.
        """
        half = SIDE / 2
        if self.layout == "free":
            side = rng.uniform(0.55, 0.95) * SIDE
            return [(rng.uniform(0, SIDE - side), rng.uniform(0, SIDE - side), side)]
        if self.layout == "grid":
            quarters = [(x, y, half) for x in (0.0, half) for y in (0.0, half)]
            rng.shuffle(quarters)
            return quarters
        across = rng.uniform(0, half)
        return [(across, edge, half) if self.layout == "above" else (edge, across, half) for edge in (0.0, half)]
