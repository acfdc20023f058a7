"""Counterfactual edits: each changes one factor of a scene and keeps everything else, including the jitter (small random variations).

An edit takes ``(scene, rng, may_hold_out)`` and returns the edited scene, or None if the edit does not apply. Things keep their order, and
are added and removed only at the end, so the captions of both scenes differ only where the edit changed something. ``may_hold_out`` allows
held-out colours, which a kind never has in training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from cfvlm_ds.demo.habits.world import BACKGROUNDS, COLOURS, FEWEST, KINDS, MOST, SIDE, Scene, Thing, places

EditFunction = Callable[[Scene, Random, bool], "Scene | None"]


def _with(scene: Scene, may_hold_out: bool, changed: dict[int, Thing]) -> Scene | None:
    """Replace things by index. Return None if a new thing has the held-out colour of its kind and ``may_hold_out`` is False."""
    if not may_hold_out and any(thing.held_out for thing in changed.values()):
        return None
    return replace(scene, things=tuple(changed.get(i, thing) for i, thing in enumerate(scene.things)))


def _colour(scene: Scene, rng: Random, may_hold_out: bool) -> Scene | None:
    i = rng.randrange(len(scene.things))
    others = [colour for colour in COLOURS if colour != scene.things[i].colour]
    return _with(scene, may_hold_out, {i: replace(scene.things[i], colour=rng.choice(others))})


def _kind(scene: Scene, rng: Random, may_hold_out: bool) -> Scene | None:
    i = rng.randrange(len(scene.things))
    others = [kind for kind in KINDS if not scene.find(kind)]
    return _with(scene, may_hold_out, {i: replace(scene.things[i], kind=rng.choice(others))})


def _count(scene: Scene, rng: Random, may_hold_out: bool) -> Scene | None:
    i = rng.randrange(len(scene.things))
    thing = scene.things[i]
    room = {*scene.free(thing.row), *thing.columns}
    spans = [span for number in range(1, SIDE + 1) if number != thing.number for span in places(room, number)]
    moved = [replace(thing, columns=span) for span in spans if {*span} < {*thing.columns} or {*span} > {*thing.columns}]
    fitting = [other for other in moved if FEWEST <= scene.total - thing.number + other.number <= MOST]
    return _with(scene, True, {i: rng.choice(fitting)}) if fitting else None


def _row(scene: Scene, rng: Random, may_hold_out: bool) -> Scene | None:
    i = rng.randrange(len(scene.things))
    thing = scene.things[i]
    rows = [row for row in range(SIDE) if row != thing.row and scene.free(row).issuperset(thing.columns)]
    return _with(scene, True, {i: replace(thing, row=rng.choice(rows))}) if rows else None


def _background(scene: Scene, rng: Random, may_hold_out: bool) -> Scene | None:
    return replace(scene, background=rng.choice([other for other in BACKGROUNDS if other != scene.background]))


def _presence(scene: Scene, rng: Random, may_hold_out: bool) -> Scene | None:
    if rng.random() < 0.5:
        without = replace(scene, things=scene.things[:-1])
        return without if len(without.things) > 1 else None
    cells = [(row, column) for row in range(SIDE) for column in scene.free(row)]
    if scene.total == MOST:
        return None
    row, column = rng.choice(cells)
    thing = Thing(rng.choice([kind for kind in KINDS if not scene.find(kind)]), rng.choice(COLOURS), row, (column,))
    return replace(scene, things=(*scene.things, thing)) if may_hold_out or not thing.held_out else None


def _colour_swap(scene: Scene, rng: Random, may_hold_out: bool) -> Scene | None:
    i, j = rng.sample(range(len(scene.things)), 2)
    a, b = scene.things[i], scene.things[j]
    changed = {i: replace(a, colour=b.colour), j: replace(b, colour=a.colour)}
    return _with(scene, may_hold_out, changed) if a.colour != b.colour else None


EDITS: dict[str, EditFunction] = {
    "colour": _colour,
    "kind": _kind,
    "count": _count,
    "row": _row,
    "background": _background,
    "presence": _presence,
    "colour_swap": _colour_swap,
}
