"""Counterfactual edits: a scene with one factor changed and everything else (jitter, background, distractors) identical.

Each edit takes ``(scene, rng, may_hold_out)`` and returns the edited scene, or None if it does not apply. Swaps keep the caption's bag of
words. An edit only exchanges values that a caption mentions, so each caption is false of the other image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

from cfvlm_ds.demo.scenes.world import COLOURS, COUNTS, SHAPES, SIZES, TEXTURES, Scene, Thing

EditFunction = Callable[[Scene, Random, bool], "Scene | None"]


def _values(factor: str, scene: Scene, thing: Thing) -> list[Any]:
    """Return the values to which a factor of one thing may be changed."""
    overlap = scene.relation in ("front", "behind")
    if factor == "colour":
        return [colour for colour in COLOURS if colour != thing.colour]
    if factor == "shape":
        return [shape for shape in SHAPES if shape not in {other.shape for other in scene.things}]
    if factor == "size":
        return [] if thing.size == "medium" else [size for size in SIZES[1:] if size != thing.size]
    if factor == "texture":
        textures = [texture for texture in TEXTURES[1:] if not (texture == "hollow" and overlap)]
        return [] if thing.texture == "plain" else [texture for texture in textures if texture != thing.texture]
    legible = thing.size == "medium" and thing.texture == "plain"
    return [count for count in COUNTS if count != thing.count] if legible else []


def _replace(scene: Scene, rng: Random, may_hold_out: bool, factor: str) -> Scene | None:
    """Change a factor of one thing, where thing and new value are drawn uniformly; None if it cannot be changed.

    Values that make a held-out combination are skipped unless ``may_hold_out``.
    """
    if factor == "count" and scene.relation in ("front", "behind"):
        return None
    for index in rng.sample((0, 1), 2):
        thing = scene.things[index]
        changed = [replace(thing, **{factor: value}) for value in _values(factor, scene, thing)]
        if allowed := [other for other in changed if may_hold_out or not other.held_out]:
            chosen = rng.choice(allowed)
            return replace(scene, things=(chosen, scene.things[1]) if index == 0 else (scene.things[0], chosen))
    return None


def _relation(scene: Scene, rng: Random, may_hold_out: bool) -> Scene | None:
    return None if scene.relation in ("front", "behind") else replace(scene, spots=(scene.spots[1], scene.spots[0]))


def _depth(scene: Scene, rng: Random, may_hold_out: bool) -> Scene | None:
    return replace(scene, front=1 - scene.front) if scene.relation in ("front", "behind") else None


def _swap(scene: Scene, rng: Random, may_hold_out: bool, factor: str) -> Scene | None:
    a, b = scene.things
    if getattr(a, factor) == getattr(b, factor):
        return None
    if factor == "shape" and (a.count == 1) != (b.count == 1):
        return None  # "two stars, a circle" and "two circles, a star" are different bags of words
    things = replace(a, **{factor: getattr(b, factor)}), replace(b, **{factor: getattr(a, factor)})
    return replace(scene, things=things) if may_hold_out or not any(thing.held_out for thing in things) else None


EDITS: dict[str, EditFunction] = {
    **{factor: partial(_replace, factor=factor) for factor in ("colour", "shape", "size", "texture", "count")},
    "relation": _relation,
    "depth": _depth,
    "colour_swap": partial(_swap, factor="colour"),
    "shape_swap": partial(_swap, factor="shape"),
}
