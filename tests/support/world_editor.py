"""Picture editor for the world with habits. It draws the requested edit exactly, or with a known fault."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from random import Random
from typing import Any

from cfvlm_ds.core.config import HabitsConfig
from cfvlm_ds.counterfactuals.edit.base import Editor, Picture, Refused, Task
from cfvlm_ds.counterfactuals.edit.diffusion import call_options
from cfvlm_ds.counterfactuals.options import EditOptions
from cfvlm_ds.demo.habits import judge
from cfvlm_ds.demo.habits.build import draw_group
from cfvlm_ds.demo.habits.render import render
from cfvlm_ds.demo.habits.world import BACKGROUNDS, COLOURS, FEWEST, KINDS, MOST, SIDE, Scene, places

FAULTS = ("wrong", "nothing", "rerendered", "two")
"""Faults: another thing is changed instead; nothing is changed; the whole edited scene is rendered again; a second thing is also changed.
"""


class WorldEditor(Editor):
    """Editor for groups of a world with default settings. ``faults`` is the share of attempts that fail, each with one of FAULTS."""

    varies, threads = True, 1

    def __init__(self, options: EditOptions) -> None:
        self._share = float(call_options(options.options)["faults"])

    def settings(self) -> Mapping[str, Any]:
        return {"faults": self._share}

    def edit(self, task: Task) -> Picture | Refused | None:
        before = scene_of(task.source)
        if (after := shown_by(before, task.text)) is None:
            return Refused("the world has no picture of this text that differs in one thing")
        fault = fault_of(task.seed, self._share)
        return Picture(render(failed(before, after, fault, task.seed)), {"fault": fault} if fault else {})


def scene_of(source: str) -> Scene:
    """Return the first scene of the group with an id such as test-000017."""
    split, _, number = source.partition("#")[0].rpartition("-")
    return draw_group(HabitsConfig("unused"), split, int(number)).scenes[0]


def describes(text: str, scene: Scene) -> bool:
    """Return True if a text is true of a scene and mentions all its things. The grammar has "a" for "one"."""
    found = judge(re.sub(r"\bone\b", "a", text), scene)
    return not found.unparsed and found.mentioned == found.present and all(found.statements.values())


def shown_by(before: Scene, text: str) -> Scene | None:
    """Return the scene that a text describes and that differs in one thing from ``before``, or None."""
    return next((scene for scene in neighbours(before) if describes(text, scene)), None)


def fault_of(seed: int, share: float) -> str:
    """Return the fault of an attempt, or "" for none."""
    rng = Random(f"fault/{seed}")
    return rng.choice(FAULTS) if rng.random() < share else ""


def failed(before: Scene, after: Scene, fault: str, seed: int) -> Scene:
    """Return the scene that a faulty attempt draws instead of ``after``."""
    rng = Random(f"failed/{seed}")
    if fault == "nothing":
        return before
    if fault == "rerendered":
        return replace(after, seed=rng.getrandbits(32))
    if fault in ("wrong", "two"):
        return rng.choice([scene for scene in neighbours(before if fault == "wrong" else after) if scene not in (before, after)])
    return after


def neighbours(scene: Scene) -> Iterator[Scene]:
    """Yield every scene that differs in the colour, kind or number or row of one thing, or in the background."""
    things = list(scene.things)
    for i, thing in enumerate(things):
        room = {*scene.free(thing.row), *thing.columns}
        numbers = [n for n in range(1, SIDE + 1) if n != thing.number and FEWEST <= scene.total - thing.number + n <= MOST]
        for other in [
            *(replace(thing, colour=colour) for colour in COLOURS if colour != thing.colour),
            *(replace(thing, kind=kind) for kind in KINDS if not scene.find(kind)),
            *(replace(thing, columns=span) for n in numbers for span in places(room, n) if {*span} & {*thing.columns}),
            *(replace(thing, row=row) for row in range(SIDE) if row != thing.row and scene.free(row).issuperset(thing.columns)),
        ]:
            yield replace(scene, things=(*things[:i], other, *things[i + 1 :]))
    yield from (replace(scene, background=background) for background in BACKGROUNDS if background != scene.background)
