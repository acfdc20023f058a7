"""Counterfactual edits: a scene with one factor changed, everything else (jitter, background, distractors) the same object.

Each edit takes ``(scene, rng, may_hold_out)`` and returns the edited scene, or None where it does not apply. The swaps keep the caption's
bag of words. An edit only goes between values a caption says, so both captions are false of the other image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from random import Random

from cfvlm_ds.demo.scenes.world import COLOURS, COUNTS, SHAPES, SIZES, TEXTURES, Scene, Thing

EditFunction = Callable[[Scene, Random, bool], "Scene | None"]


def _replace_one(scene: Scene, rng: Random, may_hold_out: bool, options: Callable[[Thing], list[Thing]]) -> Scene | None:
    """One thing replaced by one of its options, both drawn uniformly; options that combine held-out attributes are skipped."""
    for index in rng.sample((0, 1), 2):
        allowed = [thing for thing in options(scene.things[index]) if may_hold_out or not thing.held_out]
        if allowed:
            thing = rng.choice(allowed)
            return replace(scene, things=(thing, scene.things[1]) if index == 0 else (scene.things[0], thing))
    return None


def _colour(scene: Scene, rng: Random, may_hold_out: bool) -> Scene | None:
    return _replace_one(scene, rng, may_hold_out, lambda t: [replace(t, colour=c) for c in COLOURS if c != t.colour])


def _shape(scene: Scene, rng: Random, may_hold_out: bool) -> Scene | None:
    taken = {thing.shape for thing in scene.things}
    return _replace_one(scene, rng, may_hold_out, lambda t: [replace(t, shape=s) for s in SHAPES if s not in taken])


def _size(scene: Scene, rng: Random, may_hold_out: bool) -> Scene | None:
    def options(thing: Thing) -> list[Thing]:
        return [] if thing.size == "medium" else [replace(thing, size=s) for s in SIZES[1:] if s != thing.size]

    return _replace_one(scene, rng, may_hold_out, options)


def _texture(scene: Scene, rng: Random, may_hold_out: bool) -> Scene | None:
    said = [t for t in TEXTURES if t != "plain" and not (t == "hollow" and scene.relation in ("front", "behind"))]

    def options(thing: Thing) -> list[Thing]:
        return [] if thing.texture == "plain" else [replace(thing, texture=t) for t in said if t != thing.texture]

    return _replace_one(scene, rng, may_hold_out, options)


def _count(scene: Scene, rng: Random, may_hold_out: bool) -> Scene | None:
    if scene.relation in ("front", "behind"):
        return None

    def options(thing: Thing) -> list[Thing]:
        legible = thing.size == "medium" and thing.texture == "plain"
        return [replace(thing, count=n) for n in COUNTS if n != thing.count] if legible else []

    return _replace_one(scene, rng, may_hold_out, options)


def _relation(scene: Scene, rng: Random, may_hold_out: bool) -> Scene | None:
    return None if scene.relation in ("front", "behind") else replace(scene, spots=(scene.spots[1], scene.spots[0]))


def _depth(scene: Scene, rng: Random, may_hold_out: bool) -> Scene | None:
    return replace(scene, front=1 - scene.front) if scene.relation in ("front", "behind") else None


def _swap(scene: Scene, may_hold_out: bool, factor: str) -> Scene | None:
    a, b = scene.things
    if getattr(a, factor) == getattr(b, factor):
        return None
    things = replace(a, **{factor: getattr(b, factor)}), replace(b, **{factor: getattr(a, factor)})
    return replace(scene, things=things) if may_hold_out or not any(thing.held_out for thing in things) else None


def _colour_swap(scene: Scene, rng: Random, may_hold_out: bool) -> Scene | None:
    return _swap(scene, may_hold_out, "colour")


def _shape_swap(scene: Scene, rng: Random, may_hold_out: bool) -> Scene | None:
    a, b = scene.things
    if (a.count == 1) != (b.count == 1):
        return None  # "two stars, a circle" against "two circles, a star" is another bag of words
    return _swap(scene, may_hold_out, "shape")


EDITS: dict[str, EditFunction] = {
    "colour": _colour,
    "shape": _shape,
    "size": _size,
    "texture": _texture,
    "count": _count,
    "relation": _relation,
    "depth": _depth,
    "colour_swap": _colour_swap,
    "shape_swap": _shape_swap,
}


def scene_difference(before: Scene, after: Scene) -> set[str]:
    """What differs between two scene graphs: "0.colour", "1.shape", ... for the things, else the name of the Scene field."""
    changed = {f.name for f in fields(Scene) if f.name != "things" and getattr(before, f.name) != getattr(after, f.name)}
    for index, (old, new) in enumerate(zip(before.things, after.things, strict=True)):
        changed |= {f"{index}.{f.name}" for f in fields(Thing) if getattr(old, f.name) != getattr(new, f.name)}
    return changed


def is_minimal(kind: str, changed: set[str]) -> bool:
    """Whether an edit of this type may have made exactly these changes (of scene_difference)."""
    if kind in ("relation", "depth"):
        return changed == {"spots" if kind == "relation" else "front"}
    if kind.endswith("_swap"):
        factor = kind.removesuffix("_swap")
        return changed == {f"0.{factor}", f"1.{factor}"}
    return changed in ({f"0.{kind}"}, {f"1.{kind}"})
