"""Scene model: two mentioned things, their positions, and everything that captions never mention.

The canvas is a grid of ``GRID`` x ``GRID`` units whatever the image size. Positions and sizes are integers in units (radii in tenths of a
unit), so that no platform rounds differently. Captions only mention values listed in ``SHAPES`` to ``COUNTS``.

One regularity is planted, with probability ``Rule.p``: of the two things, the one whose shape comes first in ``SHAPES`` is the left, upper
or front one, so a relation can be guessed from only the nouns. ``HELD_OUT`` combinations are one cell per row and per column of the colour
x shape square, so every colour and every shape still occurs in training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import TypeAlias

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
TEXTURES = ("plain", "striped", "dotted", "hollow")
SIZES = ("medium", "small", "large")
COUNTS = (1, 2, 3)
RELATIONS = ("left", "right", "above", "below", "front", "behind")
_FREQUENCY = (2, 2, 2, 2, 1, 1)  # fewer overlapping things, because they hide each other
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above", "front": "behind", "behind": "front"}

GRID = 48
BACKGROUNDS = ("flat", "gradient", "stripes", "checker", "bricks", "noise")
NUM_TONES = 6
DISTRACTORS = ("dash", "corner")
"""Kinds of marks that captions never mention, so distractors cannot make a caption false."""

HELD_OUT = frozenset((COLOURS[(i + 2) % len(COLOURS)], shape) for i, shape in enumerate(SHAPES))

_SAID = 0.35  # share of things with one attribute beyond colour and shape; at most one, so that captions stay short and things legible


@dataclass(frozen=True)
class Thing:
    """Attributes of one thing that captions may mention. A ``count`` > 1 is drawn as a tight cluster."""

    shape: str
    colour: str
    texture: str = "plain"
    size: str = "medium"
    count: int = 1

    @property
    def held_out(self) -> bool:
        """True if this colour and shape never occur together in training."""
        return (self.colour, self.shape) in HELD_OUT


@dataclass(frozen=True)
class Look:
    """Jitter of one thing: its scale in percent, and its tint as an RGB offset in levels."""

    scale: int
    tint: tuple[int, int, int]


@dataclass(frozen=True)
class Backdrop:
    """Background kind, its pair of tones, its offset in units, and the seed of its noise."""

    kind: str
    tone: int
    phase: int
    noise: int


@dataclass(frozen=True)
class Distractor:
    """A small unmentioned mark at (x, y) units, light or dark."""

    kind: str
    x: int
    y: int
    light: bool


@dataclass(frozen=True)
class Scene:
    """Two things A and B (index 0 and 1). ``spots`` are their centres in units, and ``front`` is the index of the thing drawn last."""

    things: tuple[Thing, Thing]
    spots: tuple[tuple[int, int], tuple[int, int]]
    front: int
    looks: tuple[Look, Look]
    backdrop: Backdrop
    distractors: tuple[Distractor, ...]

    @property
    def relation(self) -> str:
        """Relation of A to B, derived from the geometry. Overlapping things have a depth order, others a side."""
        dx, dy = self.spots[0][0] - self.spots[1][0], self.spots[0][1] - self.spots[1][1]
        if max(abs(dx), abs(dy)) < GRID // 4:
            return "front" if self.front == 0 else "behind"
        if abs(dx) > abs(dy):
            return "left" if dx < 0 else "right"
        return "above" if dy < 0 else "below"


@dataclass(frozen=True)
class Rule:
    """Distribution of a split's scenes: strength of the planted correlation, and whether held-out combinations may or must occur."""

    p: float
    held_out: str = "never"  # "never", "may" or "must" (at least one of the two things of every scene)


Plan: TypeAlias = tuple[bool, int | None]
"""Choices that are drawn only once per scene, so redrawing the scene does not bias their rates: whether it follows the planted regularity,
and the index of a thing with a held-out combination, or None."""


def draw_plan(rng: Random, rule: Rule) -> Plan:
    """Draw whether the scene follows the planted regularity, and which thing has a held-out combination."""
    follows_order = rng.random() < rule.p
    return follows_order, rng.randrange(2) if rule.held_out == "must" else None


