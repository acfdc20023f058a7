"""Scenes in the file formats of three public benchmarks, so that a model trained on scenes is evaluated by the code for the benchmarks.

SugarCrepe: a picture, its caption, and a negative caption with one edit; its two files of additions are empty. NaturalBench: two pictures,
and for each picture's caption the question whether the image shows it. POPE: questions about things in the picture. An absent thing is
random, frequent, or a new combination of a colour and a shape in the picture.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from cfvlm_ds.core.config import ScenesConfig
from cfvlm_ds.core.files import whole_folder
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.secrets import print_line
from cfvlm_ds.demo.scenes.build import SceneGroup, draw_group, is_complete, settings_of
from cfvlm_ds.demo.scenes.grammar import describe, say
from cfvlm_ds.demo.scenes.world import COLOURS, SHAPES, Scene

SUBSETS = {
    "add_att": (), "add_obj": (), "replace_att": ("colour", "size", "texture", "count"), "replace_obj": ("shape",),
    "replace_rel": ("relation", "depth"), "swap_att": ("colour_swap",), "swap_obj": ("shape_swap",),
}  # fmt: skip
"""SugarCrepe's files, and the types of edits in each."""
SPLIT = "test_iid"
_POPE = ("random", "popular", "adversarial")
_POPULAR = 8

Kind = tuple[str, str]
"""Colour and shape."""


def build_benchmarks(config: ScenesConfig, out: Path, progress: Callable[[str], object] = print_line) -> Path:
    """Write the test split of the scenes in ``config.out_dir`` as benchmarks below ``out`` unless they exist, and return ``out``.

    Raises DataError if ``out`` contains anything else.
    """
    out, settings = out.resolve(), {"benchmarks": 1, **settings_of(config)}
    if is_complete(out, settings):
        return out
    drawn = [draw_group(config, SPLIT, index) for index in range(config.num_test)]
    pictures = Path(config.out_dir) / "images" / SPLIT
    shown = Progress(progress, "benchmarks of scenes", len(drawn), "groups")
    with whole_folder(out) as folder:
        for name in ("sugarcrepe/data", "sugarcrepe/val2017", "naturalbench/images", "pope/output/coco", "pope/val2014"):
            (folder / name).mkdir(parents=True)
        for index in shown.over(range(len(drawn))):
            for number, places in ((0, ("sugarcrepe/val2017", "naturalbench/images", "pope/val2014")), (1, ("naturalbench/images",))):
                for place in places:
                    shutil.copyfile(pictures / picture(index, number), folder / place / picture(index, number))
        for subset, edits in SUBSETS.items():
            chosen = [(picture(index, 0), _captions(group)) for index, group in enumerate(drawn) if group.edits[0] in edits]
            rows = [{"filename": name, "caption": texts[0], "negative_caption": texts[1]} for name, texts in chosen]
            _write(folder / "sugarcrepe" / "data" / f"{subset}.json", {str(number): row for number, row in enumerate(rows)})
        _write_lines(folder / "naturalbench" / "train.jsonl", (_questions(index, group) for index, group in enumerate(drawn)))
        popular = [kind for kind, _ in Counter(kind for group in drawn for kind in _kinds(group.scenes[0])).most_common(_POPULAR)]
        for split in _POPE:
            _write_lines(folder / "pope" / "output" / "coco" / f"coco_pope_{split}.json", _asked(config.seed, split, drawn, popular))
        _write(folder / "scenes.json", {"settings": settings})
    return out


def picture(index: int, number: int) -> str:
    """Return the file name of a group's picture, which is the same as in the folder of scenes."""
    return f"{SPLIT}-{index:05d}-{number}.png"


def _captions(group: SceneGroup) -> list[str]:
    return [say(describe(scene, group.a_first), group.phrasing) for scene in group.scenes]


def _questions(index: int, group: SceneGroup) -> dict[str, Any]:
    captions = _captions(group)
    row: dict[str, Any] = {"Index": index} | {f"Image_{i}": picture(index, i) for i in (0, 1)}
    row |= {f"Question_{q}": f"Does the image show {captions[q]}?" for q in (0, 1)}
    row |= {f"Image_{i}_Question_{q}": "Yes" if i == q else "No" for i in (0, 1) for q in (0, 1)}
    return row | {"Question_Type": "yes_no", "Source": "scenes"}


def _kinds(scene: Scene) -> list[Kind]:
    return [(thing.colour, thing.shape) for thing in scene.things]


def _asked(seed: int, split: str, drawn: list[SceneGroup], popular: list[Kind]) -> Iterator[dict[str, Any]]:
    """Yield two questions about each picture with the answer yes, and two with the answer no."""
    number = 0
    for index, group in enumerate(drawn):
        rng, present = Random(f"{seed}/{split}/{index}"), _kinds(group.scenes[0])
        others = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in present]
        shapes = {shape for _, shape in present}
        similar = [(colour, shape) for colour, shape in others if colour in dict(present) and shape in shapes]
        wanted = {"random": others, "popular": [kind for kind in popular if kind not in present], "adversarial": similar}[split]
        chosen = rng.sample(wanted, min(2, len(wanted)))
        absent = [*chosen, *rng.sample([kind for kind in others if kind not in chosen], 2 - len(chosen))]
        for label, kinds in (("yes", present), ("no", absent)):
            for colour, shape in kinds:
                number += 1
                text = f"Is there a {colour} {shape} in the image?"
                yield {"question_id": number, "image": picture(index, 0), "text": text, "label": label}


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
