"""Picture editor for the embedded world: draws the requested edit exactly, or with a known fault.

A source is a group in a folder of scenes, by its id. Since the truth is known, deliberate faults measure the step verify.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from cfvlm_ds.core.config import ScenesConfig
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.counterfactuals.edit.base import Editor, Picture, Refused, Task
from cfvlm_ds.counterfactuals.edit.diffusion import call_options
from cfvlm_ds.counterfactuals.options import EditOptions
from cfvlm_ds.demo.scenes.build import SceneGroup, config_in, draw_group
from cfvlm_ds.demo.scenes.edits import EDITS
from cfvlm_ds.demo.scenes.grammar import describe, holds, say
from cfvlm_ds.demo.scenes.render import render
from cfvlm_ds.demo.scenes.world import COLOURS, COUNTS, SHAPES, SIZES, TEXTURES, Scene, shake

FAULTS = ("wrong", "nothing", "rerendered", "two")
"""Faults: a wrong thing is changed; nothing is changed; the whole edited scene is rendered again; a second thing is also changed."""


class SceneEditor(Editor):
    """Editor ``scenes``. ``--folder`` is the folder of scenes, and ``--options faults=0.5`` the share of attempts that fail, each in one of
    FAULTS.
    """

    varies, threads = True, 1

    def __init__(self, options: EditOptions) -> None:
        if (config := config_in(Path(options.folder))) is None:
            raise ConfigError(f"--folder {options.folder}: not a folder of scenes; build one with `cfvlm-ds data build FOLDER`")
        self._config = config
        self._share = float(call_options(options.options).get("faults", 0.0))

    def settings(self) -> Mapping[str, Any]:
        return {"version": 1, "faults": self._share}

    def edit(self, task: Task) -> Picture | Refused | None:
        drawn = drawn_group(self._config, task.source)
        if (scene := shown_by(drawn, task.text)) is None:
            return Refused("the world has no picture of this text that differs in one thing")
        fault = fault_of(task.seed, self._share)
        return Picture(render(failed(drawn.scenes[0], scene, fault, task.seed), self._config.image_size), {"fault": fault} if fault else {})


def drawn_group(config: ScenesConfig, source: str) -> SceneGroup:
    """Draw the group that an id such as test_iid-00017 names."""
    split, _, number = source.partition("#")[0].rpartition("-")
    return draw_group(config, split, int(number))


def shown_by(drawn: SceneGroup, text: str) -> Scene | None:
    """Return the scene that differs from a group's factual one in one thing and that the text describes, or None."""
    return next((scene for scene in neighbours(drawn.scenes[0]) if _says(drawn, scene) == _plain(text)), None)


def is_right(drawn: SceneGroup, text: str, scene: Scene) -> bool:
    """Return whether a scene shows what a text describes, and no longer what the group's caption describes."""
    wanted = shown_by(drawn, text)
    if wanted is None:
        return False
    return holds(describe(wanted, True), scene) and not holds(describe(drawn.scenes[0], True), scene)


def fault_of(seed: int, share: float) -> str:
    """Draw the fault of an attempt, or ""."""
    rng = Random(f"fault/{seed}")
    return rng.choice(FAULTS) if rng.random() < share else ""


def failed(before: Scene, after: Scene, fault: str, seed: int) -> Scene:
    """Return the scene that is drawn instead of an edited one."""
    rng = Random(f"failed/{seed}")
    if fault == "nothing":
        return before
    if fault == "rerendered":
        return shake(after, rng)
    if fault in ("wrong", "two"):
        start = before if fault == "wrong" else after
        excluded = {describe(scene, True) for scene in (before, after)}
        others = [scene for scene in neighbours(start) if describe(scene, True) not in excluded]
        return rng.choice(others) if others else start
    return after


def neighbours(scene: Scene) -> Iterator[Scene]:
    """Yield every scene that differs in one thing that captions mention."""
    for index, thing in enumerate(scene.things):
        changed = [
            *(replace(thing, colour=colour) for colour in COLOURS),
            *(replace(thing, shape=shape) for shape in SHAPES if shape != scene.things[1 - index].shape),
            *(replace(thing, size=size) for size in SIZES[1:] if thing.size != "medium"),
            *(replace(thing, texture=texture) for texture in TEXTURES[1:] if thing.texture != "plain"),
            *(replace(thing, count=count) for count in COUNTS if (thing.size, thing.texture) == ("medium", "plain")),
        ]
        for other in changed:
            if other != thing:
                yield replace(scene, things=(other, scene.things[1]) if index == 0 else (scene.things[0], other))
    for kind in ("relation", "depth", "colour_swap", "shape_swap"):
        swapped = EDITS[kind](scene, Random(0), True)
        if swapped is not None:
            yield swapped


def _says(drawn: SceneGroup, scene: Scene) -> str:
    return say(describe(scene, drawn.a_first), drawn.phrasing)


def _plain(text: str) -> str:
    """Replace words that the world does not have: "one" by "a", "underneath" by "below"."""
    return " ".join({"one": "a", "underneath": "below"}.get(word, word) for word in text.split())