def draw_scene(rng: Random, rule: Rule, plan: Plan) -> Scene:
    """Draw a random scene under ``rule`` that follows ``plan``. The two things always differ in shape, so every caption is unambiguous."""
    follows_order, held_out_thing = plan
    relation = rng.choices(RELATIONS, _FREQUENCY)[0]
    first, second = sorted(rng.sample(range(len(SHAPES)), 2))
    a_comes_first = (relation in ("left", "above", "front")) == follows_order
    shapes = (SHAPES[first], SHAPES[second]) if a_comes_first else (SHAPES[second], SHAPES[first])
    overlap = relation in ("front", "behind")
    a, b = (_draw_thing(rng, rule, shape, held_out_thing == i, overlap) for i, shape in enumerate(shapes))
    spots, front = _draw_spots(rng, relation)
    backdrop = Backdrop(rng.choice(BACKGROUNDS), rng.randrange(NUM_TONES), rng.randrange(GRID), rng.getrandbits(32))
    kinds = [rng.choice(DISTRACTORS) for _ in range(rng.randrange(3))]
    distractors = _draw_distractors(rng, relation, [(kind, rng.random() < 0.5) for kind in kinds])
    return Scene((a, b), spots, front, (_draw_look(rng), _draw_look(rng)), backdrop, distractors)


def shake(scene: Scene, rng: Random) -> Scene:
    """Return the scene with all jitter drawn again: positions, scales, tints, background offset and noise, distractor positions."""
    spots, front = _draw_spots(rng, scene.relation)
    return replace(
        scene,
        spots=spots,
        front=front,
        looks=(_draw_look(rng), _draw_look(rng)),
        backdrop=replace(scene.backdrop, phase=rng.randrange(GRID), noise=rng.getrandbits(32)),
        distractors=_draw_distractors(rng, scene.relation, [(mark.kind, mark.light) for mark in scene.distractors]),
    )


def _draw_thing(rng: Random, rule: Rule, shape: str, must_hold_out: bool, overlap: bool) -> Thing:
    if must_hold_out:
        colours = [c for c in COLOURS if (c, shape) in HELD_OUT]
    else:
        colours = [c for c in COLOURS if rule.held_out != "never" or (c, shape) not in HELD_OUT]
    thing = Thing(shape, rng.choice(colours))
    if rng.random() >= _SAID:
        return thing
    if overlap:  # hollow, resized or clustered things that overlap cannot be distinguished at 48 px
        return replace(thing, texture=rng.choice(("striped", "dotted")))
    factor = rng.randrange(3)
    if factor == 0:
        return replace(thing, texture=rng.choice(TEXTURES[1:]))
    if factor == 1:
        return replace(thing, size=rng.choice(SIZES[1:]))
    return replace(thing, count=rng.choice(COUNTS[1:]))


def _draw_spots(rng: Random, relation: str) -> tuple[tuple[tuple[int, int], tuple[int, int]], int]:
    middle, quarter = GRID // 2, GRID // 4
    if relation in ("front", "behind"):
        x, y = middle + rng.randint(-4, 4), middle + rng.randint(-4, 4)
        dx, dy = rng.choice(((4, 2), (4, -2), (-4, 2), (-4, -2), (2, 4), (2, -4), (-2, 4), (-2, -4)))
        return ((x - dx, y - dy), (x + dx, y + dy)), 0 if relation == "front" else 1
    near = (quarter - rng.randint(0, 1), middle + rng.randint(-4, 4))
    far = (GRID - quarter + rng.randint(0, 1), middle + rng.randint(-4, 4))
    if relation in ("above", "below"):
        near, far = (near[1], near[0]), (far[1], far[0])
    return ((near, far) if relation in ("left", "above") else (far, near)), 0


def _draw_look(rng: Random) -> Look:
    return Look(rng.choice((94, 97, 100, 103)), (rng.randint(-14, 14), rng.randint(-14, 14), rng.randint(-14, 14)))


def _draw_distractors(rng: Random, relation: str, marks: list[tuple[str, bool]]) -> tuple[Distractor, ...]:
    # no edit moves a thing into the two margins along the pair's axis, so no edit covers or uncovers a mark
    drawn = []
    for side, (kind, light) in zip(rng.sample((4, GRID - 4), 2), marks, strict=False):
        along = rng.randint(5, GRID - 5)
        x, y = (side, along) if relation in ("above", "below") else (along, side)
        drawn.append(Distractor(kind, x, y, light))
    return tuple(drawn)
