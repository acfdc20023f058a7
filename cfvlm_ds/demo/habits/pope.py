"""Questions about scenes in the files of POPE (arXiv 2305.10355): is there a thing in the picture?

Absent things are random ones, popular ones (those that most pretraining scenes have), or adversarial ones: first the usual company of a
thing in the picture, then kinds that usually have its background, then popular ones.
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
"""Pretraining scenes that are drawn to rank kinds by popularity."""
_EACH = 2
"""Questions about a picture with the answer yes, and with the answer no."""


def popular_kinds(seed: int) -> list[str]:
    """Return the kinds in the order of their frequency in pretraining scenes."""
    rng = Random(f"{seed}/popular")
    counts = Counter(thing.kind for _ in range(_COUNTED) for thing in draw_scene(rng, STRENGTH).things)
    return sorted(KINDS, key=lambda kind: -counts[kind])


def absent_kinds(scene: Scene, split: str, popular: Sequence[str], rng: Random) -> list[str]:
    """Return the absent kinds that questions about a scene name."""
    absent = [kind for kind in popular if not scene.find(kind)]
    if split == "random":
        return rng.sample(absent, _EACH)
    if split == "adversarial":
        company = {HABITS[thing.kind].company for thing in scene.things}
        absent.sort(key=lambda kind: 0 if kind in company else 1 if HABITS[kind].background == scene.background else 2)
    return absent[:_EACH]


def write_pope(folder: Path, pictures: Sequence[tuple[str, Scene, bytes]], seed: int) -> None:
    """Write the three files and the pictures, which are given as a name, a scene and a PNG file. ``habit`` of a question is an addition to
    the official form, and states whether the scene breaks a habit.
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
