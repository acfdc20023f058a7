"""World with habits: synthetic scenes of a few things (objects) that mostly have their usual look and place.

``HABITS`` defines each kind's habits: its usual attributes, such as green for trees. ``draw_scene`` follows each habit with a given
probability. In training sets, it is usually high, so that a model learns the habits as priors. In test sets, it is 1 or 0, to expose a
model that relies on habits.

A picture has three rows of three cells. A thing has one kind, one colour and one to three copies in neighbouring cells of a row. The things
of a scene differ in kind, so "the cup" is unambiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, TypeVar

Value = TypeVar("Value", str, int)

BACKGROUNDS = ("meadow", "kitchen", "night", "desert", "lake")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
ROWS = ("top", "middle", "bottom")
SIDE = 3
"""Number of rows and of columns."""
FEWEST, MOST = 2, 5
"""Minimum and maximum total number of copies in a scene."""


@dataclass(frozen=True)
class Habit:
    """Usual attributes of a kind of thing: colour, number of copies, row, background, and company (another kind that usually appears with
    it). A value of "" or 0 means that the kind has no such habit.
    """

    colour: str = ""
    number: int = 0
    row: str = ""
    background: str = ""
    company: str = ""


HABITS = {
    "tree": Habit(colour="green", background="meadow"),
    "mushroom": Habit(colour="red", row="bottom", background="meadow", company="tree"),
    "cup": Habit(background="kitchen", company="plate"),
    "plate": Habit(colour="white", row="bottom", background="kitchen"),
    "moon": Habit(colour="white", row="top", background="night", company="star"),
    "star": Habit(number=2, background="night"),
    "cactus": Habit(colour="green", background="desert", company="sun"),
    "sun": Habit(colour="yellow", row="top", background="desert"),
    "boat": Habit(background="lake", company="fish"),
    "fish": Habit(colour="blue", row="bottom", background="lake"),
    "basket": Habit(colour="yellow", company="pear"),
    "pear": Habit(),
    "shoe": Habit(number=2),
    "ball": Habit(company="shoe"),
    "car": Habit(row="bottom"),
    "key": Habit(colour="purple"),
}
"""Kind -> habits. All backgrounds are equally frequent, so each must be usual for the same number of kinds (two)."""
KINDS = tuple(HABITS)
STRENGTH = 0.96
"""Default probability that a thing in a training picture follows a given habit."""
_NUMBERS = {1: 0.8, 2: 0.15, 3: 0.05}
_THINGS = {2: 0.35, 3: 0.4, 4: 0.25}
HELD_OUT = {kind: COLOURS[(i + 3 if COLOURS[i % 6] == habit.colour else i) % 6] for i, (kind, habit) in enumerate(HABITS.items())}
"""Kind -> colour that this kind never has in training. It is never the usual colour."""


@dataclass(frozen=True)
class Thing:
    """Copies of one kind of thing, one in each of the adjacent ``columns`` of a row."""

    kind: str
    colour: str
    row: int
    columns: tuple[int, ...]

    @property
    def number(self) -> int:
        """Number of copies."""
        return len(self.columns)

    @property
    def held_out(self) -> bool:
        """True if this kind never has this colour in training."""
        return HELD_OUT[self.kind] == self.colour

    def as_usual(self, *factors: str) -> Thing:
        """Return a copy in which each of ``factors`` (colour, number, row) has its usual value, if the kind has one."""
        habit, thing = HABITS[self.kind], self
        if habit.colour and "colour" in factors:
            thing = replace(thing, colour=habit.colour)
        if habit.number and "number" in factors:
            thing = replace(thing, columns=tuple(range(habit.number)))
        if habit.row and "row" in factors:
            thing = replace(thing, row=ROWS.index(habit.row))
        return thing


@dataclass(frozen=True)
class Scene:
    """Background, and things of different kinds in the order in which captions mention them. ``seed`` determines the jitter: small random
    variations of the drawing.
    """

    things: tuple[Thing, ...]
    background: str
    seed: int

    @property
    def total(self) -> int:
        """Total number of copies of all things."""
        return sum(thing.number for thing in self.things)

    def find(self, kind: str) -> Thing | None:
        """Return the thing of the given kind, or None."""
        return next((thing for thing in self.things if thing.kind == kind), None)

    def free(self, row: int) -> set[int]:
        """Return the empty columns of a row."""
        return set(range(SIDE)).difference(*(thing.columns for thing in self.things if thing.row == row))

    @property
    def broken(self) -> frozenset[tuple[str, str, object]]:
        """Habits that the scene breaks, as (kind, factor, actual value). A factor is a field of ``Habit``."""
        broken = set[tuple[str, str, object]]()
        for thing in self.things:
            usual = HABITS[thing.kind]
            company = usual.company if self.find(usual.company) else "nothing"
            seen = vars(Habit(thing.colour, thing.number, ROWS[thing.row], self.background, company))
            broken |= {(thing.kind, factor, seen[factor]) for factor, value in vars(usual).items() if value and seen[factor] != value}
        return frozenset(broken)

    def as_usual(self, share: float, rng: Random) -> Scene:
        """Return the scene that a biased text describes. Each broken habit is restored with probability ``share``: the thing gets its usual
        colour, number or row, or its usual company is added. Two things can then share a cell. The background is unchanged.

        Return the original scene if the result would have more than MOST copies of things.
        """
        things = {thing.kind: thing for thing in self.things}
        for kind, factor, _ in sorted(self.broken, key=str):
            company = HABITS[kind].company
            if factor == "background" or rng.random() >= share:
                continue
            if factor == "company":
                colours = [colour for colour in COLOURS if colour != HELD_OUT[company]]
                added = Thing(company, rng.choice(colours), rng.randrange(SIDE), (rng.randrange(SIDE),))
                things[company] = added.as_usual("colour", "number", "row")
            else:
                things[kind] = things[kind].as_usual(factor)
        scene = replace(self, things=tuple(things.values()))
        return scene if scene.total <= MOST else self


def spelled(scene: Scene) -> list[Any]:
    """Convert a scene to JSON values: the background, and the kind, colour, row and columns of each thing. The jitter is left out."""
    return [scene.background, *([thing.kind, thing.colour, thing.row, thing.columns] for thing in scene.things)]


def scene_from(values: Sequence[Any]) -> Scene:
    """Convert the output of ``spelled`` back to a scene."""
    background, *things = values
    return Scene(tuple(Thing(kind, colour, row, tuple(columns)) for kind, colour, row, columns in things), background, 0)


def places(free: set[int], number: int) -> list[tuple[int, ...]]:
    """Return every run of ``number`` adjacent free columns."""
    spans = [tuple(range(first, first + number)) for first in range(SIDE - number + 1)]
    return [span for span in spans if free.issuperset(span)]


def draw_scene(rng: Random, strength: float, held_out: bool = False) -> Scene:
    """Draw a scene in which each habit is followed with probability ``strength``.

    If ``held_out`` is True, exactly one thing has the held-out colour of its kind; otherwise, none does.
    """
    empty = Scene((), rng.choice(BACKGROUNDS), rng.getrandbits(32))
    while (scene := _filled(empty, rng, strength)) is None:
        pass
    if not held_out:
        return scene
    chosen = rng.choice(scene.things)
    things = tuple(replace(thing, colour=HELD_OUT[thing.kind]) if thing is chosen else thing for thing in scene.things)
    return replace(scene, things=things)


def _filled(scene: Scene, rng: Random, strength: float) -> Scene | None:
    for kind in _kinds(rng, strength, scene.background):
        usual = HABITS[kind]
        colours = [colour for colour in COLOURS if colour != HELD_OUT[kind]]
        colour = _value(rng, strength, usual.colour, dict.fromkeys(colours, 1.0))
        number = _value(rng, strength, usual.number, _NUMBERS)
        row = ROWS.index(_value(rng, strength, usual.row, dict.fromkeys(ROWS, 1.0)))
        if not (spans := places(scene.free(row), number)):
            return None
        scene = replace(scene, things=(*scene.things, Thing(kind, colour, row, rng.choice(spans))))
    return scene if FEWEST <= scene.total <= MOST else None


def _value(rng: Random, strength: float, usual: Value, weights: dict[Value, float]) -> Value:
    """Return the usual value, if there is one, with probability ``strength``. Otherwise, draw one of the other values by weight."""
    if usual and rng.random() < strength:
        return usual
    left = {value: weight for value, weight in weights.items() if value != usual}
    return rng.choices(list(left), list(left.values()))[0]


def _kinds(rng: Random, strength: float, background: str) -> list[str]:
    """Draw the kinds of things in a scene. By Bayes' rule, a kind with a usual background has a higher weight in scenes with this
    background and a lower weight in others.
    """
    home, elsewhere = strength * len(BACKGROUNDS), (1 - strength) * len(BACKGROUNDS) / (len(BACKGROUNDS) - 1)
    weights = {
        kind: 1.0 if not habit.background else home if habit.background == background else elsewhere for kind, habit in HABITS.items()
    }
    size = rng.choices(list(_THINGS), list(_THINGS.values()))[0]
    kinds = list[str]()
    while len(kinds) < size:
        kind = rng.choices(list(weights), list(weights.values()))[0]
        weights.pop(kind)
        company = HABITS[kind].company
        if company and (rng.random() < strength) != (company in kinds):
            if company in kinds:
                continue  # this kind must not appear with its usual company
            kinds.append(company)
        weights.pop(company, None)
        kinds.append(kind)
    rng.shuffle(kinds)
    return kinds
