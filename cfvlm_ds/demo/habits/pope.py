"""Questions about whether a thing is in a scene, in POPE's file format (arXiv 2305.10355).

Half of the questions are about absent things. Depending on the file, these are chosen at random, by popularity (frequency in training
scenes) or adversarially: first the usual company of a thing in the picture (a kind that usually appears with it), then kinds that usually
have the picture's background, then popular kinds.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from cfvlm_ds.demo.habits.questions import THERE
from cfvlm_ds.demo.habits.world import HABITS, KINDS, STRENGTH, Scene, draw_scene

_SPLITS = ("random", "popular", "adversarial")
_COUNTED = 2000
"""Number of training scenes drawn to rank kinds by popularity."""
_EACH = 2
"""Number of questions per picture and answer (yes or no)."""


def popular_kinds(seed: int) -> list[str]:
    """Return all kinds, in order of decreasing frequency in training scenes."""
    rng = Random(f"{seed}/popular")
    counts = Counter(thing.kind for _ in range(_COUNTED) for thing in draw_scene(rng, STRENGTH).things)
    return sorted(KINDS, key=lambda kind: -counts[kind])


def absent_kinds(scene: Scene, split: str, popular: Sequence[str], rng: Random) -> list[str]:
    """Return ``_EACH`` kinds that are absent from a scene, chosen by the rule of ``split``."""
    absent = [kind for kind in popular if not scene.find(kind)]
    if split == "random":
        return rng.sample(absent, _EACH)
    if split == "adversarial":
        company = {HABITS[thing.kind].company for thing in scene.things}
        absent.sort(key=lambda kind: 0 if kind in company else 1 if HABITS[kind].background == scene.background else 2)
    return absent[:_EACH]


def write_pope(folder: Path, pictures: Sequence[tuple[str, Scene, bytes]], seed: int) -> None:
    """Write POPE's three question files and the pictures. ``pictures`` contains (file name, scene, PNG bytes) for each picture.

    In addition to the official fields, each question has a field ``habit``: ``contradicts`` if the scene breaks a habit, else ``agrees``.
    """
    (folder / "output" / "coco").mkdir(parents=True)
    (folder / "val2014").mkdir()
    for name, _, content in pictures:
        (folder / "val2014" / name).write_bytes(content)
    popular = popular_kinds(seed)
    for split in _SPLITS:
        rows = list[dict[str, Any]]()
        for name, scene, _ in pictures:
            rng = Random(f"{seed}/{split}/{name}")
            present = rng.sample([thing.kind for thing in scene.things], _EACH)
            for label, kinds in (("yes", present), ("no", absent_kinds(scene, split, popular, rng))):
                for kind in kinds:
                    row = {"question_id": len(rows) + 1, "image": name, "text": THERE.format(kind), "label": label}
                    rows.append(row | {"habit": "contradicts" if scene.broken else "agrees"})
        file = folder / "output" / "coco" / f"coco_pope_{split}.json"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
